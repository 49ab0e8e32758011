"""What an erasure is going to take, computed from shapes alone: the model may be on the meta device, without weights.

Counts of parameters, modules, bytes of second moments and null spaces are those that the run has (tested on tiny models);
FLOPs count products with weights, and activations are an estimate, see [`ErasurePlan`].
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from ..distributed import processes
from ..modeling.features import attends_to_images
from ..modeling.layers import adapted_layers, adapter_config, base_model, check_untied
from ..modeling.targets import default_target_modules, linear_modules, part_of, side_of
from .base_statistics import kept_rank
from .collecting import linear_layers
from .constraints import FITTED, computed_pairs, most_columns
from .moments import sum_flops
from .observing import visual_tokens
from .spectral import decomposition_flops, takes_all
from .workload import Workload


PARTS = ("tower", "projector", "language", "other")
# Layers of one module that read the same tensor, by the names that transformers gives them. A name that is not here counts
# as an input of its own: a plan may then say more than the run takes, not less.
_READ_TOGETHER = ({"q_proj", "k_proj", "v_proj"}, {"query", "key", "value"}, {"gate_proj", "up_proj"}, {"w1", "w3"})
_KEYS_AND_VALUES = {"k_proj", "v_proj"}
# AdamW: the parameter, its gradient, two moments.
_STATES = 4


@dataclass(frozen=True)
class PlannedLayer:
    """
    One layer that gets the adapter.

    Args:
        name (`str`): In the base model.
        part (`str`): "tower", "projector", "language" or "other".
        inputs (`int`): `d`.
        outputs (`int`): `m`.
        rank (`int`): The adapter's.
        parameters (`int`): The adapter's, in this layer.
        source (`str`): The first layer that reads the same input: they share second moment and null space.
        kinds (`tuple[str, ...]`): Kinds of tokens it sees; one sum of second moments each.
        columns (`int`): Eigenvectors that its null space keeps at most.
    """

    name: str
    part: str
    inputs: int
    outputs: int
    rank: int
    parameters: int
    source: str
    kinds: tuple[str, ...]
    columns: int


@dataclass(frozen=True)
class ErasurePlan:
    """
    A dry run.

    Args:
        model (`str`): Its class.
        dtype (`str`): Of its weights.
        constraint (`str`): "soft", "hard" or "none".
        layers (`tuple[PlannedLayer, ...]`): Those adapted.
        workload ([`Workload`]): What it was planned for.
        weights (`dict[str, int]`): Bytes by part of the model.
        adapter_state (`int`): Bytes of the adapter's weights, gradients and AdamW's moments.
        sums (`int`): Bytes of the second moments' sums while fitting.
        largest_sum (`int`): Bytes of the largest of them: a decomposition makes another one.
        null_spaces (`int`): Bytes of the null spaces, at most.
        activations (`int`): Bytes that a step keeps for its backward pass; an estimate, without checkpointing.
        published (`int`, *optional*): Bytes of statistics of all layers, see [`collect_statistics`]; `None` if the model has
            no part of a known name.
        counted (`int`): Tokens of the retained rows that count in the statistics of the layer that sees most.
        flops (`dict[str, float]`): Of "passes" and "sums" while fitting, "decomposition", one "step", all "steps".
        refused (`tuple[str, ...]`): What the library would refuse, in its words.
        seconds (`dict[str, float]`, *optional*): Expected, if a step was timed: of "fitting", "decomposition", one "step",
            "steps" and "all".
    """

    model: str
    dtype: str
    constraint: str
    layers: tuple[PlannedLayer, ...]
    workload: Workload
    weights: dict[str, int]
    adapter_state: int
    sums: int
    largest_sum: int
    null_spaces: int
    activations: int
    published: int | None
    counted: int
    flops: dict[str, float]
    refused: tuple[str, ...]
    seconds: dict[str, float] | None = None

    @property
    def unique(self) -> tuple[PlannedLayer, ...]:
        """One layer of each input."""
        return tuple(layer for layer in self.layers if layer.source == layer.name)

    @property
    def parameters(self) -> int:
        """The adapter's."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def fitting(self) -> int:
        """Bytes needed while fitting, but for one forward pass's own."""
        return sum(self.weights.values()) + self.adapter_state // _STATES + self.sums + self.largest_sum

    @property
    def training(self) -> int:
        """Bytes needed while training."""
        return sum(self.weights.values()) + self.adapter_state + self.null_spaces + self.activations

    def kinds_of_layers(self) -> list[tuple[str, list[PlannedLayer]]]:
        """Layers that differ in a number of their names alone, by that pattern."""
        groups: dict[tuple, list[PlannedLayer]] = {}
        for layer in self.layers:
            # A number at the end tells a Linear from its neighbours in a Sequential.
            pattern = re.sub(r"\.\d+(?=\.)", ".*", layer.name)
            groups.setdefault((pattern, layer.inputs, layer.outputs, layer.rank), []).append(layer)
        return [(key[0], layers) for key, layers in groups.items()]

    def to_dict(self) -> dict:
        """Everything, for JSON."""
        by_part = {part: sum(layer.part == part for layer in self.layers) for part in PARTS}
        return {
            "model": self.model,
            "dtype": self.dtype,
            "constraint": self.constraint,
            "modules": {part: count for part, count in by_part.items() if count},
            "layers": [
                {
                    "name": pattern, "part": layers[0].part, "count": len(layers), "inputs": layers[0].inputs,
                    "outputs": layers[0].outputs, "rank": layers[0].rank, "kept": layers[0].columns,
                    "left": layers[0].inputs - layers[0].columns,
                    "parameters": sum(layer.parameters for layer in layers),
                }
                for pattern, layers in self.kinds_of_layers()
            ],
            "unique_inputs": len(self.unique),
            "parameters": self.parameters,
            "bytes": {
                "weights": self.weights, "adapter_and_optimizer": self.adapter_state, "sums": self.sums,
                "null_spaces": self.null_spaces, "activations": self.activations, "fitting": self.fitting,
                "training": self.training, "published_statistics": self.published,
            },
            "tokens": {**vars(self.workload), "read": self.workload.rows * self.workload.row_tokens, "counted": self.counted},
            "flops": self.flops,
            "seconds": self.seconds,
            "refused": list(self.refused),
        }  # fmt: skip

    def timed(self, step: float) -> dict[str, float]:
        """Seconds of everything, at the rate of a step that was timed.

        Args:
            step (`float`): Seconds of one optimiser step of this plan.
        """
        rate = self.flops["step"] / step
        seconds = {
            "fitting": (self.flops["passes"] + self.flops["sums"]) / rate,
            "decomposition": self.flops["decomposition"] / rate,
            "steps": step * self.workload.steps,
        }
        return {"step": step, **seconds, "all": sum(seconds.values())}


def plan_erasure(model: nn.Module, workload: Workload, adapter_name: str = "default") -> ErasurePlan:
    """Says what fitting and training an adapter take.

    Args:
        model (`PeftModel`): With the adapter, from `get_peft_model`; weights may be on the meta device.
        workload ([`Workload`]): Rows, tokens and steps.
        adapter_name (`str`, defaults to `"default"`): The adapter.

    Returns:
        [`ErasurePlan`]

    Raises:
        TypeError: If an adapted layer is not linear.
        ValueError: If there is no such adapter.
    """
    config, adapted = adapter_config(model, adapter_name), adapted_layers(model, adapter_name)
    inner = base_model(model)
    attends = attends_to_images(getattr(inner, "model", None))
    sources = shared_inputs({name: layer.in_features for name, layer in adapted.items()}, attends)
    layers = []
    for name, layer in adapted.items():
        weights = [layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight]
        dim = layer.in_features
        layers.append(
            PlannedLayer(
                name=name, part=part_of(name), inputs=dim, outputs=layer.out_features, rank=layer.r[adapter_name],
                parameters=sum(weight.numel() for weight in weights), source=sources[name],
                kinds=_kinds(name, attends, workload),
                columns=most_columns(config.constraint, config.rank_limit(dim), dim),
            )
        )  # fmt: skip
    size = FITTED[config.constraint].dtype.itemsize
    unique = [layer for layer in layers if layer.source == layer.name]
    counted = {layer.name: _counted(layer, workload, config) for layer in unique}
    adapter = [
        weight for layer in adapted.values() for weight in (layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight)
    ]  # fmt: skip
    own = {id(weight) for weight in adapter}
    frozen = {name: weight for name, weight in inner.named_parameters() if id(weight) not in own}
    sizes: dict[str, int] = dict.fromkeys(PARTS, 0)
    for name, weight in frozen.items():
        sizes[part_of(name)] += weight.numel() * weight.element_size()
    return ErasurePlan(
        model=type(inner).__name__,
        dtype=str(inner.dtype).removeprefix("torch."),
        constraint=config.constraint,
        layers=tuple(layers),
        workload=workload,
        weights={part: size for part, size in sizes.items() if size},
        adapter_state=_STATES * sum(weight.numel() * weight.element_size() for weight in adapter),
        sums=sum(size * layer.inputs**2 * len(layer.kinds) for layer in unique),
        largest_sum=max(size * layer.inputs**2 for layer in unique),
        null_spaces=sum(_null_space_bytes(config.constraint, config.rank_limit(d), d) for d in _dims(unique)),
        activations=_activations(inner, layers, workload),
        published=_published_bytes(inner, attends),
        counted=max(counted.values()),
        flops=_flops(inner, layers, workload, config, counted),
        refused=tuple(refusals(model, adapted, shows_images=workload.image_tokens > 0)),
    )


def shared_inputs(dims: dict[str, int], attends: bool = False) -> dict[str, str]:
    """The first layer that reads the same input, for each layer; by name, as nothing is run.

    Args:
        dims (`dict[str, int]`): Length of a layer's input, by the layer's name.
        attends (`bool`, defaults to `False`): Whether layers attend to image features, see [`attends_to_images`].
    """
    first: dict[tuple, str] = {}
    sources = {}
    for name, dim in dims.items():
        parent, _, leaf = name.rpartition(".")
        if attends and _reads_pictures(name):
            parent, together = "pictures", "states"
        else:
            together = next((min(names) for names in _READ_TOGETHER if leaf in names), leaf)
        sources[name] = first.setdefault((parent, together, dim), name)
    return sources


def _reads_pictures(name: str) -> bool:
    """Whether a layer is one of a cross attention's that read image features: the same for all of them."""
    return "cross_attn" in name and name.rpartition(".")[2] in _KEYS_AND_VALUES


def _kinds(name: str, attends: bool, workload: Workload) -> tuple[str, ...]:
    if side_of(name) == "vision" or attends and _reads_pictures(name):
        kinds: tuple[str, ...] = ("image",)
    else:
        kinds = ("text",) if attends else ("image", "text")
    return tuple(kind for kind in kinds if attends and kind == "text" or workload.of_kind(kind, part_of(name)))


def _counted(layer: PlannedLayer, workload: Workload, config) -> int:
    if config.statistics == "pooled":
        return workload.rows * len(layer.kinds)
    most = config.tokens_per_row or math.inf
    return workload.rows * int(sum(min(most, workload.of_kind(kind, layer.part)) for kind in layer.kinds))


def _dims(layers: Iterable[PlannedLayer]) -> list[int]:
    return [layer.inputs for layer in layers]


def _null_space_bytes(constraint: str, limit: int | None, dim: int) -> int:
    """Eigenvectors and filters in float32, eigenvalues and residuals in float64."""
    columns = most_columns(constraint, limit, dim)
    pairs = computed_pairs(constraint, limit, dim)
    values = dim if pairs is None or takes_all(pairs, dim) else columns
    return columns * (4 * dim + 4 + 8) + 8 * values


def _published_bytes(model: nn.Module, attends: bool) -> int | None:
    """Float16 vectors and float32 values of every layer that may be asked for later."""
    try:
        layers = linear_layers(model, default_target_modules(model, "all"))
    except ValueError:
        return None  # What it says is among what is refused, or the user has named the modules.
    dims = {name: layer.in_features for name, layer in layers.items()}
    sources = shared_inputs(dims, attends)
    return sum(kept_rank(dims[name]) * (2 * dims[name] + 4) for name in set(sources.values()))


def linear_by_part(model: nn.Module, value: Callable[[nn.Linear], int]) -> dict[str, int]:
    """The sum over the linear layers of each part of a model, of what `value` says of a layer."""
    total = dict.fromkeys(PARTS, 0)
    for name, module in linear_modules(model).items():
        total[part_of(name)] += value(module)
    return total


def _recorded(layers: Iterable[PlannedLayer]) -> tuple[str, ...]:
    """Parts that gradients flow through: from the first adapted one on."""
    adapted = {layer.part for layer in layers}
    return PARTS[min(PARTS.index(part) for part in adapted) :]


def _activations(model: nn.Module, layers: list[PlannedLayer], workload: Workload) -> int:
    """Inputs and outputs of the linear layers that gradients flow through; what lies between them is of that order."""
    widths = linear_by_part(model, lambda module: module.in_features + module.out_features)
    size = model.dtype.itemsize
    kept = sum(size * widths[part] * workload.tokens(part) for part in _recorded(layers))
    if size < 4:  # PEFT keeps a half-precision model's adapter, and a copy of its inputs, in float32.
        kept += sum(4 * layer.inputs * workload.tokens(layer.part) for layer in layers)
    return kept * workload.batch_size


def _flops(model: nn.Module, layers: list[PlannedLayer], workload: Workload, config, counted: dict[str, int]) -> dict:
    weights = linear_by_part(model, lambda module: module.weight.numel())
    forward = {part: 2.0 * count * workload.tokens(part) for part, count in weights.items()}
    adapter = sum(2.0 * layer.parameters * workload.tokens(layer.part) for layer in layers)
    # Frozen weights get no gradient, their inputs do; an adapter's gets both.
    row = sum(forward.values()) + sum(forward[part] for part in _recorded(layers)) + 3 * adapter
    step = row * workload.batch_size
    unique = {layer.name: layer for layer in layers if layer.source == layer.name}
    return {
        "passes": sum(forward.values()) * workload.rows,
        "sums": sum(float(sum_flops(count, unique[name].inputs)) for name, count in counted.items()),
        "decomposition": sum(
            decomposition_flops(layer.inputs, computed_pairs(config.constraint, config.rank_limit(layer.inputs), layer.inputs))
            for layer in unique.values()
        ),
        "step": step,
        "steps": step * workload.steps,
    }  # fmt: skip


def refusals(model: nn.Module, adapted: Mapping[str, nn.Module], *, shows_images: bool) -> list[str]:
    """What the library's own checks say of it, and what would only be found once rows are run.

    Args:
        model (`PeftModel` or `PreTrainedModel`): The model.
        adapted (`dict[str, nn.Module]`): Layers with the adapter, or those that are to get it, by name.
        shows_images (`bool`): Whether some retained row shows a picture.
    """
    found = []
    for check in (lambda: check_untied(model, adapted), lambda: processes.check_supported(model)):
        try:
            check()
        except ValueError as error:
            found.append(str(error))
    inner = base_model(model)
    if not attends_to_images(getattr(inner, "model", None)) and not visual_tokens(inner):
        found.append(
            f"the config of {type(inner).__name__} names no image token (`image_token_id`), so the tokens of pictures "
            "cannot be told from those of text; set it to the id of the processor's image token."
        )
    seeing = [name for name in adapted if side_of(name) == "vision"]
    if seeing and not shows_images:
        found.append(
            f"{len(seeing)} adapted layers would see no retained data, the first is {seeing[0]!r}: rows without pictures do "
            "not reach the vision side. Give retained rows with images, or use --target language."
        )
    return found
