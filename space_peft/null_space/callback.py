"""The constraint for any `Trainer`: fits the null spaces when training begins, and projects every step."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils.logging import get_logger

from ..data.rows import check_loader
from ..distributed.processes import divide
from ..modeling.batch_observer import BatchObserver
from ..modeling.checksum import weights_at_rest
from ..modeling.layers import adapted_layers, adapter_config
from ..records.folder import FIT_PROGRESS_NAME, NULL_SPACES_NAME, SPACE_CONFIG_NAME
from ..records.stages import begin, done
from ..retained.reading import RetainedRows
from .differences import fit_differences, fit_digest, protect_digest
from .fitting import fit_null_space
from .identity import data_digest
from .projection import AttachedNullSpace, attach_null_space, offload_null_spaces
from .space import NullSpace, load_null_spaces, save_null_spaces


if TYPE_CHECKING:
    from .base_statistics import Statistics

logger = get_logger(__name__)

_RECORD = (
    "space_peft.NullSpaceCallback"  # not the class's name: Trainer would make a new callback of what it finds there
)
_REMEDY = (
    "Resume with what the checkpoint was trained with, or start a new run from its adapter: PeftModel.from_pretrained("
    "model, checkpoint, config=SpaceLoraConfig.from_pretrained(checkpoint), is_trainable=True)."
)


class NullSpaceCallback(TrainerCallback):
    """
    Trains an adapter in the null space of retained data with any `Trainer`: transformers' own, TRL's `SFTTrainer`, ...

    When training begins it fits the null spaces, unless they are given, and attaches them to the trainer's optimiser.
    They know what they were fitted for: base model, settings of the adapter, retained data. So one callback may serve
    several runs (a sweep, `model_init`, `hyperparameter_search`, `train` called twice): where model, settings or data
    are others than in the run before, it fits again. Null spaces that are given and do not fit are an error.

    They are saved with each checkpoint (`space_stats.safetensors`). A resumed run takes those of the checkpoint that it
    is resumed from, or fits them again if it cannot find the file, and goes on from the checkpoint's weights. It must
    be the same run: other settings, base model or retained data are an error, because the weights so far were trained
    under other null spaces. To go on under others, start a new run from the checkpoint's adapter
    (`PeftModel.from_pretrained(model, checkpoint, config=SpaceLoraConfig.from_pretrained(...), is_trainable=True)`).

    It leaves no certificate, no canary and no report: these are of [`SpaceTrainer`] and its kin, which hold out retained
    rows and ask the model. After training, `measure_leaks(model, callback.null_spaces)` (`space_peft.null_space.leaks`) says what
    the adapter does to the retained inputs of each layer.

    Args:
        retain_dataloader (iterable of `dict[str, torch.Tensor]`, *optional*): Batches of retained data as
            [`fit_null_space`] takes them: *encoded*, so a loader of rows needs a `collate_fn`; see the example.
        null_spaces (`dict[str, NullSpace]`, *optional*): Null spaces fitted before; one of the two must be given.
        adapter_name (`str`, defaults to `"default"`): The adapter.
        image_token_id (`int`, *optional*): See [`fit_null_space`].
        project_gradient (`bool`, defaults to `True`): See [`attach_null_space`].
        offload (`bool`, defaults to `False`): See [`attach_null_space`].
        progress (`bool`, defaults to `True`): Whether to show progress bars while fitting.
        fit_save_steps (`int`, *optional*): Retained batches after which the sums are saved in the output folder, again
            and again, so that a run killed while fitting goes on from there; never by default. See [`fit_null_space`].
        protect (`list[dict[str, NullSpace]]`, *optional*): See [`fit_null_space`].
        statistics ([`Statistics`], *optional*): See [`fit_null_space`]: instead of `retain_dataloader`, or beside it.

    Raises:
        TypeError: If `retain_dataloader` is a dataset, which gives rows instead of batches, or a loader of rows without a
            `collate_fn`.
        ValueError: If there is nothing to fit to, or `null_spaces` are given beside it.

    Example:

    ```python
    >>> from torch.utils.data import DataLoader
    >>> from space_peft import NullSpaceCallback
    >>> from space_peft.modeling.prompts import encode_conversations
    >>> from space_peft.retained.reading import RetainedRows

    >>> rows = RetainedRows(dataset)  # TRL's formats, checked and read as conversations
    >>> loader = DataLoader(rows, batch_size=8, collate_fn=lambda rows: encode_conversations(processor, rows))
    >>> trainer.add_callback(NullSpaceCallback(loader))
    ```
    """

    def __init__(
        self,
        retain_dataloader: Iterable[Mapping] | None = None,
        *,
        null_spaces: dict[str, NullSpace] | None = None,
        adapter_name: str = "default",
        image_token_id: int | None = None,
        project_gradient: bool = True,
        offload: bool = False,
        progress: bool = True,
        fit_save_steps: int | None = None,
        protect: Sequence[Mapping[str, NullSpace]] = (),
        statistics: Statistics | None = None,
    ):
        if (retain_dataloader is None and statistics is None) == (null_spaces is None):
            raise ValueError("give either `retain_dataloader` (or `statistics`) or `null_spaces`, and not both.")
        if retain_dataloader is not None:
            check_loader(retain_dataloader)
            if statistics is None and isinstance(rows := getattr(retain_dataloader, "dataset", None), RetainedRows):
                rows.warn_if_few(stacklevel=2)
        self.retain_dataloader = retain_dataloader
        self.null_spaces = null_spaces
        self.adapter_name = adapter_name
        self.image_token_id = image_token_id
        self.project_gradient = project_gradient
        self.offload = offload
        self.progress = progress
        self.fit_save_steps = fit_save_steps
        self.protect = protect
        self.statistics = statistics
        self.observer: BatchObserver | None = None  # Who looks on while it fits.
        self.resumed_from: str | os.PathLike | None = None  # where a Trainer knows it; it does not tell its callbacks
        self._given = null_spaces is not None
        self._attached: AttachedNullSpace | None = None

    @weights_at_rest()
    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        begin("fit")
        self._detach()  # a run that ended in an exception, or an automatic change of the batch size
        layers = adapted_layers(model, self.adapter_name)
        adapter_config(model, self.adapter_name)
        resumed = state.global_step > 0
        trained_under = state.stateful_callbacks.get(_RECORD, {}).get("null_spaces") if resumed else None
        if not self._given:
            if resumed:
                # Read by rank 0 for all: on several machines, the others may not see its disk.
                places = [self.resumed_from, args.resume_from_checkpoint, _checkpoint(args, state)]
                found = divide([places], lambda places: _saved_null_spaces(places, layers, trained_under))[0]
                self.null_spaces = found
            if self.null_spaces is not None:
                self._check_or_forget(model, resumed)
        fitted = self._fit(args, model) if self.null_spaces is None else self.null_spaces
        if self.offload:  # or the ones that were fitted on a device would stay there beside the offloaded ones
            fitted = offload_null_spaces(fitted, pin=args.device.type == "cuda")
        self.null_spaces = fitted
        self._attached = attach_null_space(
            model,
            optimizer,
            fitted,
            self.adapter_name,
            project_gradient=self.project_gradient,
            project_initial=not resumed,
            offload=self.offload,
        )
        done(f"fitted the constraint of {len(layers)} layers")
        now = _digest(fitted, layers)
        if trained_under is not None and trained_under != now:
            self._detach()
            raise ValueError(
                "the checkpoint was trained under null spaces that were fitted for something else than those of this run "
                "(another base model, other settings or other retained data). " + _REMEDY
            )
        # Saved in every checkpoint's trainer_state.json, so that its null spaces can be told from another run's.
        state.stateful_callbacks[_RECORD] = {"null_spaces": now}

    def _check_or_forget(self, model, resumed: bool) -> None:
        """Keeps null spaces of an earlier fit only if a new one would give the same."""
        assert self.null_spaces is not None
        different = fit_differences(
            model,
            self.null_spaces,
            self.adapter_name,
            data=lambda: data_digest(model, self.retain_dataloader or ()),
            image_token_id=self.image_token_id,
            protect=protect_digest(self.protect),
            base_statistics="" if self.statistics is None else self.statistics.digest(),
        )
        if not different:
            return
        if resumed:
            raise ValueError(f"the run is not resumed as its checkpoint was trained: {'; '.join(different)}. {_REMEDY}")
        logger.info("The null spaces are fitted again, because %s.", "; ".join(different))
        self.null_spaces = None

    def _fit(self, args, model) -> dict[str, NullSpace]:
        saving: dict[str, Any] = {}
        if self.fit_save_steps is not None:
            saving = {"save_to": Path(args.output_dir, FIT_PROGRESS_NAME), "save_every": self.fit_save_steps}
        return fit_null_space(
            model,
            self.retain_dataloader,
            self.adapter_name,
            image_token_id=self.image_token_id,
            progress=self.progress and not args.disable_tqdm,
            protect=self.protect,
            statistics=self.statistics,
            observer=self.observer,
            **saving,
        )

    def note_weights(self) -> None:
        """Notes in the adapter's config that its weights as they are now are projected; before they are saved."""
        if self._attached is not None:
            self._attached.note_weights()

    def on_save(self, args, state, control, model=None, **kwargs):
        self.note_weights()
        folder = _checkpoint(args, state)
        if not state.is_world_process_zero or self.null_spaces is None or not folder.is_dir():
            return
        save_null_spaces(folder / NULL_SPACES_NAME, self.null_spaces)
        # Trainer saved the adapter before, with the note of an earlier step. PEFT gives adapters of other names folders.
        for place in (folder / self.adapter_name, folder):
            if (place / SPACE_CONFIG_NAME).is_file():
                adapter_config(model, self.adapter_name).save_space_fields(place)
                break

    def on_train_end(self, args, state, control, **kwargs):
        self._detach()

    def _detach(self) -> None:
        if self._attached is not None:
            self._attached.remove()
            self._attached = None


def _checkpoint(args, state) -> Path:
    return Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def _digest(null_spaces: Mapping[str, NullSpace], layers: Iterable[str]) -> str:
    return fit_digest({name: null_spaces[name] for name in layers})


def _saved_null_spaces(places: Sequence, layers: Iterable[str], wanted: str | None) -> dict[str, NullSpace] | None:
    """The null spaces saved in the first of some checkpoints that has those which a run was trained under."""
    for folder in places:
        if not isinstance(folder, (str, os.PathLike)) or not Path(folder, NULL_SPACES_NAME).is_file():
            continue
        spaces = load_null_spaces(Path(folder, NULL_SPACES_NAME))
        # A checkpoint of version 0.1.0 does not say which ones they were.
        if wanted is None or all(name in spaces for name in layers) and _digest(spaces, layers) == wanted:
            return spaces
    return None
