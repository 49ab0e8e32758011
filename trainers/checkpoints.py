"""Which checkpoint a killed run goes on from: the newest whole one that is its own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from space_peft.data.seed_images import pixel_hash
from space_peft.records.card_data import ErasureCardData

from .given_adapter import ADAPTER, NOT_THE_ADAPTER
from .publishing import defaults_of


if TYPE_CHECKING:
    from peft import LoraConfig

    from .erasure_config import ErasureConfig
    from .erasure_trainer import ErasureTrainer


_RECORD = "space_peft.Run"  # In a checkpoint's trainer_state.json, beside what callbacks keep there.
_ASKED = ("naming", "confirm", "yes", "kind", "open", "about")  # Of the questions, what training may use.
# How it is watched, saved and published; beginnings of names.
_NOT_THE_RUN = (
    "resume_from_checkpoint",
    "ignore_data_skip",
    "hub_",
    "push_to_hub",
    "eval_",
    "log_",
    "logging_",
    "save_",
)
# What a checkpoint is of: under another of these its weights have learned something else.
_TARGET = ("method", "concept", "aliases", "rows", "questions")


def last_complete_checkpoint(folder: str | os.PathLike, run: Mapping[str, Any] | None = None) -> str | None:
    """Returns the newest checkpoint that was written to its end; `None` if there is none.

    `transformers.trainer_utils.get_last_checkpoint` takes the newest folder, also one in which a killed run has left
    half of a file. Trainer writes its state last, so a checkpoint whose state can be read is complete.

    Args:
        folder (`str` or `os.PathLike`): Trainer's `output_dir`.
        run (`dict`, *optional*): From [`run_identity`]: checkpoints of other runs, and those that do not say of which they
            are, are passed over as well.
    """
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    found = [
        (int(match[1]), path)
        for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (match := pattern.fullmatch(path.name))
    ]
    of_others: list[str] = []
    chosen = None
    for _, path in sorted(found, reverse=True):
        try:
            noted = noted_run(path)
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            warnings.warn(f"checkpoint {str(path)!r} is incomplete and is skipped.", stacklevel=3)
            continue
        if run is None or noted is not None and not (different := run_differences(noted, run)):
            chosen = str(path)
            break
        of_others.append("it does not say of what" if noted is None else "; ".join(different))
    if of_others:
        go_on = "training starts from the beginning" if chosen is None else f"training continues from {chosen!r}"
        warnings.warn(
            f"{len(of_others)} checkpoint{'s' * (len(of_others) > 1)} in {str(folder)!r} of another run "
            f"{'are' if len(of_others) > 1 else 'is'} skipped ({of_others[0]}); {go_on}.",
            stacklevel=3,
        )
    return chosen


def remove_needless_checkpoint(trainer: ErasureTrainer) -> None:
    """Removes the checkpoint that Trainer writes at the last step though `save_steps` asks for none there.

    A call that is killed before its result is saved goes on from it. Afterwards nothing needs it, and its optimizer's state
    and null spaces are larger than the result.

    Args:
        trainer ([`ErasureTrainer`]): After training, with its result saved.
    """
    args, state = trainer.args, trainer.state
    asked_for = args.save_strategy != SaveStrategy.STEPS or state.global_step % state.save_steps == 0
    if not asked_for and not args.push_to_hub and trainer.is_world_process_zero():
        shutil.rmtree(Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"), ignore_errors=True)


def run_identity(trainer: ErasureTrainer) -> dict[str, Any]:
    """What a run trains, on what and how: JSON values. What is retained, and the base model, the null spaces know.

    Args:
        trainer ([`ErasureTrainer`]): As it is going to train.
    """
    hashes: dict[int, str] = {}  # Rows share images.

    def seen(image) -> str:
        if id(image) not in hashes:
            hashes[id(image)] = pixel_hash(image)
        return hashes[id(image)]

    rows = [
        [row["prompt"], row["answer_tokens"], row["mention"], row["says"], [seen(image) for image in row["images"]]]
        for row in trainer.forget.given
    ]
    args, adapter = trainer.args, trainer.accelerator.unwrap_model(trainer.model).peft_config[ADAPTER]
    asked = {name: getattr(trainer.questions, name) for name in _ASKED}
    identity = {
        "method": trainer._name,
        "concept": trainer.concept,
        "aliases": trainer.aliases,
        "rows": _digest(rows),
        "questions": _digest({name: value if isinstance(value, str) else list(map(str, value)) for name, value in asked.items()}),
        "retained rows": len(trainer.retained),
        "settings": settings_of(args, adapter),
    }  # fmt: skip
    return json.loads(json.dumps(identity))


def settings_of(args: ErasureConfig, adapter: LoraConfig) -> dict[str, Any]:
    """What of a run's settings differs from the defaults, as JSON values: those that its result depends on.

    Args:
        args ([`ErasureConfig`]): Of training.
        adapter ([`~peft.LoraConfig`]): Of the adapter.
    """
    card = ErasureCardData()
    card.add_settings("run", args, defaults_of(args))
    card.add_settings("adapter", adapter, type(adapter)())
    run = {key: value for key, value in card.settings["run"].items() if not key.startswith(_NOT_THE_RUN)}
    own = {key: value for key, value in card.settings["adapter"].items() if key not in NOT_THE_ADAPTER}
    settings = {"seed": args.seed, "adapter": type(adapter).__name__, **run, **own}
    return json.loads(json.dumps(settings))


def _digest(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def noted_run(checkpoint: str | os.PathLike) -> dict[str, Any] | None:
    """What a checkpoint says of the run that it is of; `None` if it says nothing, as those of other trainers.

    Raises:
        FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError: If it was not written to its end.
    """
    state = json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    noted = (state.get("stateful_callbacks") or {}).get(_RECORD)
    return noted if isinstance(noted, dict) else None


def run_differences(noted: Mapping[str, Any], now: Mapping[str, Any], *, target: bool = False) -> list[str]:
    """In what a checkpoint's run differs from another one, in words; empty if they are the same.

    Args:
        noted (`dict`): From [`noted_run`].
        now (`dict`): From [`run_identity`].
        target (`bool`, defaults to `False`): Only what is forgotten, and by which method.
    """
    found = []
    for key in _TARGET if target else (*_TARGET, "retained rows"):
        if noted.get(key) != now[key]:
            told = f"{key} {noted.get(key)!r:.80}, now {now[key]!r:.80}"
            found.append({"rows": "other rows to forget", "questions": "other questions"}.get(key, told))
    before, after = noted.get("settings") or {}, now["settings"]
    for key in [] if target else sorted({*before, *after}):
        if before.get(key) != after.get(key):
            one, other = (repr(part[key]) if key in part else "the default" for part in (before, after))
            found.append(f"{key} {one:.80}, now {other:.80}")
    return found


def check_same_run(checkpoint: str | os.PathLike, run: Mapping[str, Any]) -> None:
    """Refuses a checkpoint in which something else was forgotten, and says which settings were others.

    One that says nothing is taken: of another trainer, or of version 0.2.0 and before.

    Args:
        checkpoint (`str` or `os.PathLike`): The checkpoint that training is to go on from.
        run (`dict`): From [`run_identity`].

    Raises:
        ValueError: If it is of another erasure.
    """
    if not Path(checkpoint, TRAINER_STATE_NAME).is_file() or (noted := noted_run(checkpoint)) is None:
        return  # Without its state Trainer does not go on from it either, and says so.
    if different := run_differences(noted, run, target=True):
        raise ValueError(
            f"the checkpoint {str(checkpoint)!r} is of another erasure: {'; '.join(different)}. Train again (without "
            "`resume_from_checkpoint`), into another `output_dir`, or resume with what it was trained with."
        )
    if different := run_differences(noted, run):
        warnings.warn(
            f"the checkpoint {str(checkpoint)!r} was trained with other settings, under which its steps were made: "
            f"{'; '.join(different)}.",
            stacklevel=6,
        )


class RunCallback(TrainerCallback):
    """Notes in every checkpoint of which run it is.

    Args:
        run (`Callable`): Returns the [`run_identity`].
    """

    def __init__(self, run: Callable[[], dict[str, Any]]):
        self._run = run

    def on_train_begin(self, args, state, control, **kwargs):
        state.stateful_callbacks[_RECORD] = self._run()
