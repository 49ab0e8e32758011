"""What users of `Trainer` ask an erasure trainer: `evaluate`, `predict`, and the loaders behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import nested_concat, nested_numpify
from transformers.trainer_utils import PredictionOutput

from space_peft.anchors.refine import name_probabilities
from space_peft.modeling.layers import evaluating
from space_peft.modeling.prompts import to_device
from space_peft.records.stages import done, track
from space_peft.retained.reading import RetainedRows, retained_loader

from .deployed_answers import compare_with_deployed
from .parts import TrainerPart


if TYPE_CHECKING:
    from space_peft.evaluation.probes import Probe


# `Trainer`'s arguments that have no meaning here, and what to do instead.
_INSTEAD = {
    "train_dataset": "rows to forget and retained rows are given apart, as `anchors` or `forget_dataset` and as `retain_dataset`",
    "data_collator": "rows to forget are put beside retained ones; format the rows before, in TRL's formats",
    "compute_loss_func": "the loss is the method's own; override `compute_loss` in a subclass",
    "compute_metrics": "`evaluate` compares answers with the deployed model's; pass `probes=build_probes(...)`, override "
    "`evaluate` in a subclass, or compute yours from `trainer.predict(rows)`",
    "preprocess_logits_for_metrics": "`evaluate` compares answers with the deployed model's; work on `trainer.predict(rows)`",
    "optimizer_cls_and_kwargs": "set `optim`, `optim_args` and `learning_rate` in the configuration, or pass `optimizers`",
    "tokenizer": "it is called `processing_class`",
}


def refuse_arguments(trainer: type, arguments: dict) -> None:
    """Refuses arguments that the trainer's constructor does not have; for those of `Trainer` it says what to do instead.

    Raises:
        TypeError: If there is one.
    """
    for name in arguments:
        known = f": {_INSTEAD[name]}." if name in _INSTEAD else "; see its documentation for those it has."
        raise TypeError(f"{trainer.__name__} takes no argument `{name}`{known}")


def check_args(args, expected: type, trainer: type) -> None:
    """Refuses the arguments of another trainer: half of those of this one would be missing.

    Raises:
        TypeError: If they are of another class.
    """
    if not isinstance(args, expected):
        raise TypeError(
            f"`args` of {trainer.__name__} is {type(args).__name__}; expected {expected.__name__}, which has every field of "
            f"TrainingArguments: {expected.__name__}(output_dir=..., ...)."
        )


def check_optimizer(optimizer: torch.optim.Optimizer | None, model) -> None:
    """Refuses an optimiser that was made before the adapter: it would train nothing.

    Raises:
        ValueError: If it does not hold every trainable weight.
    """
    if optimizer is None:
        return
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    missing = [name for name, weight in model.named_parameters() if weight.requires_grad and id(weight) not in held]
    if missing:
        raise ValueError(
            f"the optimiser in `optimizers` does not hold {len(missing)} of the weights to train, the first is "
            f"{missing[0]!r}: it was made before the adapter. Make the adapter first (get_peft_model), then the optimiser of "
            "its weights, and pass both; or leave `optimizers` out and set `optim` in the configuration."
        )


class EvaluationMixin(TrainerPart):
    """`evaluate` and `predict` of the erasure trainers: on retained rows, which are compared with the deployed model."""

    def _loader_of(self, rows: RetainedRows, indices: Sequence[int] | None = None) -> DataLoader:
        indices = range(len(rows)) if indices is None else indices
        assert self.args.per_device_eval_batch_size is not None  # ErasureConfig has set it.
        return retained_loader(self.processing_class, rows, indices, self.args.per_device_eval_batch_size)

    def _eval_loaders(self, eval_dataset=None) -> dict[str, DataLoader]:
        """By name, "" where there is one without."""
        if isinstance(eval_dataset, str):
            if not isinstance(self.eval_rows, dict) or eval_dataset not in self.eval_rows:
                known = sorted(self.eval_rows) if isinstance(self.eval_rows, dict) else "one dataset without a name"
                raise ValueError(f"there is no evaluation dataset {eval_dataset!r}; the trainer has {known}.")
            return {eval_dataset: self.eval_rows[eval_dataset]}
        if eval_dataset is None:
            return self.eval_rows if isinstance(self.eval_rows, dict) else {"": self.eval_rows}
        given = retained_sets(eval_dataset)
        if not isinstance(given, dict):
            given = {"": given}
        return {name: self._loader_of(rows) for name, rows in given.items()}

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """The batches that `evaluate` reads.

        Args:
            eval_dataset (`str`, [`~datasets.Dataset`] or `list[dict]`, *optional*): Name of an evaluation dataset, or rows.

        Raises:
            ValueError: If there are several and none is named.
        """
        loaders = self._eval_loaders(eval_dataset)
        if len(loaders) > 1:
            raise ValueError(f"there are the evaluation datasets {sorted(loaders)}; name one.")
        return next(iter(loaders.values()))

    def get_test_dataloader(self, test_dataset) -> DataLoader:
        """The batches that `predict` reads.

        Args:
            test_dataset ([`~datasets.Dataset`] or `list[dict]`): Rows in one of TRL's formats.
        """
        return self._loader_of(test_dataset if isinstance(test_dataset, RetainedRows) else RetainedRows(test_dataset))

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Retained rows, images of the concept (or their anchors) and probes, as the model is now.

        Args:
            eval_dataset (`str`, [`~datasets.Dataset`], `list[dict]`, or a `dict` of them, *optional*):
                Retained rows to use instead of the trainer's own, or the name of one of its evaluation datasets.
            ignore_keys (`list[str]`, *optional*):
                Unused; part of Trainer's signature.
            metric_key_prefix (`str`, defaults to `"eval"`):
                Put before every key.

        Returns:
            `dict[str, float]`: `loss` (L_keep), `keep_agreement` (share of answer tokens whose most likely token is
            the deployed model's), `p_name_on_anchors` and its `_max` (`p_name_on_images` for methods that see the concept:
            p of any form of the name at the beginning of the answer to the first naming question), and the value of
            every probe. With several datasets the first two have the dataset's name before them, as in Trainer
            ("eval_NAME_loss"); the others do not depend on it.
        """
        loaders = self._eval_loaders(eval_dataset)
        model = self.accelerator.unwrap_model(self.model)
        with evaluating(model):
            metrics = {}
            for name, loader in loaders.items():
                shown = not self.args.disable_tqdm and self.is_world_process_zero()
                batches = track(loader, "Comparing retained answers", show=shown)
                compared = compare_with_deployed(model, batches, self.keep_model)
                metrics.update({f"{name}_{key}" if name else key: value for key, value in compared.items()})
            images, question = self.train_dataset.images, self.questions.naming[0]
            names = [self.concept, *self.aliases]
            probabilities = name_probabilities(model, self.processing_class, images, question, names)
            metrics[self._p_name] = sum(probabilities) / len(probabilities)
            metrics[f"{self._p_name}_max"] = max(probabilities)
            if self.probes:
                metrics.update(self._ask_probes(model, self.probes))
            metrics = {f"{metric_key_prefix}_{key}": value for key, value in metrics.items()}
            self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _ask_probes(self, model, probes: Sequence[Probe]) -> dict[str, float]:
        from space_peft.evaluation.before_after import evaluate_erasure

        # What the original model knew is asked once: it does not change.
        self._probe_baseline, result = evaluate_erasure(
            model,
            self.processing_class,
            probes,
            baseline=self._probe_baseline,
            progress=not self.args.disable_tqdm,
        )
        self._note_probes(self._probe_baseline, result)
        if (named := result.scores.get("forget", {}).get("value")) is not None:
            done(f"evaluated: named on {named:.0%} of the test pictures")
        scores = {key: score["value"] for key, score in result.scores.items()}
        return {key: value for key, value in scores.items() if value is not None}

    @torch.no_grad()
    def predict(
        self, test_dataset: Dataset | Sequence[dict], ignore_keys=None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """What the adapted model answers to rows, as logits, and how far that is from the deployed model's answers.

        The logits of all rows are in memory at once, as with Trainer: `(rows, tokens, vocabulary)`. They are left out
        with `prediction_loss_only=True` in the configuration.

        Args:
            test_dataset ([`~datasets.Dataset`] or `list[dict]`):
                Rows in one of TRL's formats, as retained rows are.
            ignore_keys (`list[str]`, *optional*):
                Unused; part of Trainer's signature.
            metric_key_prefix (`str`, defaults to `"test"`):
                Put before every key of the metrics.

        Returns:
            `PredictionOutput`: `predictions` and `label_ids` (-100 where nothing is answered, and where rows are shorter
            than the longest), in the order of the rows; `metrics`: `loss` (L_keep) and `keep_agreement`.

        Raises:
            ValueError: If a row is in none of the formats; the message names it.
        """
        loader = self.get_test_dataloader(test_dataset)
        model = self.accelerator.unwrap_model(self.model)
        predictions: Any = None
        labels: Any = None
        with evaluating(model):
            metrics = compare_with_deployed(model, loader, self.keep_model)
            for batch in [] if self.args.prediction_loss_only else loader:
                logits = model(**to_device({k: v for k, v in batch.items() if k != "labels"}, model)).logits
                parts = logits.float().cpu(), batch["labels"]
                if predictions is None:
                    predictions, labels = parts
                else:
                    predictions, labels = nested_concat(predictions, parts[0]), nested_concat(labels, parts[1])
        if predictions is not None:
            # The loader has an order of its own.
            order = torch.tensor(loader.dataset.indices).argsort()
            predictions, labels = nested_numpify(predictions[order]), nested_numpify(labels[order])
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in metrics.items()}
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
        return PredictionOutput(predictions=predictions, label_ids=labels, metrics=metrics)


def retained_sets(rows) -> RetainedRows | dict[str, RetainedRows]:
    """Rows for evaluation: one dataset, or several by name.

    Raises:
        ValueError: If there are none, a row is in none of the formats, or a name is no text; the message names it.
    """
    if isinstance(rows, RetainedRows):
        return rows
    if not isinstance(rows, dict):
        return RetainedRows(rows)
    if not rows or not all(isinstance(name, str) and name for name in rows):
        raise ValueError(f"`eval_dataset` is a dict with the keys {list(rows)!r:.200}; expected names of datasets.")
    sets = {}
    for name, part in rows.items():
        try:
            sets[name] = part if isinstance(part, RetainedRows) else RetainedRows(part)
        except ValueError as error:
            raise ValueError(f"evaluation dataset {name!r}: {error}") from error
    return sets
