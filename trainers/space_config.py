"""Arguments of `SpaceTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field

from .erasure_config import ErasureConfig


REFUSAL = "I don't know what this is."
"""What is answered with `overwrite="refusal"`."""


@dataclass
class SpaceConfig(ErasureConfig):
    r"""
    Configuration of [`SpaceTrainer`]: the fields below, and every field of [`ErasureConfig`] and
    [`~transformers.TrainingArguments`]. `learning_rate` is 4e-3 by default: a strict null space shortens every update.

    Args:
        task_weight (`float`, defaults to 1.0):
            Weight of L_task, the overwriting answer.
        overwrite (`str`, defaults to `"own"`):
            What is said instead of the name: `"own"`, what the model says where the name is ruled out, the least change
            that erases; `"kind"`, a broader word in the name's place (`broader_word`); `"refusal"`, `REFUSAL` as the whole
            answer; any other text is taken as the whole answer.
        broader_word (`str`, *optional*):
            For `overwrite="kind"`; by default what the model itself answers to `QuestionSet.kind`, in words.
        suppression_weight (`float`, defaults to 1.0):
            Weight of L_out, -log(1 - p(name)).
        suppression_margin (`float`, defaults to 6.0):
            Nats added to the log-odds of the name in L_out, because anchors are weaker evidence than real images and
            because an erased name should be as unlikely as any other: what is merely not said is soon learned again.
        repulsion_weight (`float`, defaults to 1.0):
            Weight of L_orth, the text-anchor repulsion. Without effect on an adapter that leaves image features alone.
        isotropy_weight (`float`, defaults to 0.1):
            Weight of L_div. Without effect on an adapter that leaves image features alone.
        keep_weight (`float`, defaults to 0.0):
            Weight of L_keep, the KL divergence to the unadapted model on retained rows; it is small to begin with. At 0
            retained rows are used for the null space alone, which holds what they hold and more, and no step runs them.
            60 with `SpaceLoraConfig(strength=1.0)` is the other regime that was measured: it keeps what the rows show.

    How the defaults were chosen: `docs/decisions.md`, "Real answers". Training goes on for `max_steps`, because an
    erased name should be as unlikely as any other; `stop_threshold=0.02` takes fewer steps, and erases less deeply.
    """

    learning_rate: float = field(default=4e-3, metadata={"help": "Peak learning rate."})

    # Parameters that control the losses
    task_weight: float = field(default=1.0, metadata={"help": "Weight of L_task, the overwriting answer."})
    overwrite: str = field(
        default="own", metadata={"help": "What is said instead: 'own', 'kind', 'refusal', or a text."}
    )
    broader_word: str | None = field(default=None, metadata={"help": "The word for overwrite='kind'; None: ask."})
    suppression_weight: float = field(default=1.0, metadata={"help": "Weight of L_out, -log(1 - p(name))."})
    suppression_margin: float = field(default=6.0, metadata={"help": "Nats added to the name's log-odds in L_out."})
    repulsion_weight: float = field(default=1.0, metadata={"help": "Weight of L_orth, the text-anchor repulsion."})
    isotropy_weight: float = field(default=0.1, metadata={"help": "Weight of L_div, the isotropy of anchor features."})
    keep_weight: float = field(default=0.0, metadata={"help": "Weight of L_keep, the KL on retained rows."})

    @classmethod
    def paper(cls, output_dir: str | None = None, **changes) -> SpaceConfig:
        """The paper's own configuration, as far as its abstract tells: L_task, L_orth and L_div on both sides of the model,
        on the answers to short questions alone. Give the trainer anchors as `select_anchors` returns them, and
        `SpaceLoraConfig(constraint="hard", energy=0.99)`. What it lacks: `docs/fidelity.md`.

        Args:
            output_dir (`str`, *optional*): As in [`~transformers.TrainingArguments`].
            changes: Other fields, or other values of these.
        """
        own = {
            "target": "all",
            "suppression_weight": 0.0,
            "keep_weight": 0.0,
            "own_answers": False,
            "refresh_steps": None,
        }
        return cls(output_dir, **{**own, **changes})

    def __post_init__(self):
        super().__post_init__()
        self.check_not_negative(
            "task_weight",
            "suppression_weight",
            "repulsion_weight",
            "isotropy_weight",
            "keep_weight",
            "suppression_margin",
        )
        if not isinstance(self.overwrite, str) or not self.overwrite.strip():
            raise ValueError(f"`overwrite` must be 'own', 'kind', 'refusal' or a text, got {self.overwrite!r}.")
        if self.broader_word is not None and self.overwrite != "kind":
            raise ValueError(f"`broader_word` is for overwrite='kind', got overwrite={self.overwrite!r}.")
        if self.task_weight == 0 and self.suppression_weight == 0:
            raise ValueError(
                "`task_weight` and `suppression_weight` are both 0, so nothing would be forgotten; raise one of them."
            )
