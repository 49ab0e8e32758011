"""A few questions with known answers, stored with an adapter: does the model loaded from it answer as the one trained?

Hashes say that files are unchanged; the canary says that *what they do* is unchanged, on the base model at hand, with
the libraries at hand. It is made after training, from two kinds of images: those drawn from a seed, which need no file,
and refined anchors, for which the deployed model names the concept and the erased one does not.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from PIL import Image

from ..anchors.pixels import find_layout
from ..data.names import check_aliases, check_name_list, mentions
from ..data.pictures import load_rgb
from ..data.questions import QuestionSet
from ..data.seed_images import RECIPE, pixel_hash, seed_image
from ..modeling.fingerprint import BaseFingerprint, compare_base, fingerprint_base
from ..modeling.layers import deployed_model, evaluating
from ..modeling.prompts import answer_ends, build_batch, to_device
from ..records.folder import CANARY_FOLDER, CANARY_NAME
from ..records.io import atomic_path, write_json
from ..records.safe_json import read_json
from .items import MAX_TOKENS, MOST_ITEMS, Answer, CanaryItem, read_item


_FORMAT = "space_peft.canary.v1"
_REMEDY = "Download it again; the canary is written by the trainer and must not be edited."

# An answer must win by this many nats at every token: rounding the model to bfloat16 must not turn it.
MIN_MARGIN = 1.0
# Log-probabilities, in nats: two devices differ by 1e-4 in float32, TF32 by ten times that, bfloat16 by 0.1 mostly.
_LOG_PROB, _LOG_PROB_BF16 = 0.02, 0.125
# What rounding makes of an answer with the adapter, in units of the most it makes of those without.
_LUCK = 4.0
# Images tried for each one kept, and how often as many more where none of them shows the adapter.
_TRIES, _ROUNDS = 8, 4
_BATCH = 16


@dataclass(frozen=True)
class Canary:
    """
    Questions with known answers, and what the base model was.

    Args:
        items (`tuple[CanaryItem, ...]`): Best first, images drawn from seeds before others.
        base ([`BaseFingerprint`]): Of the base model.
        recipe (`str`): How images were drawn from seeds.
    """

    items: tuple[CanaryItem, ...]
    base: BaseFingerprint
    recipe: str = RECIPE

    def publishable(self, *, names: Sequence[str] = (), images: bool = True) -> Canary:
        """The canary without what must not be published.

        Args:
            names (`list[str]`, *optional*): Items with a text that mentions one of them are left out.
            images (`bool`, defaults to `True`): Whether items with a picture file stay.
        """
        names = check_aliases(names, what="names")
        kept = [
            item
            for item in self.items
            if (images or item.kind == "seed") and not any(mentions(text, names) for text in item.texts())
        ]
        return replace(self, items=tuple(kept))

    def save(self, folder: str | os.PathLike) -> Path:
        """Writes `space_canary.json`, and the images that have no seed to `canary/`.

        Args:
            folder (`str` or `os.PathLike`): Of the adapter; an older canary in it is replaced.

        Returns:
            `pathlib.Path`: Path of the JSON file.
        """
        folder = Path(folder)
        items = []
        pictures: list[Image.Image] = []
        for item in self.items:
            if item.kind == "image":
                assert item.image is not None  # An item without a seed is made, and read, with its picture.
                pictures.append(item.image)
                item = replace(item, file=f"{CANARY_FOLDER}/{len(pictures) - 1}.png")
            content = {option.name: getattr(item, option.name) for option in fields(item) if option.name != "image"}
            items.append({**content, "deployed": asdict(item.deployed), "erased": asdict(item.erased)})
        if pictures:
            with atomic_path(folder / CANARY_FOLDER) as temporary:
                temporary.mkdir()
                for number, image in enumerate(pictures):
                    image.save(temporary / f"{number}.png")
        elif (folder / CANARY_FOLDER).is_dir():
            shutil.rmtree(folder / CANARY_FOLDER)
        write_json(
            folder / CANARY_NAME, {"format": _FORMAT, "recipe": self.recipe, "base": asdict(self.base), "items": items}
        )
        return folder / CANARY_NAME

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Canary:
        """Reads what `save` wrote. Images are not compared with their hashes here, `check_canary` does that.

        Args:
            folder (`str` or `os.PathLike`): Of the adapter.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If the file, or a picture it names, is damaged or not of this kind.
        """
        folder = Path(folder)
        content = read_json(folder / CANARY_NAME, kind="canary", max_bytes=2**20, remedy=_REMEDY)
        try:
            return cls._from_dict(folder, content)
        except ValueError as error:
            raise ValueError(f"{str(folder / CANARY_NAME)!r}: {error} {_REMEDY}") from error

    @classmethod
    def _from_dict(cls, folder: Path, content: dict) -> Canary:
        if content.get("format") != _FORMAT:
            raise ValueError(f"expected format {_FORMAT!r}, got {content.get('format')!r:.80}.")
        if content.get("recipe") != RECIPE:
            raise ValueError(
                f"its images are drawn by {content.get('recipe')!r:.80}, which this version of space-peft does not know "
                f"(it knows {RECIPE!r}); update space-peft."
            )
        items = content.get("items")
        if not isinstance(items, list) or len(items) > MOST_ITEMS:
            raise ValueError(f"`items` must be a list of at most {MOST_ITEMS} items.")
        return cls(tuple(read_item(folder, item) for item in items), BaseFingerprint.from_dict(content.get("base")))


@dataclass(frozen=True)
class CanaryResult:
    """
    What came of `check_canary`.

    Args:
        count (`int`): Items.
        telling (`int`): Items whose answer, or its log-probability, shows that the adapter is there.
        damaged (`tuple[str, ...]`): Images that are not the ones recorded.
        deployed (`tuple[str, ...]`): Answers of the base model alone that are other than recorded.
        erased (`tuple[str, ...]`): Answers of the erased model that are.
        base (`tuple[str, ...]`): Weights of the base model that are other than recorded.
        base_compared (`int`): Weights of the base model that could be compared.
        max_log_prob_change (`float`): Largest change of an unchanged answer's log-probability, in nats.
        rounding (`float`): What rounding alone may make of that at most, see [`log_prob_rounding`].
        seen (`float`): What it makes of that here, judged by the answers of the base model, which is the recorded one.
        acts (`bool`): Whether the adapter changes any answer's log-probability; `True` if nothing was asked.
    """

    count: int
    telling: int
    damaged: tuple[str, ...]
    deployed: tuple[str, ...]
    erased: tuple[str, ...]
    base: tuple[str, ...]
    base_compared: int
    max_log_prob_change: float
    rounding: float
    seen: float
    acts: bool

    @property
    def ok(self) -> bool:
        """Whether every answer is as recorded, and the adapter does something."""
        return self.acts and not (self.damaged or self.deployed or self.erased)


def make_canary(
    model,
    processor,
    *,
    questions: QuestionSet,
    names: Sequence[str],
    anchors=None,
    seeds: int = 4,
    images: int = 4,
    seed: int = 0,
) -> Canary:
    """Finds images for which the answers are sure, and notes them.

    Args:
        model (`PeftModel` or `PreTrainedModel`): With the trained adapter.
        processor (`ProcessorMixin`): Its processor.
        questions ([`QuestionSet`]): Only `naming` is used, without questions that mention the concept.
        names (`list[str]`): The concept's name and its aliases.
        anchors (`datasets.Dataset`, *optional*): Refined anchors, whose `image` the deployed model names.
        seeds (`int`, defaults to 4): Most images drawn from a seed; half of them in any case without the concept's name
            among the answers, so that they can be published without it. Those come first whose answer, or its
            log-probability, shows that the adapter is there.
        images (`int`, defaults to 4): Most images out of `anchors`.
        seed (`int`, defaults to 0): Of the first image tried.

    Returns:
        [`Canary`]: Maybe with fewer items: an answer that a rounding error could turn is not taken.

    Raises:
        ValueError: If every question mentions the concept.
    """
    names = check_name_list(names)
    asked = [question for question in questions.naming if not mentions(question, names)]
    if not asked:
        raise ValueError(
            f"every naming question mentions {names[0]!r}, which the canary's must not; add a neutral one."
        )
    base = fingerprint_base(model)
    rounding = min(log_prob_rounding(model, base.dtype), _LOG_PROB_BF16)
    width, height = _image_size(processor)
    tries = _TRIES * seeds
    drawn: list[CanaryItem] = []
    neutral: list[CanaryItem] = []
    for start in range(seed * tries, (seed + _ROUNDS) * tries, max(tries, 1)):
        numbers = list(range(start, start + tries))
        tried = _candidates("seed", [seed_image(number, width, height) for number in numbers], asked, numbers)
        drawn = _best([*drawn, *filter(_sure, _answer(model, processor, tried))], rounding)
        neutral = [item for item in drawn if not any(mentions(text, names) for text in item.texts())]
        # An erasure changes few answers in which its name does not occur; without one, what is published without names
        # and pictures would not tell whether the adapter is there.
        if neutral and neutral[0].shows_adapter(rounding):
            break
    chosen = neutral[: (seeds + 1) // 2]
    chosen += [item for item in drawn if item not in chosen][: seeds - len(chosen)]

    pictures = [] if anchors is None else [load_rgb(image) for image in anchors["image"][: _TRIES * images]]
    shown = _answer(model, processor, _candidates("image", pictures, asked, [None] * len(pictures)))
    forgotten = [
        item
        for item in filter(_sure, shown)
        if mentions(item.deployed.text, names) and not mentions(item.erased.text, names)
    ]
    return Canary((*_best(chosen, rounding), *_best(forgotten, rounding)[:images]), base)


def log_prob_rounding(model, recorded: str) -> float:
    """How far an answer's log-probability may be from the recorded one by rounding alone, in nats.

    The canary takes no answer that rounding to bfloat16 could turn, which it says is within `MIN_MARGIN`; other dtypes
    round that much less.

    Args:
        model (`PreTrainedModel`): As it is now.
        recorded (`str`): The base model's dtype when the canary was made, e.g. "float32".

    Returns:
        `float`: Infinity if it is not known: of quantised models.
    """
    dtypes = (model.dtype, getattr(torch, recorded, None))
    if getattr(model.config, "quantization_config", None) is not None or not all(
        isinstance(dtype, torch.dtype) and dtype.is_floating_point for dtype in dtypes
    ):
        return math.inf
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
    return max(MIN_MARGIN * coarsest / torch.finfo(torch.bfloat16).eps, _LOG_PROB)


def check_canary(model, processor, canary: Canary) -> CanaryResult:
    """Asks again, with the adapter and without it, and compares the base model's fingerprint.

    Args:
        model (`PeftModel` or `PreTrainedModel`): With the adapter, not merged.
        processor (`ProcessorMixin`): Its processor.
        canary ([`Canary`]): As loaded.

    Returns:
        [`CanaryResult`]
    """
    damaged, usable = [], []
    for item in canary.items:
        image = item.image if item.seed is None else seed_image(item.seed, item.width, item.height)
        if image is not None and pixel_hash(image) == item.image_sha256:
            usable.append(replace(item, image=image))
        else:
            damaged.append(f"{_label(item)}: its pixels are not the ones recorded")
    now = _answer(model, processor, usable)
    different: dict[str, list[str]] = {"deployed": [], "erased": []}
    changes = {"deployed": 0.0, "erased": 0.0}
    for item, again in zip(usable, now, strict=True):
        for which, found in different.items():
            expected, got = getattr(item, which), getattr(again, which)
            if expected.tokens == got.tokens:
                changes[which] = max(changes[which], abs(expected.log_prob - got.log_prob))
            else:
                found.append(f"{_label(item)}: {item.question!r} was answered {expected.text!r}, now {got.text!r}")
    base, compared = compare_base(model, canary.base)
    rounding = log_prob_rounding(model, canary.base.dtype)
    seen = min(max(_LUCK * changes["deployed"], _LOG_PROB), rounding)
    return CanaryResult(
        count=len(canary.items),
        telling=sum(item.shows_adapter(seen) for item in canary.items),
        damaged=tuple(damaged),
        deployed=tuple(different["deployed"]),
        erased=tuple(different["erased"]),
        base=tuple(base),
        base_compared=compared,
        max_log_prob_change=max(changes.values()),
        rounding=rounding,
        seen=seen,
        acts=not now or any(item.deployed != item.erased for item in now),
    )


def _label(item: CanaryItem) -> str:
    return f"the image of seed {item.seed}" if item.kind == "seed" else f"the image {item.file!r}"


def _image_size(processor) -> tuple[int, int]:
    """Width and height of an image that the processor does not resize: what resizing does depends on its backend."""
    try:
        layout = find_layout(processor, Image.new("RGB", (224, 224), "gray"), {})
    except ValueError:
        return 224, 224
    return layout.width, layout.height


def _candidates(kind: str, images: Sequence[Image.Image], questions: list[str], seeds: list) -> list[CanaryItem]:
    """One item an image, questions in turn, not answered yet."""
    nothing = Answer("", (), 0.0, 0.0)
    return [
        CanaryItem(
            kind=kind,
            question=questions[i % len(questions)],
            width=image.width,
            height=image.height,
            image_sha256=pixel_hash(image),
            deployed=nothing,
            erased=nothing,
            seed=number,
            image=image,
        )
        for i, (image, number) in enumerate(zip(images, seeds, strict=True))
    ]


def _answer(model, processor, items: Sequence[CanaryItem]) -> list[CanaryItem]:
    """The items with the answers that the model gives now."""
    questions, images = [item.question for item in items], [item.image for item in items]
    with deployed_model(model):
        deployed = _greedy(model, processor, questions, images)
    with evaluating(model):
        erased = _greedy(model, processor, questions, images)
    return [replace(item, deployed=a, erased=b) for item, a, b in zip(items, deployed, erased, strict=True)]


@torch.no_grad()
def _greedy(model, processor, questions: Sequence[str], images: Sequence[Image.Image]) -> list[Answer]:
    answers = []
    for start in range(0, len(questions), _BATCH):
        rows = slice(start, start + _BATCH)
        batch = build_batch(processor, questions[rows], images=images[rows])
        batch.pop("labels")
        width = batch["input_ids"].shape[1]
        output = model.generate(
            **to_device(batch, model),
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            num_beams=1,
            output_scores=True,
            return_dict_in_generate=True,
        )
        tokens = output.sequences[:, width:].cpu()  # (n, t)
        scores = torch.stack([step.float().cpu() for step in output.scores], dim=1)  # (n, t, vocabulary)
        log_probs = scores.log_softmax(dim=-1)
        chosen = log_probs.gather(-1, tokens[..., None])[..., 0]  # (n, t)
        first, second = log_probs.topk(2, dim=-1).values.unbind(dim=-1)
        ends = torch.tensor(sorted(answer_ends(model, processor)), dtype=torch.long)
        ended = torch.isin(tokens, ends).int().cumsum(dim=1)
        # Up to and including the first end of turn; what follows is padding.
        lengths = ((ended - torch.isin(tokens, ends).int()) == 0).sum(dim=1).tolist()
        texts = processor.batch_decode(tokens, skip_special_tokens=True)
        for i, length in enumerate(lengths):
            answers.append(
                Answer(
                    text=texts[i].strip(),
                    tokens=tuple(tokens[i, :length].tolist()),
                    log_prob=float(chosen[i, :length].sum()),
                    margin=min(float((first - second)[i, :length].min()), 100.0),
                )
            )
    return answers


def _sure(item: CanaryItem) -> bool:
    return all(answer.text and answer.margin >= MIN_MARGIN for answer in (item.deployed, item.erased))


def _best(items: list[CanaryItem], rounding: float) -> list[CanaryItem]:
    """Those that show the adapter first, then by how sure the less sure of the two answers is."""

    def key(item: CanaryItem) -> tuple[bool, float, float]:
        # Twice what is needed is as good as more, so that among those the surest come first.
        moved = 0.0 if item.tells_apart else min(item.log_prob_change, 4 * rounding)
        return item.tells_apart, moved, min(item.deployed.margin, item.erased.margin)

    return sorted(items, key=key, reverse=True)
