"""Linear probes: where in the model the target can still be told from everything else.

A model that no longer says the name may still represent what the name stood for. In every layer of the vision side, the
projector and the language model a linear classifier is fitted to tell images of the target from others, and is scored
on images it was not fitted on.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..data.names import check_concept
from ..data.questions import DEFAULT_QUESTIONS, QuestionSet
from ..figures.style import BEFORE
from ..modeling.features import multimodal_core, tap_image_features
from ..modeling.layers import deployed_model, evaluating
from ..modeling.prompts import build_batch, to_device
from ..modeling.targets import LANGUAGE_PARTS, VISION_PARTS
from ..records.stages import track
from .material import Material, Needs
from .models import has_adapter
from .panels import AFTER, CONTROL
from .results import AttackResult


@dataclass(frozen=True)
class ProbeScore:
    """How well a linear classifier tells the target, on images it was not fitted on.

    Args:
        auc (`float`): Chance that an image of the target scores above another image.
        accuracy (`float`): Balanced: mean over the target's and the other images.
    """

    auc: float
    accuracy: float


@dataclass(frozen=True)
class LayerProbe:
    """The probes of one layer.

    Args:
        layer (`str`): "vision.3", "projector", "language.2".
        tokens (`str`): What of it was read: "image" (mean over the image's tokens) or "last" (the prompt's last token,
            from which the answer is predicted).
        after ([`ProbeScore`]): In the model as it is.
        before ([`ProbeScore`], *optional*): With the adapter switched off; None for a model without adapter.
        chance (`float`): Mean AUC with labels drawn at random.
        chance_high (`float`): The AUC that 95 % of them stay below.
    """

    layer: str
    tokens: str
    after: ProbeScore
    before: ProbeScore | None
    chance: float
    chance_high: float


@dataclass(frozen=True)
class LinearProbeResult(AttackResult):
    """What `linear_probes` returns.

    Args:
        concept (`str`): The target.
        layers (`tuple[LayerProbe, ...]`): From the image to the answer.
        n_target, n_other (`int`): Images of the target and of other concepts.
        settings (`dict`): Folds, ridge, permutations, question, seed.
    """

    concept: str
    layers: tuple[LayerProbe, ...]
    n_target: int
    n_other: int
    settings: dict

    name = "linear_probe"
    label = "read off by a linear probe"
    title = "Linear probe for the target"
    needs = Needs(target=2, others=2)
    untested = ("hidden states", "whether the concept can still be read off them")

    @classmethod
    def make(cls, model, processor, material: Material) -> LinearProbeResult:
        return linear_probes(
            model, processor, material.target, material.others, material.concept, questions=material.questions,
            seed=material.seed, progress=material.progress,
        )  # fmt: skip

    def summary(self) -> dict:
        last = self.layers[-1]
        return {
            "value": last.after.auc,
            "control": last.chance,
            "before": None if last.before is None else last.before.auc,
            "n": self.n_target + self.n_other,
            "meaning": (
                "AUC of a linear probe for the target on the last layer's last token, where the answer is read off; "
                "control: labels at random"
            ),
        }

    def details(self) -> dict:
        return asdict(self)

    @staticmethod
    def draw(axes, details: dict) -> None:
        layers = details["layers"]
        x = np.arange(len(layers))
        for tokens, marker in (("image", "o"), ("last", "^")):
            chosen = [i for i, layer in enumerate(layers) if layer["tokens"] == tokens]
            label = {"image": "image tokens", "last": "last token"}[tokens]
            if layers[0]["before"] is not None:
                before = [layers[i]["before"]["auc"] for i in chosen]
                axes.plot(
                    x[chosen], before, marker, color=BEFORE, markersize=7, linestyle="-", label=f"before, {label}"
                )
            after = [layers[i]["after"]["auc"] for i in chosen]
            axes.plot(x[chosen], after, marker, color=AFTER, markersize=4, linestyle="-", label=f"after, {label}")
        low, high = ([layer[key] for layer in layers] for key in ("chance", "chance_high"))
        axes.fill_between(x, low, high, color=CONTROL, alpha=0.15, linewidth=0, label="labels at random")
        step = max(1, len(layers) // 12)
        axes.set_xticks(x[::step], [layer["layer"] for layer in layers[::step]], rotation=60, ha="right", fontsize=7)
        axes.set(ylabel="AUC of a linear probe")


def linear_probes(
    model,
    processor,
    target_images: Sequence[Image.Image],
    other_images: Sequence[Image.Image],
    concept: str,
    *,
    questions: QuestionSet = DEFAULT_QUESTIONS,
    folds: int = 5,
    ridge: float = 0.1,
    permutations: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> LinearProbeResult:
    """Fits linear probes for the target on every layer's hidden states, before and after an erasure.

    Args:
        model (`PeftModel` or `PreTrainedModel`): The erased model; it is not changed.
        processor (`ProcessorMixin`): Its processor.
        target_images (`list[PIL.Image.Image]`): Images of the target, at least two.
        other_images (`list[PIL.Image.Image]`): Images of other concepts, its siblings among them.
        concept (`str`): The target's name, for the record.
        questions (`QuestionSet`): The first of `naming` is asked about every image.
        folds (`int`, defaults to 5): Of the cross-validation; no more than there are images of the target.
        ridge (`float`, defaults to 0.1): Penalty, in units of the features' mean square.
        permutations (`int`, defaults to 20): Draws of random labels that tell what chance can reach.
        seed (`int`, defaults to 0): Of folds and random labels.
        progress (`bool`, defaults to `True`): Show a progress bar.

    Returns:
        [`LinearProbeResult`]

    Raises:
        ValueError: If there are fewer than two images of either kind.
    """
    concept = check_concept(concept)
    if min(len(target_images), len(other_images)) < 2:
        raise ValueError(
            f"got {len(target_images)} images of the target and {len(other_images)} others; a probe needs two of each "
            "at least: one to fit and one to test."
        )
    if folds < 2 or permutations < 1 or not ridge > 0:
        raise ValueError(
            f"`folds` must be 2 or more, `permutations` 1 or more and `ridge` above 0, got {folds}, {permutations}, {ridge}."
        )
    images = [*target_images, *other_images]
    labels = torch.arange(len(images)) < len(target_images)
    question = questions.naming[0]
    after = hidden_states(model, processor, images, question, progress=progress)
    before = None
    if has_adapter(model):
        with deployed_model(model):
            before = hidden_states(model, processor, images, question, progress=progress)
    folds = min(folds, len(target_images), len(other_images))
    generator = torch.Generator().manual_seed(seed)
    shuffled = [labels[torch.randperm(len(labels), generator=generator)] for _ in range(permutations)]
    layers = []
    for (layer, tokens), features in after.items():
        chance = torch.tensor([cross_validate(features, random, folds, ridge, seed).auc for random in shuffled])
        layers.append(
            LayerProbe(
                layer=layer,
                tokens=tokens,
                after=cross_validate(features, labels, folds, ridge, seed),
                before=None if before is None else cross_validate(before[layer, tokens], labels, folds, ridge, seed),
                chance=chance.mean().item(),
                chance_high=chance.quantile(0.95).item(),
            )
        )
    settings = {"folds": folds, "ridge": ridge, "permutations": permutations, "question": question, "seed": seed}
    return LinearProbeResult(concept, tuple(layers), len(target_images), len(other_images), settings)


def cross_validate(features: torch.Tensor, labels: torch.Tensor, folds: int, ridge: float, seed: int = 0) -> ProbeScore:
    """Scores a ridge classifier on the images that it was not fitted on.

    Folds hold the same share of each class. AUC is averaged over folds instead of pooled: scores of differently fitted
    classifiers do not compare.

    Args:
        features (`torch.Tensor`): `(n, d)`.
        labels (`torch.Tensor`): `(n,)`, bool.
        folds (`int`): At most as many as the smaller class has rows.
        ridge (`float`): See `fit_ridge`.
        seed (`int`, defaults to 0): Of the folds.

    Returns:
        [`ProbeScore`]
    """
    features = features.double()
    generator = torch.Generator().manual_seed(seed)
    fold = torch.empty(len(labels), dtype=torch.long)
    for value in (True, False):
        rows = (labels == value).nonzero().flatten()
        fold[rows[torch.randperm(len(rows), generator=generator)]] = torch.arange(len(rows)) % folds
    aucs, hits = [], torch.empty(len(labels), dtype=torch.bool)
    for k in range(folds):
        test = fold == k
        weight, bias = fit_ridge(features[~test], labels[~test], ridge)
        scores = features[test] @ weight + bias
        positive, negative = scores[labels[test]], scores[~labels[test]]
        difference = positive[:, None] - negative
        aucs.append(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())
        hits[test] = (scores > 0) == labels[test]
    accuracy = (hits[labels].double().mean() + hits[~labels].double().mean()) / 2
    return ProbeScore(auc=torch.stack(aucs).mean().item(), accuracy=accuracy.item())


def fit_ridge(features: torch.Tensor, labels: torch.Tensor, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The linear classifier w, b that minimises, over standardised features x,

        sum_i s_i (w x_i + b - y_i)^2 + ridge t |w|^2,    y_i = +-1,  s_i = 1 / (2 n of i's class),  t = tr(K) / n,

    K the Gram matrix of the s-weighted features. Both classes weigh the same, however few images the target has.

    Args:
        features (`torch.Tensor`): `(n, d)`, float64.
        labels (`torch.Tensor`): `(n,)`, bool, both values present.
        ridge (`float`): Above 0.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: w `(d,)` and b, for features that are *not* standardised.
    """
    positive = labels.double()
    weights = positive / (2 * positive.sum()) + (1 - positive) / (2 * (1 - positive).sum())  # (n,)
    mean = weights @ features
    scale = features.std(dim=0, correction=0).clamp(min=1e-12)
    x = (features - mean) / scale * weights.sqrt()[:, None]
    y = (2 * positive - 1) * weights.sqrt()
    # The dual, n x n: images are fewer than features. The weighted mean of y is 0, so that b is 0 for centred features.
    gram = x @ x.T
    penalty = ridge * gram.trace() / len(gram)
    weight = x.T @ torch.linalg.solve(gram + penalty.clamp(min=1e-12) * torch.eye(len(gram), dtype=gram.dtype), y)
    weight = weight / scale
    return weight, -(mean @ weight)


@torch.no_grad()
def hidden_states(
    model, processor, images: Sequence[Image.Image], question: str, *, progress: bool = True
) -> dict[tuple[str, str], torch.Tensor]:
    """What each layer makes of each image, asked a question.

    Images are shown one at a time: then the mean over a layer's tokens is the image's own, however the model packs the
    tiles and patches of several.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        processor (`ProcessorMixin`): Its processor.
        images (`list[PIL.Image.Image]`): n images.
        question (`str`): The question asked about each.
        progress (`bool`, defaults to `True`): Show a progress bar.

    Returns:
        `dict[tuple[str, str], torch.Tensor]`: `(n, d)` float32 by (layer, tokens), see [`LayerProbe`].
    """
    core = multimodal_core(model)
    vision, language = _blocks(core, VISION_PARTS), _blocks(core, LANGUAGE_PARTS)
    image_token = getattr(core.config, "image_token_id", None)
    collected: dict[tuple[str, str], list[torch.Tensor]] = {}
    inputs: dict = {}

    def keep(layer: str, tokens: str, states: torch.Tensor) -> None:
        collected.setdefault((layer, tokens), []).append(states.float().cpu())

    def see_vision(index):
        def hook(module, args, output):
            states = output[0] if isinstance(output, tuple) else output
            keep(f"vision.{index}", "image", states.reshape(-1, states.shape[-1]).mean(dim=0))

        return hook

    def see_language(index):
        def hook(module, args, output):
            states = output[0] if isinstance(output, tuple) else output
            states = states.reshape(-1, states.shape[-1])  # (length, d)
            shown = inputs["input_ids"].flatten() == image_token
            if image_token is not None and shown.any():
                keep(f"language.{index}", "image", states[shown].mean(dim=0))
            keep(f"language.{index}", "last", states[-1])

        return hook

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for index, block in enumerate(vision):
            stack.callback(block.register_forward_hook(see_vision(index)).remove)
        for index, block in enumerate(language):
            stack.callback(block.register_forward_hook(see_language(index)).remove)
        projected = stack.enter_context(tap_image_features(model))
        for image in track(images, "Reading hidden states", show=progress):
            batch = build_batch(processor, [question], images=[image])
            batch.pop("labels")
            inputs = to_device(batch, model)
            model(**inputs)
    states = {key: torch.stack(rows) for key, rows in collected.items()}
    states["projector", "image"] = torch.cat(projected).float().cpu()
    # From the image to the answer.
    order = {"vision": 0, "projector": 1, "language": 2}
    return {key: states[key] for key in sorted(states, key=lambda key: (order[key[0].split(".")[0]], key[1] == "last"))}


def _blocks(core: nn.Module, parts: Sequence[str]) -> list[nn.Module]:
    """The transformer blocks of a part of the model: its largest list of modules."""
    lists = [
        module
        for name, module in core.named_modules()
        if isinstance(module, nn.ModuleList) and name.split(".")[0] in parts
    ]
    size = {id(blocks): sum(weight.numel() for weight in blocks.parameters()) for blocks in lists}
    return list(max(lists, key=lambda blocks: size[id(blocks)])) if lists else []
