"""The rows to forget of a run: those given, and every place at which the model itself names the concept."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from space_peft.data.form_tree import FormTree
from space_peft.distributed import processes
from space_peft.modeling.layers import deployed_model, evaluating
from space_peft.modeling.mention_rows import (
    add_branches,
    answered_instead,
    distinct,
    locate_answer,
    mentions_in,
    own_answers,
    rows_of_answers,
)
from space_peft.modeling.prompts import conversation, length_order
from space_peft.records.folder import ROWS_NAME
from space_peft.records.io import write_json
from space_peft.records.safe_json import read_json
from space_peft.records.stages import begin, done

from .pairs import forget_loader


if TYPE_CHECKING:
    from .erasure_trainer import ErasureTrainer


_KEPT = ("asked", "answer_tokens", "mention", "says", "kept_from", "branches")


class ForgetRows:
    """
    Finds rows in the model's own answers when training begins and while it goes on.

    What is found while training is part of the run's state: checkpoints hold it, so that a resumed run draws the rows
    that the uninterrupted one draws.

    Args:
        trainer ([`ErasureTrainer`]): Whose model, questions and settings count.
        given (`list[dict]`): Rows with `answer_tokens` and `mention`.
    """

    def __init__(self, trainer: ErasureTrainer, given: Sequence[dict]):
        self._trainer, self.given = trainer, list(given)
        self._trees: dict[tuple[str, ...], FormTree] = {}
        self.instead: tuple[str, bool] | None = None  # a text, and whether it is the whole answer
        self._added: list[tuple[int, list[dict]]] = []  # (first item that may show them, rows without images)

    @property
    def _names(self) -> tuple[str, ...]:
        return (self._trainer.concept, *self._trainer.aliases)

    @property
    def _model(self):
        return self._trainer.accelerator.unwrap_model(self._trainer.model)

    def find_rows(self, checkpoint: str | os.PathLike | None = None) -> None:
        """Asks the deployed model, and takes up what a run found until a checkpoint.

        Args:
            checkpoint (`str` or `os.PathLike`, *optional*): Folder of the checkpoint that training resumes from.

        Raises:
            ValueError: If a name has no form that the tokenizer can write.
        """
        begin("ask")
        trainer, data = self._trainer, self._trainer.train_dataset
        tokenizer, size = trainer.processing_class.tokenizer, trainer.args.fit_batch_size
        desc = None if trainer.args.disable_tqdm else "Asking the model"
        kinds = {row["says"] for row in self.given if row["says"] is not None} | {self._names}
        self._trees = {says: FormTree.of(says, tokenizer) for says in kinds}

        def look(_) -> list[dict]:
            # In the precision of training steps, which compare with what is found.
            with trainer.accelerator.autocast(), deployed_model(self._model) as deployed:
                rows = list(self.given)
                if trainer.own_answers:
                    own = rows_of_answers(
                        deployed, trainer.processing_class, data.images, trainer.questions, self._names,
                        self._trees[self._names], batch_size=size, max_new_tokens=trainer.args.answer_tokens, desc=desc,
                    )  # fmt: skip
                    rows += distinct(own, rows)
                rows = self._branched(deployed, rows, 0)
            return [_light(row) for row in rows]

        # By rank 0 alone: with FSDP's RAM-efficient loading no other process has the weights yet.
        light = processes.divide([None], look)[0]
        given, own = light[: len(self.given)], light[len(self.given) :]
        self.instead = trainer.said_instead()
        data.replace_rows(
            self._with_instead([{**row, **found} for row, found in zip(self.given, given)]) + self._whole(own)
        )
        done(f"collected {len(data.rows)} answers to forget")
        self._added = []
        if checkpoint is not None and (path := Path(checkpoint) / ROWS_NAME).is_file():
            for item, rows in read_json(path, kind="rows of a checkpoint")["added"]:
                self._added.append((item, rows))
                data.add_rows(self._whole(rows), item)

    def refresh(self, step: int) -> None:
        """Asks the model as it is now; what it still says becomes rows of the batches after the next.

        Args:
            step (`int`): Optimiser steps made.
        """
        trainer, data = self._trainer, self._trainer.train_dataset
        processor, size = trainer.processing_class, trainer.args.fit_batch_size
        prompts = (trainer.questions.naming, trainer.questions.open)
        with trainer.accelerator.autocast(), evaluating(self._model) as model:
            answers = own_answers(
                model, processor, data.images, *prompts, batch_size=size, max_new_tokens=trainer.args.answer_tokens
            )
        rows = mentions_in(answers, processor.tokenizer, self._names, self._trees[self._names])
        with trainer.accelerator.autocast(), deployed_model(self._model) as deployed:
            rows = self._branched(deployed, distinct(rows, data.rows), len(data.rows))
        processes.reshard(self._model)
        # All processes ask the same; rank 0 decides where rounding made them differ.
        rows = processes.gather_objects([_light(row) for row in rows])[0]
        if not rows:
            return
        # Trainer has fetched one batch ahead.
        # Not that of the arguments: `auto_find_batch_size` may have made it smaller.
        batch = trainer._train_batch_size * trainer.args.world_size
        item = (step * trainer.args.gradient_accumulation_steps + 1) * batch % len(data)
        data.add_rows(self._whole(rows), item)
        self._added.append((item, rows))

    def _branched(self, deployed, rows: Sequence[dict], first: int) -> list[dict]:
        """Rows with their branches; of the same passes the deployed model's answers are kept, as those of rows `first` on."""
        processor, size = self._trainer.processing_class, self._trainer.args.fit_batch_size
        order, answers = length_order(processor, rows), self._trainer.deployed_answers
        batches = observer = None
        if rows and answers is not None:
            batches = forget_loader(processor, rows, size, order)
            observer = answers.of_forget([first + row for row in order])
        done = add_branches(
            deployed, processor, [rows[row] for row in order], self._trees, size, batches=batches, observer=observer
        )
        return [row for _, row in sorted(zip(order, done, strict=True), key=lambda pair: pair[0])]

    def found_while_training(self) -> list[tuple[int, int]]:
        """First row and end of each lot found while training went on."""
        sizes = [len(rows) for _, rows in self._added]
        ends = [len(self._trainer.train_dataset.rows) - sum(sizes[place:]) for place in range(len(sizes) + 1)]
        return list(zip(ends, ends[1:]))

    def save(self, folder: str | os.PathLike) -> None:
        """Writes what was found while training to a checkpoint's folder; what another run left there goes."""
        if self._added:
            write_json(Path(folder) / ROWS_NAME, {"added": self._added})
        else:
            (Path(folder) / ROWS_NAME).unlink(missing_ok=True)

    def _whole(self, rows: Sequence[dict]) -> list[dict]:
        """Rows with their conversations and images again."""
        images = self._trainer.train_dataset.images
        prompts = (*self._trainer.questions.naming, *self._trainer.questions.open)
        whole = []
        for row in rows:
            image, prompt = row["asked"]
            says = None if row["says"] is None else tuple(row["says"])
            whole.append({**conversation(prompts[prompt], image=images[image]), **row, "says": says})
        return self._with_instead(whole)

    def _with_instead(self, rows: list[dict]) -> list[dict]:
        """Rows that say the name with what is to be said instead, if that is not left to the model."""
        if self.instead is None:
            return rows
        text, whole = self.instead
        processor = self._trainer.processing_class
        return [
            {**row, "instead": answered_instead(processor, row, text, whole=whole)}
            if row["says"] == self._names
            else row
            for row in rows
        ]


def located_rows(processor, rows: Sequence[dict]) -> list[dict]:
    """Rows to forget with the tokens of what they say; an error names the row."""
    located = []
    for number, row in enumerate(rows):
        try:
            located.append(locate_answer(processor, row))
        except ValueError as error:
            raise ValueError(f"row {number} to forget: {error}") from error
    return located


def _light(row: dict) -> dict:
    """A row without its conversation and image, as JSON and other processes can have it."""
    return {key: row[key] for key in _KEPT if key in row}
