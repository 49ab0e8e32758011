"""`ForgetTrainer`: base of the methods that see images of the concept they erase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel

from space_peft.data.names import check_target
from space_peft.data.pictures import load_rgb, open_picture
from space_peft.data.questions import DEFAULT_QUESTIONS, QuestionSet
from space_peft.data.rows import check_rows
from space_peft.distributed import processes
from space_peft.losses import answer_labels, name_log_odds
from space_peft.modeling.prompts import IGNORE_INDEX, answer_logits
from space_peft.retained.reading import read_row

from .erasure_trainer import ErasureTrainer
from .forget_config import ForgetConfig
from .pairs import forget_rows
from .unlearning_losses import nll_loss


def forget_conversations(dataset: Dataset | Sequence[dict], names: Sequence[str], questions: QuestionSet) -> list[dict]:
    """Rows to forget as conversations.

    Args:
        dataset (`datasets.Dataset` or `list[dict]`): Rows in one of TRL's formats, each with an image, whose answers
            are to be forgotten; or rows with an `image` alone, which are then asked the naming and yes/no `questions`.
        names (`list[str]`): The concept's name first, then its aliases.
        questions (`QuestionSet`): Only `naming` and `confirm` are used.

    Raises:
        ValueError: If a row has no image.
    """
    rows = list(dataset)
    if images_alone(rows):
        images = []
        for i, row in enumerate(rows):
            if row.get("image") is None:
                raise ValueError(
                    f"row {i} of `forget_dataset` has the columns {sorted(row)}; expected an `image`, or one of TRL's "
                    "formats with `images`."
                )
            try:
                images.append(load_rgb(open_picture(row["image"])))
            except (TypeError, ValueError) as error:
                raise ValueError(f"row {i} of `forget_dataset`: {error}") from error
        return forget_rows(images, names, questions)
    conversations = [read_row(rows, i, "row to forget") for i in range(len(rows))]
    for i, row in enumerate(conversations):
        if not row["images"]:
            raise ValueError(
                f"row {i} of `forget_dataset` has no image: what is known of the concept in words is to be kept, so "
                "text-only rows belong into `retain_dataset`."
            )
        row["images"] = [load_rgb(image) for image in row["images"]]
    return conversations


def images_alone(rows: Sequence[dict]) -> bool:
    """Whether the rows to forget are images without conversations, which are then asked questions."""
    other = next((i for i, row in enumerate(rows) if not isinstance(row, Mapping)), None)
    if other is not None:
        raise ValueError(f"row {other} of `forget_dataset` is a {type(rows[other]).__name__}; expected a dict.")
    return all(row.get("messages") is None and row.get("prompt") is None for row in rows)


def _concept_of(dataset) -> str:
    """The one name in a dataset's `name` column; empty if it has none, or several."""
    if isinstance(dataset, Dataset):
        names = set(dataset["name"]) if "name" in dataset.column_names else set()
    else:
        names = {row.get("name") for row in dataset if isinstance(row, Mapping)}
    return names.pop() or "" if len(names) == 1 else ""


class ForgetTrainer(ErasureTrainer):
    """
    Base of the erasure methods that need images of the concept; a method is a subclass with a `forget_loss`.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            See [`ErasureTrainer`].
        args ([`ForgetConfig`], *optional*):
            Configuration, of the method's own class.
        forget_dataset ([`~datasets.Dataset`] or `list[dict]`):
            Images of the concept: rows in one of TRL's formats (`messages`, or `prompt` and `completion`, with `images`
            or `image`) whose answers are to be forgotten, or rows with an `image`, which are asked `questions`.
        retain_dataset ([`~datasets.Dataset`] or `list[dict]`):
            See [`ErasureTrainer`].
        concept (`str`, *optional*):
            The name to forget; by default the one in the forget dataset's column `name`.
        aliases (`list[str]`, *optional*):
            Other names to forget.
        questions (`QuestionSet`, *optional*):
            What to ask about rows that are no conversations; only `naming`, `confirm` and `open` are used.
        kwargs:
            `eval_dataset`, `processing_class`, `peft_config`, `probes`, `protect`, `statistics`, `callbacks`, `optimizers`, ...: see
            [`ErasureTrainer`].

    Raises:
        ValueError: If there are no rows to forget, one has no image, or the concept has no name; see also
            [`ErasureTrainer`].
    """

    _config_class: type[ForgetConfig]
    # Whether images without conversations are also asked open questions, and what the model says is forgotten.
    _asks_open = True

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel | None = None,
        args: ForgetConfig | None = None,
        *,
        forget_dataset: Dataset | Sequence[dict],
        retain_dataset: Dataset | Sequence[dict] | None = None,
        concept: str | None = None,
        aliases: Sequence[str] | None = None,
        questions: QuestionSet | None = None,
        **kwargs,
    ):
        if forget_dataset is not None:
            forget_dataset = check_rows(forget_dataset, "forget_dataset")
        if forget_dataset is None or len(forget_dataset) == 0:
            raise ValueError(
                "`forget_dataset` is empty: this method needs images of the concept; SpaceTrainer does not."
            )
        if args is None:
            args = self._config_class(output_dir=f"{self._name.lower()}-output")
        concept, aliases = check_target(_concept_of(forget_dataset) if concept is None else concept, aliases)
        names = [concept, *aliases]
        super().__init__(
            model,
            args,
            forget=forget_conversations(forget_dataset, names, questions or DEFAULT_QUESTIONS),
            own_answers=self._asks_open and images_alone(list(forget_dataset)),
            retain_dataset=retain_dataset,
            concept=concept,
            aliases=aliases,
            questions=questions,
            **kwargs,
        )

    @staticmethod
    def _steps_on_retained(args: ForgetConfig) -> bool:
        return args.retain_loss != "none"

    @property
    def _compares_with_deployed(self) -> bool:
        return self.args.retain_loss == "kl"

    def forget_loss(self, logits: torch.Tensor, log_prob: torch.Tensor, inputs: dict) -> torch.Tensor:
        """The method's loss on rows to forget.

        Args:
            logits (`torch.Tensor`): `(n, t + 1, vocabulary)` of the adapted model.
            log_prob (`torch.Tensor`): `(n,)`, log p of what each row says, in any form: `_said`.
            inputs (`dict`): The whole batch.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define its loss on rows to forget.")

    @staticmethod
    def _said(logits: torch.Tensor, inputs: dict) -> torch.Tensor:
        """log p of what each row to forget says, in any form (see `space_peft.losses.name_log_odds`): `(n,)`."""
        mention = inputs["forget_mentions"]
        return F.logsigmoid(name_log_odds(logits, mention["name"], mention["branches"], mention["shares"]))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        terms, log_prob = {}, None
        if "forget" in inputs:
            logits = answer_logits(model, inputs["forget"], inputs["forget_columns"])
            log_prob = self._said(logits, inputs)
            terms["forget"] = self.args.forget_weight * self.forget_loss(logits, log_prob, inputs)
        if "retain" in inputs and self.args.retain_loss != "none":
            terms["retain"] = self.args.retain_weight * self._retain_loss(model, inputs)
        self._record(terms, log_prob)
        return sum(terms.values())

    def _retain_loss(self, model, inputs: dict) -> torch.Tensor:
        if self.args.retain_loss == "kl":
            return self._keep_loss(model, inputs)
        columns = inputs["retain_columns"]
        logits = answer_logits(model, inputs["retain"], columns)
        return self._nll(logits, answer_labels(inputs["retain"]["labels"], columns))

    @staticmethod
    def _nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """A mean over the tokens of all processes, which have different numbers of them."""
        return processes.mean_weight((targets != IGNORE_INDEX).sum()) * nll_loss(logits, targets)
