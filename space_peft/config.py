"""The PEFT configuration: a LoRA whose update is kept in the (near-)null space of retained knowledge."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig

from .choices import CONSTRAINTS, INPUT_KINDS, ConstraintName, InputKind
from .records.folder import SPACE_CONFIG_NAME
from .records.io import write_json
from .records.safe_json import read_json


# The initialisations of PEFT that leave the base weights alone and need no data.
INITIALISATIONS = (True, False, "gaussian", "orthogonal")
# Options of `LoraConfig` that may be set: with them the update is s B A of a layer's own inputs, and nothing else of the
# model changes. Every other one, those of versions of PEFT to come included, must stay at its default.
ALLOWED_OPTIONS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora",
    "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "runtime_config",
}  # fmt: skip
# `max_rank="auto"`: a share of the inputs, between two limits; the upper one bounds memory and decomposition of large models.
# Saved adapters say which of these they were made with, because under another one their null spaces would be others.
_AUTO_RANKS: dict[str, tuple[int, int, float]] = {"d / 4": (4, 16, 1024), "d / 32": (32, 16, math.inf)}
AUTO_RANK = "d / 4"
AUTO_RANK_BEFORE = "d / 32"  # Up to version 0.2.0, which did not say.


def auto_rank(dim: int, rule: str = AUTO_RANK) -> int:
    """How many eigenvectors `max_rank="auto"` keeps of inputs of length `dim`, under a constraint that it caps.

    Args:
        dim (`int`): Length of an input.
        rule (`str`, defaults to `"d / 4"`): What "auto" means; `"d / 32"` in adapters of version 0.2.0.
    """
    share, least, most = _AUTO_RANKS[rule]
    return int(min(max(dim // share, least), most))


@dataclass
class SpaceLoraConfig(LoraConfig):
    """
    Configuration of a LoRA adapter `dW = s B A` whose `A` stays in the (near-)null space of retained inputs.

    To PEFT it is a LoRA (`peft_type` is `LORA`): `get_peft_model`, `add_adapter`, merging and saving work as they are.
    `save_pretrained` writes the stock keys to `adapter_config.json`, so that loading needs nothing of this package,
    and the fields below to `space_config.json` beside it.

    Args:
        constraint (`str`, defaults to `"soft"`): With `l_i`, `u_i` the eigenpairs of the retained inputs' second
            moment, eigenvalues scaled to mean 1: `"soft"` scales direction `u_i` of `A` by `t / (l_i + t)`; `"hard"`
            removes the leading directions from `A`; `"none"` leaves `A` alone (statistics and certificate only).
        strength (`float`, defaults to 0.003): `t` of the soft constraint, scale-free; smaller is stricter. The root mean
            square change of a layer's output on retained inputs is at most `sqrt(t) / 2` times a norm, see
            [`NullSpace.bound`].
        energy (`float`, defaults to 0.999): Share, in (0, 1], of the retained inputs' energy which the hard constraint
            removes; 1.0 removes every direction that retained inputs have.
        statistics (`str`, defaults to `"token"`): What counts as one retained input: every `"token"`, or the mean over
            a row's tokens of one kind (`"pooled"`).
        tokens_per_row (`int`, *optional*, defaults to 64): At most this many tokens of a kind (image, text) of a
            retained row count, drawn at random; `None` for all. An image's hundreds of tokens are much alike, and the
            statistics of all of them cost as much as the forward pass.
        max_rank (`int` or `"auto"`, *optional*, defaults to `"auto"`): Largest number of eigenvectors kept per layer;
            `None` for as many as needed. Hard: at most this many directions are protected, so less energy than asked
            may be; `"auto"` sets no limit. Soft: every direction beyond gets the filter value of the largest eigenvalue
            among them, which is at most its own: the bound holds, with less freedom to learn; `"auto"` is `d / 4`, at
            least 16 and at most 1024. That erases and retains as well as all of them (`docs/decisions.md`); with fewer
            the same `strength` is stricter. In adapters of version 0.2.0, which `from_pretrained` reads, it stays what it
            was, `d / 32`.
        kwargs: The fields of [`~peft.LoraConfig`].

    Raises:
        ValueError: For settings under which the constraint would not hold or that make no sense.
    """

    constraint: ConstraintName = field(
        default="soft", metadata={"help": "How the adapter is kept off retained knowledge: 'soft', 'hard' or 'none'."}
    )
    strength: float = field(
        default=0.003, metadata={"help": "t of the soft filter t / (l + t); smaller is stricter. Must be > 0."}
    )
    energy: float = field(
        default=0.999, metadata={"help": "Share of the retained energy that the hard constraint removes, in (0, 1]."}
    )
    statistics: InputKind = field(
        default="token", metadata={"help": "What counts as one retained input: every 'token' or a 'pooled' row."}
    )
    tokens_per_row: int | None = field(
        default=64, metadata={"help": "Most tokens of a kind of a retained row that count, drawn at random; None: all."}
    )
    max_rank: int | Literal["auto"] | None = field(
        default="auto",
        metadata={
            "help": "Largest number of eigenvectors kept per layer; None: as many as needed; 'auto': d / 4, at most 1024."
        },
    )

    # Which weights are projected already, and by which null spaces: noted by `attach_null_space`, saved, and read by it.
    # No field: it says what an adapter is, not what it shall be. None until it is attached.
    projected = cast("dict[str, str] | None", None)
    # What `max_rank="auto"` means, see `auto_rank`: an adapter that was saved keeps the meaning it was made with.
    auto_rank = AUTO_RANK

    def __post_init__(self) -> None:
        self._check_space_fields()
        self._check_plain_lora()
        super().__post_init__()

    def check(self) -> None:
        """Raises `ValueError` if the settings, as they are now, are refused: PEFT and users may have changed some."""
        self._check_space_fields()
        self._check_plain_lora()

    def _check_space_fields(self) -> None:
        for name, allowed in (("constraint", tuple(CONSTRAINTS)), ("statistics", INPUT_KINDS)):
            if getattr(self, name) not in allowed:
                expected = ", ".join(map(repr, allowed))
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; expected one of {expected}.")
        for name in ("strength", "energy"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"`{name}` is {value!r}; expected a finite number.")
        if self.strength <= 0:
            raise ValueError(
                f"`strength` is {self.strength}; expected a number > 0, e.g. 1.0 (smaller is stricter). For an exact "
                'null space use constraint="hard".'
            )
        if not 0 < self.energy <= 1:
            raise ValueError(f"`energy` is {self.energy}; expected a share in (0, 1], e.g. 0.999.")
        for name, others in (("tokens_per_row", (None,)), ("max_rank", (None, "auto"))):
            value = getattr(self, name)
            if value in others or isinstance(value, int) and not isinstance(value, bool) and value >= 1:
                continue
            expected = " or ".join(["an integer of at least 1", *map(repr, others)])
            raise ValueError(f"`{name}` is {value!r}; expected {expected}.")

    def rank_limit(self, dim: int) -> int | None:
        """Returns the largest number of eigenvectors kept for a layer of `dim` inputs; `None` for no limit."""
        if self.max_rank != "auto":
            return self.max_rank
        return auto_rank(dim, self.auto_rank) if CONSTRAINTS[self.constraint].capped else None

    def _check_plain_lora(self) -> None:
        """Refuses whatever would change the model outside of `s B A`, or make `s B A` something else."""
        for name, rank in (("r", self.r), *(("rank_pattern", rank) for rank in self.rank_pattern.values())):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(f"`{name}` holds the rank {rank!r}; expected an integer of at least 1.")
        if self.use_dora:
            raise ValueError(
                "`use_dora` is True, but DoRA's magnitude rescales the whole weight, retained directions included; "
                "set use_dora=False."
            )
        if self.modules_to_save:
            raise ValueError(
                f"`modules_to_save` is {self.modules_to_save!r}, but those modules would train without the constraint; "
                "set modules_to_save=None and name the modules in target_modules instead (a task_type such as SEQ_CLS "
                "fills it in by itself: leave task_type unset)."
            )
        if self.bias != "none":
            raise ValueError(
                f"`bias` is {self.bias!r}, but a trained bias changes every output, retained ones included; "
                'set bias="none".'
            )
        if self.lora_bias:
            raise ValueError(
                "`lora_bias` is True, but a trained bias changes every output, retained ones included; "
                "set lora_bias=False."
            )
        if not isinstance(self.init_lora_weights, (bool, str)) or self.init_lora_weights not in INITIALISATIONS:
            raise ValueError(
                f"`init_lora_weights` is {self.init_lora_weights!r}, which changes base weights or depends on data; "
                f"expected one of {', '.join(map(repr, INITIALISATIONS))}."
            )
        for name in ("trainable_token_indices", "target_parameters"):
            if getattr(self, name):
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}, but what it trains is not a linear layer with known inputs, "
                    f"so the constraint cannot hold; set {name}=None."
                )
        if self.use_qalora:
            raise ValueError("`use_qalora` is True, but it pools the inputs that `A` sees; set use_qalora=False.")
        for option in fields(LoraConfig):
            if option.metadata.get("is_lora_variant") and getattr(self, option.name):
                raise ValueError(
                    f"`{option.name}` asks for a LoRA variant whose update is not s B A, so the constraint would not "
                    f"hold; leave {option.name} at its default."
                )
        for option in fields(self):
            if option.name in ALLOWED_OPTIONS or option.name in _OWN_FIELDS:
                continue
            default = option.default if option.default_factory is MISSING else option.default_factory()
            value = getattr(self, option.name)
            if value != default:
                raise ValueError(
                    f"`{option.name}` is {value!r:.200}, an option of {LoraConfig.__name__} under which the constraint is not "
                    f"known to hold; leave it at its default, {default!r:.80}."
                )
        if getattr(self, "_custom_modules", None):
            raise ValueError(
                "custom modules are registered for some kinds of layers, whose update need not be s B A; use PEFT's own."
            )

    def space_fields(self) -> dict:
        """Returns the fields that a stock `LoraConfig` does not have."""
        return {name: getattr(self, name) for name in _OWN_FIELDS}

    def to_dict(self) -> dict:
        """Returns the stock LoRA keys only, as `adapter_config.json` holds them; see `space_fields` for the others."""
        return {key: value for key, value in super().to_dict().items() if key not in _OWN_FIELDS}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes `adapter_config.json` (stock keys) and `space_config.json` (the others) into a folder.

        Warns where the adapter was never attached to null spaces, or is a mix of others: the constraint is then what was
        asked for, and not what was done; the file says so (`projected` is null), and no card or push takes it. With them,
        the digest of the weights that are in the null space is saved, and those changed afterwards are refused, too.

        Args:
            save_directory (`str`): The folder; created if missing.
            kwargs: See [`~peft.PeftConfig.save_pretrained`].
        """
        library = (kwargs.get("auto_mapping_dict") or {}).get("parent_library", "")
        if library.split(".")[0] != "transformers":
            # A module of this machine's, which PEFT would have others import; the base model says what class it is.
            kwargs.pop("auto_mapping_dict", None)
        super().save_pretrained(save_directory, **kwargs)
        if self.projected is None and CONSTRAINTS[self.constraint].acts:
            warnings.warn(
                f"the adapter saved to {str(save_directory)!r} asks for the {self.constraint!r} constraint, but was never "
                "attached to null spaces: if it was trained, then without the constraint. Train with SpaceTrainer, with a "
                "NullSpaceCallback, or after attach_null_space.",
                stacklevel=2,
            )
        self.save_space_fields(save_directory)

    def save_space_fields(self, save_directory: str | os.PathLike) -> None:
        """Writes `space_config.json` alone."""
        content = self.space_fields()
        if self.projected is not None or CONSTRAINTS[self.constraint].acts:
            content["projected"] = self.projected  # None: asked for, never done. Version 0.1.0 has no such key.
        if self.max_rank == "auto":
            content["auto_rank"] = self.auto_rank
        write_json(os.path.join(save_directory, SPACE_CONFIG_NAME), content)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> SpaceLoraConfig:
        """Reads both files back.

        Args:
            pretrained_model_name_or_path (`str`): A folder or a repository on the Hub.
            subfolder (`str`, *optional*): Folder inside it.
            kwargs: See [`~peft.PeftConfig.from_pretrained`].

        Raises:
            ValueError: If there is no `space_config.json`, or it is no JSON object.
        """
        stock = LoraConfig.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if not isinstance(stock, LoraConfig):
            raise ValueError(
                f"adapter_config.json in {str(pretrained_model_name_or_path)!r} is that of a {type(stock).__name__}; "
                "expected a LoRA adapter."
            )
        path = Path(pretrained_model_name_or_path, subfolder or "", SPACE_CONFIG_NAME)
        if not path.parent.is_dir():
            hub_kwargs, _, _ = cls._split_kwargs(kwargs)
            try:
                path = Path(
                    hf_hub_download(
                        str(pretrained_model_name_or_path), SPACE_CONFIG_NAME, subfolder=subfolder, **hub_kwargs
                    )
                )
            except EntryNotFoundError as error:
                raise ValueError(_not_ours(pretrained_model_name_or_path)) from error
        if not path.is_file():
            raise ValueError(_not_ours(path.parent))
        own = read_json(path, kind="configuration of the constraint")
        projected = own.pop("projected", None)
        if projected is not None and not (
            isinstance(projected, dict) and all(isinstance(value, str) for value in projected.values())
        ):
            raise ValueError(f"`projected` of {str(path)!r} is {projected!r:.80}; expected an object of digests.")
        rule = own.pop("auto_rank", AUTO_RANK_BEFORE if own.get("max_rank") == "auto" else AUTO_RANK)
        if rule not in tuple(_AUTO_RANKS):
            raise ValueError(
                f"`auto_rank` of {str(path)!r}, what `max_rank` 'auto' means there, is {rule!r:.80}; expected one of "
                f"{', '.join(map(repr, _AUTO_RANKS))}. A later version of space-peft may know it."
            )
        unknown = sorted(set(own) - set(_OWN_FIELDS))
        if unknown:
            warnings.warn(f"{path} holds keys unknown to this version of space-peft, ignored: {unknown}.", stacklevel=2)
        stock_fields = {option.name: getattr(stock, option.name) for option in fields(LoraConfig) if option.init}
        config = cls(**stock_fields, **{name: own[name] for name in _OWN_FIELDS if name in own})
        config.projected = projected
        config.auto_rank = rule
        return config


_STOCK_FIELDS = {option.name for option in fields(LoraConfig)}
_OWN_FIELDS = tuple(option.name for option in fields(SpaceLoraConfig) if option.name not in _STOCK_FIELDS)


def _not_ours(place: Any) -> str:
    return (
        f"no {SPACE_CONFIG_NAME} in {str(place)!r}, so it holds no adapter of space-peft; "
        "use peft.LoraConfig.from_pretrained for a plain LoRA adapter."
    )
