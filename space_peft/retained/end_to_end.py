"""What an erasure does to whole answers on retained images and texts that it was not fitted to, and what that proves.

A certificate's bounds hold layer by layer, at the deployed model's inputs. What a user asks is another thing: how many
answers are other ones than before. That is counted here, on images and texts drawn like those it is claimed for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from datasets import Dataset

from ..data.names import mentions
from ..distributed import processes
from ..losses import answer_labels
from ..modeling.layers import deployed_model
from ..modeling.prompts import IGNORE_INDEX, answer_logits, encode_conversations, generate_tokens, to_device
from ..records.stages import track
from ..statistics.intervals import CONFIDENCE, MOST_TRIALS, bernstein_bound, exact_upper_bound
from .held_out import content_keys
from .reading import RetainedRows


# Nats a token: an answer that became e times as unlikely at every token is another answer.
CLIP = 1.0
# Images and texts asked about at most, where there are more: none changed of these bounds the share by 0.6 %.
MOST_ITEMS = 512
MAX_NEW_TOKENS = 24
_BATCH = 32


@dataclass(frozen=True)
class EndToEnd:
    """
    How many answers an erasure changes, on held-out images and texts, each of which was asked one thing.

    Its bounds hold with a confidence of 95 % each for images and texts that are *exchangeable* with these: drawn from
    where these were drawn, in the same proportion, asked the same kinds of questions. They do not hold for others, nor if
    these rows had a say in the training (a checkpoint or a setting chosen by `evaluate`, whose default rows they are).

    Args:
        images (`int`): Distinct images asked about.
        texts (`int`): Distinct prompts without an image asked.
        changed (`int`): Greedy answers that are another text than the deployed model's.
        log_prob_change (`float`): Mean over the answers of `|log p(y) - log p_0(y)|` a token, clipped to [0, 1] nats: `y`
            is the deployed model's own greedy answer (up to a special token, if it writes one), `p_0` its probability
            there, `p` that in the erased model.
        log_prob_variance (`float`): Sample variance (by `n - 1`) of these; 0 for a single answer.
        max_new_tokens (`int`): Longest answer, in tokens: a change behind them was not seen.
        left_out (`int`, defaults to 0): Images not counted, because the deployed model names the concept in its answer about
            them: rightly or not, that answer is to change.
    """

    images: int
    texts: int
    changed: int
    log_prob_change: float
    log_prob_variance: float
    max_new_tokens: int
    left_out: int = 0

    def __post_init__(self):
        counts = (self.images, self.texts, self.changed, self.max_new_tokens, self.left_out)
        if min(counts) < 0 or not self.changed <= self.n <= MOST_TRIALS or self.n < 1:
            raise ValueError(f"an end-to-end statement is of at least one answer, got the counts {counts}.")
        mean, variance = self.log_prob_change, self.log_prob_variance
        # The largest variance there is: that of values at both ends.
        if not 0 <= mean <= CLIP or not 0 <= variance <= mean * (CLIP - mean) * self.n / max(self.n - 1, 1) + 1e-9:
            raise ValueError(f"{self.n} values from 0 to {CLIP} have no mean {mean!r} with a variance {variance!r}.")

    @property
    def n(self) -> int:
        """Number of answers."""
        return self.images + self.texts

    @property
    def share(self) -> float:
        """Share of answers changed."""
        return self.changed / self.n

    @property
    def share_bound(self) -> float:
        """Clopper and Pearson's upper bound on the share of answers that change, see [`exact_upper_bound`].

        It holds as well where the numbers of images and of texts are fixed: a sum of draws of unequal chances has lighter
        tails than one of equal chances (W. Hoeffding, Annals of Mathematical Statistics 27, 1956, theorem 4).
        """
        return exact_upper_bound(self.changed, self.n, CONFIDENCE)

    @property
    def log_prob_bound(self) -> float | None:
        """Maurer and Pontil's upper bound on the mean change, see [`bernstein_bound`]; `None` for a single answer."""
        return bernstein_bound(self.log_prob_change, self.log_prob_variance, self.n, 0.0, CLIP, CONFIDENCE)

    def to_dict(self) -> dict:
        """Plain values, with the bounds rounded up."""
        bound = self.log_prob_bound
        bounds = {"share_bound": _up(self.share_bound), "log_prob_bound": None if bound is None else _up(bound)}
        return {**asdict(self), **bounds}

    def check_bounds(self, content: dict) -> None:
        """Refuses bounds that are said to follow from these counts and do not.

        Raises:
            ValueError: If a bound is another, by more than rounding.
        """
        for key, wanted in self.to_dict().items():
            said = content.get(key)
            if key.endswith("_bound") and (
                (said is None) != (wanted is None)
                or wanted is not None
                and (isinstance(said, bool) or not isinstance(said, (int, float)) or not abs(said - wanted) <= 2e-6)
            ):
                raise ValueError(f"`end_to_end.{key}` is {said!r:.40}, but follows from the counts as {wanted}.")


def _up(value: float) -> float:
    return math.ceil(value * 1e6) / 1e6


def one_row_each(retained: RetainedRows, rows: Iterable[int], seed: int, most: int | None = MOST_ITEMS) -> list[int]:
    """One row of each distinct image and text, drawn by chance: answers about one image are not independent.

    Args:
        retained ([`RetainedRows`]): The data.
        rows (iterable of `int`): Which of its rows there are.
        seed (`int`): Of the choice.
        most (`int`, *optional*): How many are drawn at most.

    Returns:
        `list[int]`: Rows, in ascending order.
    """
    rows = list(rows)
    keys = content_keys(retained, rows)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen: dict[tuple[str, str], int] = {}
    for place in order:
        chosen.setdefault(keys[place], rows[place])
    groups = list(chosen.values())
    if most is not None and len(groups) > most:
        # Not the first: groups of many rows come early in the order.
        again = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed + 1))[:most]
        groups = [groups[place] for place in again.tolist()]
    return sorted(groups)


class AnswerComparison:
    """The deployed model's greedy answers to some rows, asked once, to compare those of one or more adapters with.

    Args:
        model (`PeftModel`): With the adapter.
        processor (`ProcessorMixin`): Its processor.
        retained ([`RetainedRows`]): The data.
        rows (`list[int]`): Rows asked, one of each image or text: see [`one_row_each`].
        max_new_tokens (`int`): Longest answer, in tokens.
        names (`list[str]`, *optional*): Of the erased concept: images that the deployed model answers about with one of
            them are left out. That depends on no adapter, so those that stay are exchangeable among each other.
        progress (`bool`, defaults to `False`): Whether to show progress bars.
    """

    def __init__(
        self,
        model,
        processor,
        retained: RetainedRows,
        rows: Sequence[int],
        max_new_tokens: int = MAX_NEW_TOKENS,
        names: Sequence[str] = (),
        progress: bool = False,
    ):
        self.model, self.processor, self.retained = model, processor, retained
        self.max_new_tokens, self.progress = max_new_tokens, progress
        shown = retained.has_image()
        # The rows' own answers say about how long the model's are going to be.
        self.rows = retained.length_order(rows)
        with deployed_model(model) as deployed:
            self._answers = self._ask(deployed, "Asking the original model")
            texts = self._texts(self._answers)
            kept = [i for i, row in enumerate(self.rows) if not (shown[row] and mentions(texts[i], names))]
            self.left_out = len(self.rows) - len(kept)
            self.rows, self._answers = [self.rows[i] for i in kept], [self._answers[i] for i in kept]
            self.images = sum(shown[row] for row in self.rows)
            # Without what a model may write, but a prompt must not hold: tokens that stand for images.
            special = {*processor.tokenizer.all_special_ids, getattr(processor, "image_token_id", None)}
            self._scored = [list(itertools.takewhile(lambda t: t not in special, answer)) for answer in self._answers]
            self._log_probs = self._score(deployed)

    def changed(self) -> list[bool]:
        """Of each row, whether the adapter as it is now changes the greedy answer."""
        with deployed_model(self.model, adapted=True) as erased:
            texts, before = self._texts(self._ask(erased, "Asking the erased model")), self._texts(self._answers)
        return [one != other for one, other in zip(texts, before, strict=True)]

    def log_prob_changes(self) -> list[float]:
        """Of each row, by how many nats a token the log-probability of the deployed model's answer changes, clipped."""
        with deployed_model(self.model, adapted=True) as erased:
            after = self._score(erased)
        pairs = zip(after, self._log_probs, self._scored, strict=True)
        return [min(abs(one - other) / max(len(answer), 1), CLIP) for one, other, answer in pairs]

    def _batches(self) -> Iterable[tuple[int, list[dict]]]:
        for start in range(0, len(self.rows), _BATCH):
            own = (self.retained[row] for row in self.rows[start : start + _BATCH])
            yield start, [{"prompt": row["prompt"], "completion": [], "images": row["images"]} for row in own]

    def _ask(self, model, what: str) -> list[list[int]]:
        options = {"batch_size": _BATCH, "max_new_tokens": self.max_new_tokens}
        batches = track(self._batches(), what, total=-(-len(self.rows) // _BATCH), show=self.progress)
        return [answer for _, rows in batches for answer in generate_tokens(model, self.processor, rows, **options)]

    def _texts(self, answers: list[list[int]]) -> list[str]:
        return [text.strip() for text in self.processor.batch_decode(answers, skip_special_tokens=True)]

    def _score(self, model) -> list[float]:
        """`log p` of the deployed model's answers, up to a special token; 0 of an empty one."""
        scores = []
        for start, rows in self._batches():
            answers = self._scored[start : start + len(rows)]
            rows = [{**row, "answer_tokens": answer} for row, answer in zip(rows, answers, strict=True)]
            if not any(answers):
                scores += [0.0] * len(rows)
                continue
            batch = to_device(encode_conversations(self.processor, rows), model)
            targets = answer_labels(batch["labels"])
            logits = answer_logits(model, batch)[:, :-1].float()
            said = targets != IGNORE_INDEX
            picked = logits.log_softmax(-1).gather(-1, targets.clamp_min(0)[..., None])[..., 0]
            scores += picked.masked_fill(~said, 0.0).double().sum(dim=1).tolist()
        return scores


def measure_end_to_end(
    model,
    processor,
    retained: RetainedRows | Dataset | Sequence[dict],
    rows: Iterable[int] | None = None,
    *,
    seed: int = 0,
    most: int | None = MOST_ITEMS,
    max_new_tokens: int = MAX_NEW_TOKENS,
    names: Sequence[str] = (),
    progress: bool = False,
) -> EndToEnd | None:
    """Asks the deployed model and the erased one about held-out images and texts, and counts other answers.

    Args:
        model (`PeftModel`): With the trained adapter, not merged.
        processor (`ProcessorMixin`): Its processor.
        retained ([`~datasets.Dataset`] or `list[dict]`): Rows in the formats of `retain_dataset`; their answers are not used,
            only what they ask.
        rows (iterable of `int`, *optional*): Which of them: none that the adapter was fitted to or trained on, and none
            that shares an image or a text with such a row. All by default.
        seed (`int`, defaults to 0): Of the row that is asked of each image and text.
        most (`int`, *optional*, defaults to 512): Images and texts asked about at most.
        max_new_tokens (`int`, defaults to 24): Longest answer, in tokens.
        names (`list[str]`, *optional*): Of the erased concept: images in whose answer the deployed model says one of them
            are left out, for that answer is to change.
        progress (`bool`, defaults to `False`): Whether to show progress bars.

    Returns:
        [`EndToEnd`]: Of one question about each image and text; `None` without any.
    """
    retained = retained if isinstance(retained, RetainedRows) else RetainedRows(retained)
    chosen = one_row_each(retained, range(len(retained)) if rows is None else rows, seed, most)
    comparison = AnswerComparison(model, processor, retained, chosen, max_new_tokens, names, progress)
    if not comparison.rows:
        return None
    found = comparison.changed(), comparison.log_prob_changes(), comparison.images, comparison.left_out
    processes.reshard(model)
    # All processes ask the same; rank 0 decides where rounding made them differ.
    changed, values, images, left_out = processes.gather_objects(found)[0]
    mean = math.fsum(values) / len(values)
    return EndToEnd(
        images=images,
        texts=len(values) - images,
        changed=sum(changed),
        log_prob_change=mean,
        log_prob_variance=math.fsum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1),
        max_new_tokens=max_new_tokens,
        left_out=left_out,
    )
