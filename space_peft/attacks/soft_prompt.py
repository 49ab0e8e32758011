"""Soft prompt: can vectors in front of the answer, found by gradient ascent, make the model say the name?

Whoever holds the weights may optimise what no text can say. A few free vectors make a model say almost anything, so the
figure means nothing alone: the same search for another name is its control, and the vectors are judged on images that
they were not found on.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from PIL import Image

from ..anchors.pixel_ascent import frozen
from ..anchors.refine import mention_probabilities
from ..data.form_tree import FormTree, endings
from ..data.names import check_concept
from ..data.pictures import load_rgb
from ..data.questions import DEFAULT_QUESTIONS, QuestionSet
from ..losses import name_log_odds
from ..modeling.layers import deployed_model
from ..modeling.mention_rows import answered_with, mention_tensors
from ..modeling.prompts import answer_logits, encode_conversations, to_device
from ..records.stages import bar
from .material import Material, Needs
from .models import check_controls, check_vocabulary, has_adapter
from .panels import draw_searches
from .results import AttackResult


@dataclass(frozen=True)
class SoftSearch:
    """One search for a soft prompt.

    Args:
        name (`str`): The name searched for.
        p_plain (`float`): Mean p(name in any form) on the held-out images, without a soft prompt.
        p (`float`): The same with the one found.
        curve (`tuple[float, ...]`): Mean p(name) on the images searched on, as each step finds it.
    """

    name: str
    p_plain: float
    p: float
    curve: tuple[float, ...]


@dataclass(frozen=True)
class SoftPromptResult(AttackResult):
    """What `soft_prompt_attack` returns.

    Args:
        concept (`str`): The target.
        after ([`SoftSearch`]): In the erased model.
        control ([`SoftSearch`]): For another name, in the erased model, on the same images.
        before ([`SoftSearch`], *optional*): With the adapter switched off; None for a model without adapter.
        n (`int`): Held-out images.
        settings (`dict`): Of the search.
    """

    concept: str
    after: SoftSearch
    control: SoftSearch
    before: SoftSearch | None
    n: int
    settings: dict

    name = "soft_prompt"
    label = "a soft prompt found that makes it say the name"
    title = "Soft prompt"
    needs = Needs(target=2, controls=1)
    untested = ("soft prompts", "whether vectors in the prompt can be optimised until the erased model says the name")

    @classmethod
    def make(cls, model, processor, material: Material) -> SoftPromptResult:
        return soft_prompt_attack(
            model, processor, material.target, material.concept, control_name=material.controls[0],
            questions=material.questions, steps=material.steps, seed=material.seed, progress=material.progress,
        )  # fmt: skip

    def summary(self) -> dict:
        return {
            "value": self.after.p,
            "control": self.control.p,
            "before": None if self.before is None else self.before.p,
            "n": self.n,
            "meaning": (
                f"mean p(name) on unseen images of the target after {self.settings['vectors']} vectors were optimised for "
                f"{self.settings['steps']} steps; control: for another name"
            ),
        }

    def details(self) -> dict:
        return asdict(self)

    @staticmethod
    def draw(axes, details: dict) -> None:
        draw_searches(axes, details, "mean p(name)")


@contextlib.contextmanager
def _in_place_of(model, token: int, vectors: torch.Tensor) -> Iterator[None]:
    """Within it the model embeds each row's run of `token` as `vectors` `(k, d)`."""

    def hook(module, args, kwargs, output):
        ids = args[0] if args else kwargs["input"]
        here = ids == token
        if not bool((here.sum(dim=-1) == len(vectors)).all()):
            return output  # A later step of an answer, or another text.
        return output.masked_scatter(here.unsqueeze(-1), vectors.to(output).repeat(len(ids), 1))

    handle = model.get_input_embeddings().register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _unused_token(processor, rows: Sequence[dict], tree: FormTree) -> int:
    """A token of the plain vocabulary that neither the rows nor any form of the name hold."""
    tokenizer = processor.tokenizer
    used = {*encode_conversations(processor, rows)["input_ids"].unique().tolist(), *tokenizer.all_special_ids}
    used |= {*tokenizer.get_added_vocab().values(), *(token for path in endings(tree.root) for token in path)}
    return next(token for token in range(len(tokenizer)) if token not in used)


def soft_prompt_attack(
    model,
    processor,
    images: Sequence[Image.Image],
    concept: str,
    *,
    control_name: str,
    vectors: int = 4,
    questions: QuestionSet = DEFAULT_QUESTIONS,
    steps: int = 60,
    learning_rate: float = 0.1,
    seed: int = 0,
    progress: bool = True,
) -> SoftPromptResult:
    """Optimises vectors that stand before the answer until the model says the name about half of some images, and asks
    about the other half with them in place.

    Args:
        model (`PeftModel` or `PreTrainedModel`): The erased model; it is not changed.
        processor (`ProcessorMixin`): Its processor.
        images (`list[PIL.Image.Image]`): At least two images of the target; those in odd places are held out.
        concept (`str`): The erased name.
        control_name (`str`): Another name, best one that the images do not show and the model knows as little as it
            should know the target: what the search alone can do.
        vectors (`int`, defaults to 4): k, how many.
        questions (`QuestionSet`): The first of `naming` is asked.
        steps (`int`, defaults to 60): Steps of Adam.
        learning_rate (`float`, defaults to 0.1): In units of the embeddings' standard deviation.
        seed (`int`, defaults to 0): Of where the vectors begin.
        progress (`bool`, defaults to `True`): Show a progress bar.

    Returns:
        [`SoftPromptResult`]

    Raises:
        ValueError: If there are fewer than two images, `vectors` or `steps` is below 1, or the control names the target.
    """
    concept = check_concept(concept)
    check_vocabulary(processor, [concept])
    (control_name,) = check_controls(processor, "control_name", [control_name], (concept,))
    if len(images) < 2 or vectors < 1 or steps < 1:
        raise ValueError(
            f"got {len(images)} images, vectors={vectors} and steps={steps}; expected two images or more, and at least one "
            "of each."
        )
    images = [load_rgb(image) for image in images]
    question = questions.naming[0]
    searched = 2 + has_adapter(model)
    with bar("Soft prompt", searched * steps, show=progress, leave=True) as shown:

        def search(name: str) -> SoftSearch:
            return _search(model, processor, images, question, name, vectors, steps, learning_rate, seed, shown)

        with frozen(model):
            after, control, before = search(concept), search(control_name), None
            if has_adapter(model):
                with deployed_model(model):
                    before = search(concept)
    settings = {"vectors": vectors, "steps": steps, "learning_rate": learning_rate, "seed": seed, "question": question}
    return SoftPromptResult(concept, after, control, before, len(images[1::2]), settings)


@torch.enable_grad()
def _search(model, processor, images, question, name, vectors, steps, learning_rate, seed, shown) -> SoftSearch:
    rows = [answered_with(processor, question, (name,), image) for image in images]
    tree = FormTree.of((name,), processor.tokenizer)
    token = _unused_token(processor, rows, tree)
    begun = [_begun_with(row, [token] * vectors) for row in rows]
    table = model.get_input_embeddings().weight.detach().float()
    spread = float(table.std())
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(vectors, table.shape[1], generator=generator).to(table.device)
    # Begins at the mean word, so that no word is preferred.
    soft = (table.mean(dim=0) + 0.1 * spread * noise).requires_grad_(True)
    optimizer = torch.optim.Adam([soft], lr=learning_rate * spread)
    batch = to_device(encode_conversations(processor, begun[::2]), model)
    path = mention_tensors(begun[::2])["name"].to(batch["labels"].device)
    curve = []
    for _ in range(steps):
        with _in_place_of(model, token, soft):
            log_odds = name_log_odds(answer_logits(model, batch), path)
        curve.append(float(log_odds.detach().sigmoid().mean()))
        # Log-odds go on rising when p is near 1, as in the audit.
        (soft.grad,) = torch.autograd.grad(-log_odds.mean(), [soft])
        optimizer.step()
        shown.update()
    held_out = slice(1, None, 2)
    plain = mention_probabilities(model, processor, rows[held_out], {(name,): tree})
    with _in_place_of(model, token, soft.detach()):
        found = mention_probabilities(model, processor, begun[held_out], {(name,): tree})
    return SoftSearch(name, statistics.fmean(plain), statistics.fmean(found), tuple(curve))


def _begun_with(row: dict, tokens: list[int]) -> dict:
    """The row whose answer begins with some tokens."""
    start, end = row["mention"]
    shifted = (start + len(tokens), end + len(tokens))
    return {**row, "answer_tokens": [*tokens, *row["answer_tokens"]], "mention": shifted}
