"""What the parts of a trainer, each in its own file, may take for granted of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from transformers import Trainer

    from space_peft.data.questions import QuestionSet
    from space_peft.evaluation.probes import Probe, ProbeResults
    from space_peft.null_space.callback import NullSpaceCallback
    from space_peft.records.card_data import ErasureCardData
    from space_peft.retained.held_out import HeldOut
    from space_peft.retained.reading import RetainedRows

    from .deployed_answers import DeployedAnswers
    from .erasure_config import ErasureConfig
    from .forget_rows import ForgetRows
    from .pairs import PairedRows
else:
    # Each part stands before `Trainer` in the list of bases, and finds it there.
    Trainer = object


class TrainerPart(Trainer):
    """Base of the parts of [`ErasureTrainer`], which sets all of these."""

    args: ErasureConfig
    card_data: ErasureCardData
    concept: str
    aliases: list[str]
    questions: QuestionSet
    probes: Sequence[Probe] | None
    control: Any
    push_in_progress: Any
    anchors: Dataset | None
    keep_model: Any
    train_dataset: PairedRows
    retained: RetainedRows
    held_out: DataLoader
    _held_out: HeldOut
    eval_rows: DataLoader | dict[str, DataLoader]
    forget: ForgetRows
    null_space: NullSpaceCallback | None
    fit_loader: DataLoader
    deployed_answers: DeployedAnswers | None
    _name: str
    _paper: dict | None
    _uses_concept_images: bool
    _p_name: str
    _probe_baseline: ProbeResults | None
