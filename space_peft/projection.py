"""Keeping a LoRA in the null space while any torch optimiser trains it.

Projecting gradients is not enough: Adam scales them element by element, which leads out of the subspace, and weight
decay and momentum have lives of their own. So the *update* is projected, after the optimiser has made it:
`A <- A_prev + (A - A_prev) P`, starting from `A_0 P`. `A = A' P` then holds at every moment for some `A'`
(METHOD.md, section 5).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .fitting import fit_null_space
from .layers import adapted_layers, adapter_config, lora_weights
from .null_space import NullSpace, load_null_spaces, save_null_spaces


NULL_SPACES_NAME = "space_stats.safetensors"


class AttachedNullSpace:
    """
    What [`attach_null_space`] returns: `remove()` takes the projection off the optimiser again. Also a context manager.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimiser to hook into.
        pairs (`list[tuple[nn.Parameter, NullSpace]]`): Each `A` `(r, d)` with its null space.
        project_gradient (`bool`): Whether to project the gradients, too.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, pairs: list[tuple[nn.Parameter, NullSpace]], project_gradient: bool
    ):
        self._pairs = pairs
        self._project_gradient = project_gradient
        # The only copies kept. They are refreshed before each step, so weights that something else loads between steps
        # (a checkpoint, the best model) are taken as they are. P^2 = P makes a copy unnecessary for a hard constraint.
        self._previous = [None if space.constraint == "hard" else torch.empty_like(a) for a, space in pairs]
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @torch.no_grad()
    def _before_step(self, optimizer, args, kwargs) -> None:
        for (a, space), previous in zip(self._pairs, self._previous, strict=True):
            if previous is not None:
                previous.copy_(a)
            if self._project_gradient and a.grad is not None:
                a.grad.copy_(space.project(a.grad))

    @torch.no_grad()
    def _after_step(self, optimizer, args, kwargs) -> None:
        for (a, space), previous in zip(self._pairs, self._previous, strict=True):
            if previous is None:
                # The same as projecting the update, for A_prev is in the null space, but rounding errors of the steps
                # do not pile up outside of it.
                a.copy_(space.project(a))
            else:
                a.copy_(previous + space.project(a - previous))

    def remove(self) -> None:
        """Takes the hooks off the optimiser; the weights stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> AttachedNullSpace:
        return self

    def __exit__(self, *exception) -> None:
        self.remove()


def attach_null_space(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    null_spaces: Mapping[str, NullSpace],
    adapter_name: str = "default",
    *,
    project_gradient: bool = True,
    project_initial: bool = True,
) -> AttachedNullSpace:
    """Projects every update that an optimiser makes to an adapter's `A` onto the layers' null spaces.

    `B` needs no projection, since `dW = s B A` is in the null space whenever `A` is. Works with every
    `torch.optim.Optimizer`, also wrapped by accelerate, with learning rate schedulers, and with steps that a gradient
    scaler skips; the optimiser's `state_dict` is not touched.

    Args:
        model (`PeftModel` or `PreTrainedModel`): The adapted model.
        optimizer (`torch.optim.Optimizer`): Must hold the adapter's weights and no other weights of the model.
        null_spaces (`dict[str, NullSpace]`): By layer name, from [`fit_null_space`] or [`load_null_spaces`].
        adapter_name (`str`, defaults to `"default"`): The adapter.
        project_gradient (`bool`, defaults to `False`): Whether to project the gradient of `A` before the step, too.
            With the soft constraint, training then takes the path of `A'` in `A = A' P` (but for weight decay).
        project_initial (`bool`, defaults to `True`): Whether to project the weights as they are now, `A <- A P`.
            Must be `False` when training is resumed: a soft projection applied twice is another one.

    Returns:
        [`AttachedNullSpace`]: With `remove()`.

    Raises:
        ValueError: If an adapted layer has no null space, or one of another dimension, or if the optimiser does not
            hold the adapter's weights, or holds others of the model.
    """
    while not hasattr(optimizer, "_optimizer_step_post_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer  # accelerate's wrapper: the hooks go on the optimiser that makes the step
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"`optimizer` is a {type(optimizer).__name__}; expected a torch.optim.Optimizer.")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    pairs, ours = [], set()
    moved: dict[tuple[int, torch.device], NullSpace] = {}  # layers that share a null space share its copy on a device
    for name, layer in adapted_layers(model, adapter_name).items():
        a, b, _ = lora_weights(layer, adapter_name)
        ours |= {id(a), id(b)}
        if name not in null_spaces:
            raise ValueError(
                f"adapted layer {name!r} has no null space, so it would train without the constraint; fit the null "
                f"spaces of this model with fit_null_space (got {len(null_spaces)} for other layers or fewer)."
            )
        space = null_spaces[name]
        if space.dim != a.shape[1]:
            raise ValueError(
                f"the null space of layer {name!r} has d = {space.dim}, but its lora_A takes d = {a.shape[1]} inputs; "
                "it was fitted on another model. Fit it on this one."
            )
        if id(a) not in held:
            raise ValueError(
                f"the optimiser does not hold lora_A of layer {name!r}, so its update cannot be projected. Build it "
                "from this model's trainable parameters, after the adapter was added; optimisers that flatten or "
                "shard parameters (FSDP, DeepSpeed ZeRO 3) are not supported."
            )
        if space.constraint == "none":
            continue
        if a.dtype not in (torch.float32, torch.float64):
            warnings.warn(
                f"lora_A of layer {name!r} is {a.dtype}: rounding it leaks about "
                f"{torch.finfo(a.dtype).eps / 2:.0e} of every weight out of the null space. Train the adapter in "
                "float32 (get_peft_model does by default).",
                stacklevel=2,
            )
        pairs.append((a, moved.setdefault((id(space), a.device), space.to(a.device))))
    others = held - ours
    free = [name for name, weight in model.named_parameters() if id(weight) in others and weight.requires_grad]
    if free:
        raise ValueError(
            f"the optimiser also trains {len(free)} weights of the model that no null space constrains, the first is "
            f"{free[0]!r}; freeze them, or give the optimiser only those of adapter {adapter_name!r}."
        )
    if project_initial:
        with torch.no_grad():
            for a, space in pairs:
                a.copy_(space.project(a))
    return AttachedNullSpace(optimizer, pairs, project_gradient)


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
        progress (`bool`, defaults to `True`): Whether to show progress bars while fitting.

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
        progress: bool = True,
    ):
        if (retain_dataloader is None) == (null_spaces is None):
            raise ValueError("give either `retain_dataloader` or `null_spaces`, and not both.")
        self.retain_dataloader = retain_dataloader
        self.null_spaces = null_spaces
        self.adapter_name = adapter_name
        self.image_token_id = image_token_id
        self.project_gradient = project_gradient
        self.progress = progress
        self._attached: AttachedNullSpace | None = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self._detach()  # a run that ended in an exception, or an automatic change of the batch size
        adapter_config(model, self.adapter_name)
        resumed = state.global_step > 0
        if self.null_spaces is None and resumed:
            saved = _saved_null_spaces(args, state)
            self.null_spaces = None if saved is None else load_null_spaces(saved)
        if self.null_spaces is None:
            self.null_spaces = fit_null_space(
                model,
                self.retain_dataloader,
                self.adapter_name,
                image_token_id=self.image_token_id,
                progress=self.progress and not args.disable_tqdm,
            )
        self._attached = attach_null_space(
            model,
            optimizer,
            self.null_spaces,
            self.adapter_name,
            project_gradient=self.project_gradient,
            project_initial=not resumed,
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


def _saved_null_spaces(args, state) -> Path | None:
    """The null spaces saved with the checkpoint that a run was resumed from."""
    folders = [Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")]
    if isinstance(args.resume_from_checkpoint, (str, os.PathLike)):
        folders.insert(0, Path(args.resume_from_checkpoint))
    return next((folder / NULL_SPACES_NAME for folder in folders if (folder / NULL_SPACES_NAME).is_file()), None)
