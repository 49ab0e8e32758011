"""Keeping a LoRA in the null space while any torch optimiser trains it.

Projecting gradients is not enough: Adam scales them element by element, which leads out of the subspace, and weight
decay and momentum have lives of their own. So the *update* is projected, after the optimiser has made it:
`A <- A_prev + (A - A_prev) P`, starting from `A_0 P`. `A = A' P` then holds at every moment for some `A'`
(docs/method.md, section 4).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import nn

from ..distributed.processes import check_supported, local_rows, reshard
from ..distributed.zero import CutRows, partitioned_rows, zero_optimizer
from ..modeling.layers import adapted_layers, adapter_config, check_untied, lora_weights, quantised_4bit
from .differences import fit_differences, fit_digest, warn_without_identity
from .identity import adapter_digest
from .precision import exact_products
from .space import NullSpace


class AttachedNullSpace:
    """
    What [`attach_null_space`] returns: `remove()` takes the projection off the optimiser again. Also a context manager.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimiser to hook into.
        groups (`list[tuple[list[nn.Parameter], NullSpace]]`): The `A` `(r, d)` of layers that share a null space (q/k/v,
            gate/up), a device and a dtype.
        project_gradient (`bool`): Whether to project the gradients, too.
        cut_rows (`CutRows`, *optional*): With DeepSpeed, the rows of `A` that no process holds whole.
        note (`Callable`, *optional*): Called when the weights, as they are, are known to be in the null space.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        groups: list[tuple[list[nn.Parameter], NullSpace]],
        project_gradient: bool,
        cut_rows: CutRows | None = None,
        note: Callable[[], None] | None = None,
    ):
        self._note = note
        self._whole_rows = contextlib.nullcontext if cut_rows is None else cut_rows.whole
        self._groups = [_Group(weights, space) for weights, space in groups]
        self._device_types = {weight.device.type for weights, _ in groups for weight in weights}
        self._project_gradient = project_gradient
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @torch.no_grad()
    def _before_step(self, optimizer, args, kwargs) -> None:
        with exact_products(self._device_types), self._whole_rows():
            for group in self._groups:
                group.remember()
                if self._project_gradient:
                    group.project_gradient()

    @torch.no_grad()
    def _after_step(self, optimizer, args, kwargs) -> None:
        with exact_products(self._device_types), self._whole_rows():
            for group in self._groups:
                group.project_update()

    @torch.no_grad()
    def project(self) -> None:
        """Projects the weights as they are now, `A <- A P`."""
        with exact_products(self._device_types), self._whole_rows():
            for group in self._groups:
                group.project()

    def note_weights(self) -> None:
        """Notes in the adapter's config, which is saved with it, that its `A` as it is now is projected already.

        In a distributed run all processes must call it.
        """
        if self._note is not None and self._handles:
            self._note()

    def remove(self) -> None:
        """Takes the hooks off the optimiser; the weights stay as they are, and are noted."""
        self.note_weights()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> AttachedNullSpace:
        return self

    def __exit__(self, *exception) -> None:
        self.remove()


class _Group:
    """The `A` of layers that share a null space, a device and a dtype; offloaded eigenvectors come once for them all."""

    def __init__(self, weights: list[nn.Parameter], space: NullSpace):
        self._weights = weights
        self._space = space
        self._idempotent = space.idempotent
        self._low_precision = weights[0].dtype.itemsize < 4
        self._dtype = torch.promote_types(weights[0].dtype, torch.float32)
        self._gain = space.filters.to(weights[0].device, self._dtype) - space.outside  # (k,)
        self._previous: list[torch.Tensor] | None = None  # every A_prev, during a step
        self._exact: list[torch.Tensor] | None = None  # every A in float32, where the weights are of lower precision

    def remember(self) -> None:
        """Takes `A_prev` before a step: the weights as they are, whatever was loaded into them since the last one."""
        if not self._idempotent or self._low_precision:  # see project_update
            self._previous = [a.float() if self._low_precision else a.clone() for a in self._local_weights()]

    def project_gradient(self) -> None:
        gradients = [gradient for a in self._weights if (gradient := _local_gradient(a)) is not None]
        self._project_in_place(gradients)

    def project(self) -> None:
        """`A <- A P`."""
        projected = self._project_in_place(self._local_weights())
        self._exact = projected if self._low_precision else None

    def project_update(self) -> None:
        """`A <- A_prev + (A - A_prev) P`."""
        previous, self._previous = self._previous, None
        if previous is None:
            # The same, for A_prev is in the null space and P^2 = P, but rounding errors of the steps do not pile up.
            self.project()
            return
        local = self._local_weights()
        updates = self._project_in_place([a - before for a, before in zip(local, previous, strict=True)])
        if self._exact is not None:
            # Weights that still are what the exact ones round to were not loaded from elsewhere.
            pairs = zip(self._exact, previous, strict=True)
            previous = [torch.where(a.to(local[0].dtype) == before, a, before) for a, before in pairs]
        for a, before, update in zip(local, previous, updates, strict=True):
            torch.add(before, update, out=a)
        if self._low_precision:
            self._exact = [before + update for before, update in zip(previous, updates, strict=True)]

    def _local_weights(self) -> list[torch.Tensor]:
        return [_local_weight(a) for a in self._weights]

    def _project_in_place(self, matrices: list[torch.Tensor]) -> list[torch.Tensor]:
        """`X <- X P`, as [`NullSpace.project`] does; returns the results in float32 or better.

        Three kernels a matrix and `(r, k)` of memory. Joining the matrices, or stacking them over layers, was measured
        to be no faster, for the copies it takes (`docs/precision.md`).
        """
        if not matrices:
            return []
        basis = self._space.eigenvectors.to(matrices[0].device, self._dtype)  # (d, k)
        exact = [matrix.to(self._dtype) for matrix in matrices]
        for matrix, x in zip(matrices, exact, strict=True):
            x.addmm_((x @ basis).mul_(self._gain), basis.T, beta=self._space.outside)
            if x is not matrix:
                matrix.copy_(x)
        return exact


def _local_weight(a: nn.Parameter) -> torch.Tensor:
    """The rows of `A` that this process holds; writing to them changes the parameter."""
    return local_rows(a)


def _local_gradient(a: nn.Parameter) -> torch.Tensor | None:
    """The gradient of those rows."""
    return None if a.grad is None else local_rows(a.grad)


def attach_null_space(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    null_spaces: Mapping[str, NullSpace],
    adapter_name: str = "default",
    *,
    project_gradient: bool = True,
    project_initial: bool = True,
    offload: bool = False,
) -> AttachedNullSpace:
    """Projects every update that an optimiser makes to an adapter's `A` onto the layers' null spaces.

    `B` needs no projection, since `dW = s B A` is in the null space whenever `A` is. Works with every
    `torch.optim.Optimizer`, also wrapped by accelerate, with learning rate schedulers, and with steps that a gradient
    scaler skips; the optimiser's `state_dict` is not touched. Each `A` is projected on its own device, in float32
    (float64 if it is that), whatever autocast and TF32 are set to.

    Args:
        model (`PeftModel` or `PreTrainedModel`): The adapted model.
        optimizer (`torch.optim.Optimizer`): Must hold the adapter's weights and no other weights of the model.
        null_spaces (`dict[str, NullSpace]`): By layer name, from [`fit_null_space`] or [`load_null_spaces`], for this
            base model and the settings of this adapter's config. Those that do not say what they were fitted on (files
            of version 0.1.0) are taken with a warning.
        adapter_name (`str`, defaults to `"default"`): The adapter.
        project_gradient (`bool`, defaults to `True`): Whether to project the gradient of `A` before the step, too.
            With the soft constraint, training then takes the path of `A'` in `A = A' P` (but for weight decay).
        project_initial (`bool`, defaults to `True`): Whether to project the weights as they are now, `A <- A P`. Weights
            that were trained under these null spaces, in this process or before they were saved, stay as they are all
            the same, for a soft projection applied twice is another one: the adapter's config notes it. `False` where
            it cannot (weights of a checkpoint loaded into the model).
        offload (`bool`, defaults to `False`): Whether eigenvectors stay in CPU memory (pinned if a weight is on a CUDA
            device) and visit a weight's device one null space at a time. Same result; slower steps.

    Returns:
        [`AttachedNullSpace`]: With `remove()`.

    Raises:
        ValueError: If an adapted layer has no null space, or one of another dimension, or if the optimiser does not
            hold the adapter's weights, or holds others of the model, or keeps two versions of them (schedule-free
            ones), or a weight is on the meta device, or the null spaces were fitted for another base model or other
            settings.
    """
    zero = zero_optimizer(optimizer)
    while not hasattr(optimizer, "_optimizer_step_post_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer  # accelerate's wrapper: the hooks go on the optimiser that makes the step
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"`optimizer` is a {type(optimizer).__name__}; expected a torch.optim.Optimizer.")
    _check_one_version(optimizer)
    check_supported(model)
    reshard(model)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if zero is not None:
        parameters = [parameter for group in zero.bit16_groups for parameter in group]
    weights = _constrained_weights(model, parameters, null_spaces, adapter_name)
    own_spaces = {name: null_spaces[name] for name in weights}
    if different := fit_differences(model, own_spaces, adapter_name):
        raise ValueError(
            f"these null spaces were fitted for something else: {'; '.join(different)}. Fit them for this model and "
            "adapter with fit_null_space (or give NullSpaceCallback a retain_dataloader instead), or use the base model "
            "and the SpaceLoraConfig they were fitted for."
        )
    warn_without_identity(own_spaces, stacklevel=2)
    projected = _Projected(model, adapter_name, fit_digest(own_spaces))
    rows, cut_rows = ({name: [a] for name, a in weights.items()}, None)
    if zero is not None:
        rows, cut_rows = partitioned_rows(zero, weights)
    on_cuda = any(a.device.type == "cuda" for a in weights.values())
    if offload:
        null_spaces = offload_null_spaces(null_spaces, pin=on_cuda)
    groups: dict[tuple, tuple[list[nn.Parameter], NullSpace]] = {}
    for name, own in rows.items():
        space = null_spaces[name]
        if not space.acts:
            continue
        for a in own:
            key = (id(space), a.device, a.dtype)
            if key not in groups:
                # One copy on a device, and none if it is there already.
                groups[key] = ([], space if offload else space.to(a.device))
            groups[key][0].append(a)
    attached = AttachedNullSpace(optimizer, list(groups.values()), project_gradient, cut_rows, projected.note)
    if project_initial and not projected.is_noted():
        attached.project()
        if zero is not None:
            zero.update_lp_params()  # what the model computes with, from the partitions
    attached.note_weights()
    return attached


class _Projected:
    """The note in an adapter's config of which `A` is projected by which null spaces; both by their digests."""

    def __init__(self, model: nn.Module, adapter_name: str, null_spaces: str):
        self._model, self._name, self._null_spaces = model, adapter_name, null_spaces

    def _now(self) -> dict[str, str]:
        return {"null_spaces": self._null_spaces, "lora_A": adapter_digest(self._model, self._name, ("lora_A",))}

    def is_noted(self) -> bool:
        return adapter_config(self._model, self._name).projected == self._now()

    def note(self) -> None:
        # In a config of the model's own: the user's may serve for several.
        config = copy.copy(adapter_config(self._model, self._name))
        config.projected = self._now()
        self._model.peft_config[self._name] = config


def _check_one_version(optimizer: torch.optim.Optimizer) -> None:
    """Refuses optimisers under which the weights that are trained are not those that are evaluated and saved."""
    if callable(getattr(optimizer, "eval", None)) or any("train_mode" in group for group in optimizer.param_groups):
        raise ValueError(
            f"{type(optimizer).__name__} keeps two versions of the weights (schedule-free: one to train, one to evaluate, "
            "put in place by its `eval`), and only the one that a step leaves would be kept in the null space. Use "
            'another one, e.g. optim="adamw_torch" with lr_scheduler_type="constant_with_warmup".'
        )


def offload_null_spaces(null_spaces: Mapping[str, NullSpace], *, pin: bool = False) -> dict[str, NullSpace]:
    """Returns the same null spaces in CPU memory; layers that share one still do.

    Args:
        null_spaces (`dict[str, NullSpace]`): By layer name.
        pin (`bool`, defaults to `False`): Whether to pin the eigenvectors, for faster copies to a CUDA device.
    """
    moved: dict[int, NullSpace] = {}
    for space in null_spaces.values():
        if id(space) not in moved:
            host = space.to("cpu")
            if pin and not host.eigenvectors.is_pinned():
                host = dataclasses.replace(host, eigenvectors=host.eigenvectors.pin_memory())
            moved[id(space)] = host
    return {name: moved[id(space)] for name, space in null_spaces.items()}


def _constrained_weights(
    model: nn.Module, parameters: list[nn.Parameter], null_spaces: Mapping[str, NullSpace], adapter_name: str
) -> dict[str, nn.Parameter]:
    """Every `A` of the adapter by layer name, once all of them are known to train under their null space."""
    held = {id(parameter) for parameter in parameters}
    weights, ours = {}, set()
    layers = adapted_layers(model, adapter_name)
    check_untied(model, layers)
    for name, layer in layers.items():
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
        if a.device.type == "meta":
            raise ValueError(
                f"lora_A of layer {name!r} is on the meta device, because PEFT puts the adapter of an offloaded layer "
                "there, so there is nothing to train. Keep adapted layers in memory (device_map), load the model in 8 or 4 "
                "bits, or leave offloaded layers out of target_modules."
            )
        if id(a) not in held:
            raise ValueError(
                f"the optimiser does not hold lora_A of layer {name!r}, so its update cannot be projected. Build it "
                "from this model's trainable parameters, after the adapter was added and the model prepared by "
                "accelerate; optimisers that flatten parameters are not supported, except for DeepSpeed's ZeRO 1 and 2."
            )
        weights[name] = a
    for name, module in quantised_4bit(model).items():
        if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
            raise ValueError(
                f"the 4-bit weights of {name!r} are laid out for inference on a CPU, where gradients cannot pass; "
                "bitsandbytes does so when a model is used in evaluation mode. Load it again before training."
            )
    low = {name: a.dtype for name, a in weights.items() if a.dtype.itemsize < 4}
    if low and any(null_spaces[name].acts for name in low):
        name, dtype = next(iter(low.items()))
        warnings.warn(
            f"{len(low)} lora_A are of low precision, the first is {dtype} in layer {name!r}. They are projected in "
            f"float32, but what is saved is rounded: about {torch.finfo(dtype).eps / 8:.0e} of each lies outside of its "
            "null space. Train the adapter in float32 (get_peft_model does by default).",
            stacklevel=3,
        )
    others = held - ours
    free = [name for name, weight in model.named_parameters() if id(weight) in others and weight.requires_grad]
    if free:
        raise ValueError(
            f"the optimiser also trains {len(free)} weights of the model that no null space constrains, the first is "
            f"{free[0]!r}; freeze them, or give the optimiser only those of adapter {adapter_name!r}."
        )
    return weights
