"""The constraint for any `Trainer`: fits the null spaces when training begins, and projects every step."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .distributed import divide
from .fit_progress import FIT_PROGRESS_NAME
from .fitting import fit_null_space
from .layers import adapter_config
from .null_space import NullSpace, load_null_spaces, save_null_spaces
from .projection import AttachedNullSpace, attach_null_space, offload_null_spaces


NULL_SPACES_NAME = "space_stats.safetensors"


class NullSpaceCallback(TrainerCallback):
    """
    Trains an adapter in the null space of retained data with any `Trainer`: transformers' own, TRL's `SFTTrainer`, ...

    When training begins it fits the null spaces, unless they are given, and attaches them to the trainer's optimiser.
    They are saved with each checkpoint (`space_stats.safetensors`), and a resumed run takes them from there, or fits
    them again if the file is missing, and goes on from the checkpoint's weights.

    Args:
        retain_dataloader (iterable of `dict[str, torch.Tensor]`, *optional*): Batches of retained data as
            [`fit_null_space`] takes them, e.g. `DataLoader(retained, batch_size=8, collate_fn=collator)`.
        null_spaces (`dict[str, NullSpace]`, *optional*): Null spaces fitted before; one of the two must be given.
        adapter_name (`str`, defaults to `"default"`): The adapter.
        image_token_id (`int`, *optional*): See [`fit_null_space`].
        project_gradient (`bool`, defaults to `True`): See [`attach_null_space`].
        offload (`bool`, defaults to `False`): See [`attach_null_space`].
        progress (`bool`, defaults to `True`): Whether to show progress bars while fitting.
        fit_save_steps (`int`, *optional*): Retained batches after which the sums are saved in the output folder, again
            and again, so that a run killed while fitting goes on from there; never by default. See [`fit_null_space`].
        protect (`list[dict[str, NullSpace]]`, *optional*): See [`fit_null_space`].

    Raises:
        ValueError: If neither or both of `retain_dataloader` and `null_spaces` are given.
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
    ):
        if (retain_dataloader is None) == (null_spaces is None):
            raise ValueError("give either `retain_dataloader` or `null_spaces`, and not both.")
        self.retain_dataloader = retain_dataloader
        self.null_spaces = null_spaces
        self.adapter_name = adapter_name
        self.image_token_id = image_token_id
        self.project_gradient = project_gradient
        self.offload = offload
        self.progress = progress
        self.fit_save_steps = fit_save_steps
        self.protect = protect
        self._attached: AttachedNullSpace | None = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self._detach()  # a run that ended in an exception, or an automatic change of the batch size
        adapter_config(model, self.adapter_name)
        resumed = state.global_step > 0
        if self.null_spaces is None and resumed:
            # Read by rank 0 for all: on several machines, the others may not see its disk.
            self.null_spaces = divide([args], lambda args: _saved_null_spaces(args, state))[0]
        if self.null_spaces is None:
            saving = {}
            if self.fit_save_steps is not None:
                saving = {"save_to": Path(args.output_dir, FIT_PROGRESS_NAME), "save_every": self.fit_save_steps}
            self.null_spaces = fit_null_space(
                model,
                self.retain_dataloader,
                self.adapter_name,
                image_token_id=self.image_token_id,
                progress=self.progress and not args.disable_tqdm,
                protect=self.protect,
                **saving,
            )
        if self.offload:  # or the ones that were fitted on a device would stay there beside the offloaded ones
            self.null_spaces = offload_null_spaces(self.null_spaces, pin=args.device.type == "cuda")
        self._attached = attach_null_space(
            model,
            optimizer,
            self.null_spaces,
            self.adapter_name,
            project_gradient=self.project_gradient,
            project_initial=not resumed,
            offload=self.offload,
        )

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if state.is_world_process_zero and self.null_spaces is not None and folder.is_dir():
            save_null_spaces(folder / NULL_SPACES_NAME, self.null_spaces)

    def on_train_end(self, args, state, control, **kwargs):
        self._detach()

    def _detach(self) -> None:
        if self._attached is not None:
            self._attached.remove()
            self._attached = None


def _saved_null_spaces(args, state) -> dict[str, NullSpace] | None:
    """The null spaces saved with the checkpoint that a run was resumed from."""
    folders = [Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")]
    if isinstance(args.resume_from_checkpoint, (str, os.PathLike)):
        folders.insert(0, Path(args.resume_from_checkpoint))
    saved = next((folder / NULL_SPACES_NAME for folder in folders if (folder / NULL_SPACES_NAME).is_file()), None)
    return None if saved is None else load_null_spaces(saved)
