"""The deployed model's answers, computed once: what a step compares with does not change while the adapter learns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from space_peft.distributed import processes
from space_peft.distributed.processes import with_batches
from space_peft.losses import answer_labels, keep_loss
from space_peft.modeling.features import attends_to_images, multimodal_core
from space_peft.modeling.layers import base_model, deployed_model
from space_peft.modeling.prompts import (
    IGNORE_INDEX,
    answer_columns,
    answer_logits,
    length_order,
    takes_logits_to_keep,
    to_device,
)

from .pairs import forget_loader
from .parts import TrainerPart


class DeployedAnswers:
    """
    Keeps, for rows seen once, the hidden states from which the output layer makes the logits of their answers.

    Those are exact and small (a row's answer is a few vectors of length d, where its logits are as many of the
    vocabulary's), and need no pass of their own: the states of rows to forget are a by-product of finding their branches,
    those of retained rows of fitting the null space.

    Args:
        model (`PeftModel`): The adapted model; its output layer is used with adapters off.

    Attributes:
        faithful (`bool`): Whether the logits made of what was kept are the model's own. They are not where a model scales
            or caps what its output layer puts out.
    """

    def __init__(self, model):
        self._model = model
        self._head = base_model(model).get_output_embeddings()
        self._states: dict[tuple[str, int], torch.Tensor] = {}  # (kind, row) -> (answer tokens, d), on the CPU
        self._retained: tuple[DataLoader, set[int]] | None = None
        self.faithful = True

    def of_forget(self, rows: Sequence[int]) -> AnswerObserver:
        """Keeps the answers of a `forget_loader`'s rows, for who puts its batches through the deployed model.

        Args:
            rows (`list[int]`): What its rows are called, in order.
        """
        return AnswerObserver(self, "forget", rows, check=True)

    def of_retained(self, loader: DataLoader, wanted: Collection[int]) -> AnswerObserver:
        """Keeps the answers of the `wanted` rows, for who fits the null space.

        Args:
            loader (`DataLoader`): From `retained_loader`.
            wanted (collection of `int`): Retained rows that training is going to use.
        """
        wanted = set(wanted)
        self._retained = (loader, wanted)
        return AnswerObserver(self, "retain", _only(loader.dataset.indices, wanted))

    def complete_retained(self) -> None:
        """Puts those batches through the model in which `wanted` rows are that nobody has put through it.

        In the batches that fitting uses, so that a resumed run, which fits nothing, computes what the first one did.
        """
        if self._retained is None:
            return
        loader, wanted = self._retained
        missing = {row for row in wanted if ("retain", row) not in self._states}
        if not missing:
            return
        rows = loader.dataset.indices
        starts = range(0, len(rows), loader.batch_size)
        every = [list(range(start, min(start + loader.batch_size, len(rows)))) for start in starts]
        batches = [places for places in every if missing & {rows[place] for place in places}]
        part = with_batches(loader, batches)
        shown = _only([rows[place] for places in batches for place in places], wanted)
        self.observe(part, AnswerObserver(self, "retain", shown))

    def observe(self, batches: Iterable[Mapping], observer: AnswerObserver) -> None:
        """Puts batches of which the answers are to be kept through the deployed model.

        Args:
            batches (iterable of `dict[str, torch.Tensor]`): From the loader that the observer is of.
            observer ([`AnswerObserver`]): From `of_forget` or `of_retained`.
        """
        with deployed_model(self._model) as deployed, observer:
            for batch in batches:
                answer_logits(deployed, to_device(observer.before(batch), deployed))
                observer.after()

    def logits(self, kind: str, rows: Sequence[int], columns: int) -> torch.Tensor | None:
        """The deployed model's logits of rows' answers, aligned as `answer_logits` aligns them.

        Args:
            kind (`str`): "forget" or "retain": which numbering `rows` is of.
            rows (`list[int]`): Which rows.
            columns (`int`): `answer_columns` of the batch they are in.

        Returns:
            `torch.Tensor`: `(n, columns, vocabulary)`, without meaning after the end of an answer; `None` if one of the
            rows was not kept.
        """
        kept = [self._states[kind, row] for row in rows if (kind, row) in self._states]
        if not kept or len(kept) < len(rows):
            return None
        hidden = kept[0].new_zeros(len(kept), columns, kept[0].shape[-1])
        for row, states in enumerate(kept):
            hidden[row, : len(states)] = states
        adapted = isinstance(self._head, LoraLayer)
        device = next(self._model.parameters()).device
        if device.type == "cuda":  # From pageable memory the host would wait for the copy, and all before it.
            hidden = hidden.pin_memory()
        with torch.no_grad(), deployed_model(self._model) if adapted else contextlib.nullcontext():
            return self._head(hidden.to(device, non_blocking=True))

    def _keep(self, kind: str, rows: Sequence[int | None], labels: torch.Tensor, hidden: torch.Tensor) -> None:
        hidden = hidden[:, -answer_columns(labels) :]
        lengths = (answer_labels(labels) != IGNORE_INDEX).sum(dim=1).tolist()
        for row, states, length in zip(rows, hidden, lengths, strict=True):
            if row is not None:
                self._states[kind, row] = states[:length].to("cpu", copy=True)


class DeployedAnswersMixin(TrainerPart):
    """How an erasure trainer gets at the deployed model's answers: `self.deployed_answers`, or a forward pass."""

    def _new_deployed_answers(self) -> DeployedAnswers | None:
        """None are kept yet; `None` where none can be."""
        if not self._compares_with_deployed or self.args.world_size > 1:
            return None  # A process fits on other rows than those it trains on.
        if attends_to_images(multimodal_core(self.model)):
            return None  # Rows without images answer otherwise beside rows that have one.
        return DeployedAnswers(self.accelerator.unwrap_model(self.model))

    def _keep_deployed_answers(self) -> AnswerObserver | None:
        """Looks at the rows to forget that nobody has looked at yet.

        Returns:
            [`AnswerObserver`], *optional*: Who is to look at the retained ones while the null space is fitted.
        """
        answers, data = self.deployed_answers, self.train_dataset
        if answers is None:
            return None
        # A resumed run in the batches of the one that found the rows: beside others they would be rounded otherwise.
        for start, end in self.forget.found_while_training():
            rows = data.rows[start:end]
            order = length_order(self.processing_class, rows)
            loader = forget_loader(self.processing_class, rows, self.args.fit_batch_size, order)
            with self.accelerator.autocast():  # As it was when they were found.
                answers.observe(loader, answers.of_forget([start + row for row in order]))
        if not answers.faithful:
            self.deployed_answers = None
        elif self.null_space is not None and self.keep_model is None:
            return answers.of_retained(self.fit_loader, data.retained_rows())
        return None

    def _deployed_logits(self, kind: str, batch: dict, rows: Sequence[int], columns: int | None = None) -> torch.Tensor:
        """What the unadapted model answers to a batch: from what was kept of it, or from a forward pass.

        Retained rows are asked of the `keep_model`, if there is one. `columns` is `answer_columns` where it is known.
        """
        columns = answer_columns(batch["labels"]) if columns is None else columns
        if kind == "retain" and self.keep_model is not None:
            with torch.no_grad():
                return answer_logits(self.keep_model, batch, columns)
        kept = self.deployed_answers and self.deployed_answers.logits(kind, rows, columns)
        if kept is not None:
            return kept
        with deployed_model(self.accelerator.unwrap_model(self.model)) as deployed:
            return answer_logits(deployed, batch, columns)

    def _keep_loss(self, model, inputs: dict) -> torch.Tensor:
        """L_keep of a batch's retained rows, weighted for a mean over the tokens of all processes."""
        columns = inputs["retain_columns"]
        base = self._deployed_logits("retain", inputs["retain"], inputs["retain_rows"], columns)
        logits = answer_logits(model, inputs["retain"], columns)
        targets = answer_labels(inputs["retain"]["labels"], columns)
        return processes.mean_weight((targets != IGNORE_INDEX).sum()) * keep_loss(logits, base, targets)


class DeployedAnswersCallback(TrainerCallback):
    """Keeps the answers of retained rows that no fitting has shown: a resumed run takes its null spaces from a file.

    Args:
        answers (`Callable`): Returns the [`DeployedAnswers`] of the run, or `None`.
    """

    def __init__(self, answers: Callable[[], DeployedAnswers | None]):
        self._answers = answers

    def on_train_begin(self, args, state, control, **kwargs):
        answers = self._answers()
        if answers is not None:
            answers.complete_retained()


def _only(rows: Iterable[int], wanted: Collection[int]) -> list[int | None]:
    return [row if row in wanted else None for row in rows]


class AnswerObserver:
    """
    Keeps what the output layer is given for the answers of rows; a [`~space_peft.modeling.batch_observer.BatchObserver`].

    Args:
        answers ([`DeployedAnswers`]): Where it is kept.
        kind (`str`): "forget" or "retain".
        rows (`list[int or None]`): What the rows of all batches are called, in order; `None` for those that nobody wants.
        check (`bool`, defaults to `False`): Whether to compare what the model makes of its output layer's output with that.
    """

    def __init__(self, answers: DeployedAnswers, kind: str, rows: Sequence[int | None], check: bool = False):
        self._answers, self._kind, self._rows, self._check = answers, kind, list(rows), check

    def skip(self, rows: int) -> None:
        """So many rows of another loader are seen before its own."""
        self._rows[:0] = [None] * rows

    def __enter__(self) -> AnswerObserver:
        self._next = 0
        self._heard: list[torch.Tensor] = []  # What went into the output layer last, and what came out.
        model = self._answers._model
        self._few_logits = takes_logits_to_keep(model)
        self._handles = [self._answers._head.register_forward_hook(self._listen)]
        if self._check:
            self._handles.append(model.register_forward_hook(self._compare))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._heard.clear()

    def _listen(self, module, args, output) -> None:
        self._heard[:] = [args[0].detach(), output.detach()]

    def _compare(self, module, args, output) -> None:
        made, logits = self._heard[1], output.logits
        alike = torch.allclose(made[:, -logits.shape[1] :].to(logits), logits, rtol=1e-5, atol=1e-5)
        self._answers.faithful = self._answers.faithful and alike

    def before(self, batch: Mapping) -> dict:
        self._labels = batch["labels"]
        self._own = self._rows[self._next : self._next + len(self._labels)]
        self._next += len(self._labels)
        self._heard.clear()
        return {**batch, "logits_to_keep": answer_columns(self._labels)} if self._few_logits else dict(batch)

    def after(self) -> None:
        if self._heard:
            self._answers._keep(self._kind, self._own, self._labels, self._heard[0])
            self._heard.clear()  # Logits are large.


@torch.no_grad()
def compare_with_deployed(model, loader: Iterable[dict], keep_model=None) -> dict[str, float]:
    """How far an adapted model's answers are from the deployed one's.

    Args:
        model (`PeftModel`): The adapted model, as it shall be asked (evaluation mode is the caller's business).
        loader (iterable of `dict[str, torch.Tensor]`): Batches with `labels`.
        keep_model (`PreTrainedModel`, *optional*): Compare with this one instead.

    Returns:
        `dict[str, float]`: `loss` (L_keep) and `keep_agreement` (share of answer tokens whose most likely token is the
        deployed model's); empty without answers.
    """
    loss, agreed, tokens = 0.0, 0, 0
    for batch in loader:
        batch = to_device(batch, model)
        with contextlib.nullcontext(keep_model) if keep_model is not None else deployed_model(model) as deployed:
            base = answer_logits(deployed, batch)
        logits, targets = answer_logits(model, batch), answer_labels(batch["labels"])
        mask = targets != IGNORE_INDEX
        count = int(mask.sum())
        loss += keep_loss(logits, base, targets).item() * count
        agreed += int((logits.argmax(-1)[:, :-1] == base.argmax(-1)[:, :-1])[mask].sum())
        tokens += count
    return {"loss": loss / tokens, "keep_agreement": agreed / tokens} if tokens else {}
