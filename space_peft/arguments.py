"""What `space-peft erase` is told beside the trainer's configuration, as dataclasses for parsers. Imports nothing slow."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from .choices import ConstraintName, DtypeName, InputKind


if TYPE_CHECKING:
    from .config import SpaceLoraConfig


# Not the dot, which is in every name of several parts.
_REGULAR_EXPRESSION = set("*+?|()[]{}^$\\")


def _told(help: str, default: Any = None, **more: Any) -> Any:
    """A field; a list as default is copied for every instance."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": help, **more})
    return field(default=default, metadata={"help": help, **more})


@dataclass
class EraseArguments:
    """
    The job: a model, a name, and where the data are.

    Args:
        model (`str`): Id or folder of the model.
        concept (`str`): The name to forget.
        pool (`str`): Public images: a folder, a file or a dataset on the Hub, see `data.loading.load_rows`.
        retain (`str`, *optional*): Retained rows in TRL's formats, or pictures alone: the same.
        statistics (`str`, *optional*): Statistics of the model: a folder or a repository. Instead of `retain`, or beside it.
        test_images (`str`, *optional*): Pictures of the concept to test with, as `pool`. They are never trained on.
        questions (`str`, *optional*): YAML file of what is asked about pictures, see [`load_questions`].
        more_concepts (`list[str]`, *optional*): Names to forget after it, one after another; see [`erase_several`].
        aliases (`list[str]`, *optional*): Other names of `concept`.
        anchors (`int`, defaults to 32): How many.
        refine_steps (`int`, defaults to 60): Steps of refining them.
        dtype (`str`, *optional*): To load the model in; by default as saved on a GPU, float32 on a CPU.
        fresh (`bool`, defaults to `False`): Start again, ignoring what an interrupted call left.
    """

    model: str = field(metadata={"help": "Id or folder; demo: the embedded one"})
    concept: str = field(metadata={"help": "The name to forget"})
    pool: str = field(metadata={"help": "Public images: folder, file or Hub id"})
    retain: str | None = _told("Retained rows or pictures: folder, file, Hub id")
    statistics: str | None = _told("Statistics of the model instead: folder or Hub id")
    test_images: str | None = _told("Pictures of the concept, for testing only")
    questions: str | None = _told("Your own questions, a YAML file")
    more_concepts: list[str] = _told("More names to forget, one after another", [], metavar="NAME")
    aliases: list[str] = _told("Other names for it", [], metavar="NAME")
    anchors: int = _told("How many anchors", 32)
    refine_steps: int = _told("Steps of refining them", 60)
    dtype: DtypeName | None = _told("float32, bfloat16 (default: as saved; CPU: float32)", metavar="TYPE")
    fresh: bool = _told("Start again, ignoring what an interrupted call left", False)


@dataclass
class AdapterArguments:
    """
    The adapter's fields for parsers, as TRL's `ModelConfig` has them for a `LoraConfig`; see [`get_space_config`].

    A field of [`SpaceLoraConfig`] has its own name here, or that of [`~peft.LoraConfig`] after `lora_`.

    Args:
        lora_r (`int`, defaults to 8): Rank.
        lora_alpha (`int`, *optional*): Twice the rank by default.
        lora_dropout (`float`, defaults to 0.0): Dropout.
        lora_target_modules (`list[str]`, *optional*): Layers; by default those of `SpaceConfig.target`. A single one may be a
            regular expression.
        lora_exclude_modules (`list[str]`, *optional*): Layers that do not get it, in the same way.
        lora_layers_to_transform (`list[int]`, *optional*): Numbers of the blocks that get it.
        lora_layers_pattern (`list[str]`, *optional*): Names of the lists of blocks.
        lora_rank_pattern (`str`, *optional*), lora_alpha_pattern (`str`, *optional*): Other ranks and scales of some layers, as
            a dict or its JSON: `{"q_proj": 16}`.
        lora_use_rslora (`bool`, defaults to `False`): Scale by the square root of the rank.
        lora_init_weights (`str`, defaults to `"true"`): `init_lora_weights`, how it begins.
        lora_statistics (`str`, defaults to `"token"`): `SpaceLoraConfig.statistics`.
        constraint (`str`, defaults to `"soft"`), strength (`float`, defaults to 0.003), energy (`float`, defaults to 0.999),
            tokens_per_row (`str`, defaults to `"64"`), max_rank (`str`, defaults to `"auto"`): See [`SpaceLoraConfig`]; where it
            takes `None` this takes "all".
    """

    lora_r: int = _told("Rank of the adapter", 8)
    lora_alpha: int | None = _told("Its scale (default: twice the rank)")
    lora_dropout: float = _told("Its dropout", 0.0)
    lora_target_modules: list[str] | None = _told("Layers that get it; one may be a regular expression", metavar="NAME")
    lora_exclude_modules: list[str] | None = _told("Layers that do not get it", metavar="NAME")
    lora_layers_to_transform: list[int] | None = _told("Numbers of the blocks that get it")
    lora_layers_pattern: list[str] | None = _told("Names of the lists of blocks", metavar="NAME")
    lora_rank_pattern: str | None = _told('Other ranks of some layers, such as {"q_proj": 16}', metavar="JSON")
    lora_alpha_pattern: str | None = _told('Other scales of some layers, such as {"q_proj": 32}', metavar="JSON")
    lora_use_rslora: bool = _told("Scale by the square root of the rank", False)
    lora_init_weights: Literal["true", "false", "gaussian", "orthogonal"] = _told("How it is initialised", "true")
    lora_statistics: InputKind = _told("What counts as one retained input: a token, or the mean of a row's", "token")
    constraint: ConstraintName = _told("How retained inputs are protected", "soft")
    strength: float = _told("t of soft; smaller is stricter", 0.003)
    energy: float = _told("Share of the energy that the hard constraint removes", 0.999)
    tokens_per_row: str = _told("Most tokens of each kind counted per retained row, or all", "64", metavar="N")
    max_rank: str = _told("Most eigenvectors of a layer: a number, auto or all", "auto", metavar="N")


@dataclass
class SelectionArguments:
    """
    How anchors are chosen, beside their number: the arguments of [`select_anchors`], after `select_`.

    Args:
        select_threshold (`float`, *optional*), select_upper_threshold (`float`, *optional*), select_diversity (`float`, defaults
            to 0.1), select_duplicate_threshold (`float`, defaults to 0.98), select_description (`str`, *optional*),
            select_templates (`list[str]`, *optional*), select_image_column (`str`, defaults to `"image"`), select_caption_column
            (`str`, *optional*), select_id_column (`str`, *optional*), select_exclude_by_caption (`bool`, defaults to `True`),
            select_skip_undecodable (`bool`, defaults to `False`), select_batch_size (`int`, defaults to 32), select_cache_dir
            (`str`, *optional*): See there; the last may be "none".
    """

    select_threshold: float | None = _told("Lowest score of an anchor")
    select_upper_threshold: float | None = _told("Highest score of an anchor")
    select_diversity: float = _told("Weight of diversity among anchors, from 0 to 1", 0.1)
    select_duplicate_threshold: float = _told("Cosine above which two images count as the same", 0.98)
    select_description: str | None = _told("A sentence on what the concept is, to find anchors by")
    select_templates: list[str] | None = _told("Texts with {} for the name, to find anchors by")
    select_image_column: str = _told("The pool's column of images", "image", metavar="NAME")
    select_caption_column: str | None = _told("Its column of captions (default: a usual one)", metavar="NAME")
    select_id_column: str | None = _told("Its column of identifiers (default: a usual one)", metavar="NAME")
    select_exclude_by_caption: bool = _told("Leave out images whose caption says the name", True)
    select_skip_undecodable: bool = _told("Leave out images that do not decode", False)
    select_batch_size: int = _told("Images embedded at a time", 32)
    select_cache_dir: str | None = _told("Where the pool's embeddings are kept; none: nowhere", metavar="FOLDER")


@dataclass
class CardArguments:
    """
    What only you know of the erasure, for its card: fields of [`ErasureCardData`], where they are described.

    Args:
        reason (`str`, *optional*), language (`list[str]`, *optional*), authors (`list[str]`), contact (`str`, *optional*),
            license (`str`, *optional*), license_name (`str`, *optional*), license_link (`str`, *optional*), tags (`list[str]`),
            not_tested (`list[str]`), base_model (`str`, *optional*), redact (`bool`, defaults to `False`).
    """

    reason: str | None = _told("Why the concept is erased")
    language: list[str] | None = _told("Language of questions and answers, such as en", metavar="CODE")
    authors: list[str] = _told("Who makes the adapter", [], metavar="NAME")
    contact: str | None = _told("Where questions and complaints go")
    license: str | None = _told("Licence of the adapter (default: the base model's)", metavar="ID")
    license_name: str | None = _told("Name of the licence, if the Hub does not list it")
    license_link: str | None = _told("Link to the text of the licence", metavar="URL")
    tags: list[str] = _told("More tags for the repository", [], metavar="TAG")
    not_tested: list[str] = _told("What you know was not tested", [])
    base_model: str | None = _told("Hub id of the model, if it is loaded from a folder", metavar="ID")
    redact: bool = _told("Publish a hash instead of the name", False)


def get_space_config(arguments: AdapterArguments) -> SpaceLoraConfig:
    """The adapter's configuration, from parsed arguments.

    Args:
        arguments ([`AdapterArguments`]): As a parser gives them, or a file: dicts may be dicts, and numbers numbers.

    Raises:
        ValueError: If a setting is out of range.
    """
    from .config import SpaceLoraConfig  # Importing PEFT takes seconds, which help need not wait for.

    named = {option.name for option in dataclasses.fields(SpaceLoraConfig)}
    settings: dict[str, Any] = {
        key if key in named else key.removeprefix("lora_"): value for key, value in vars(arguments).items()
    }
    for key in ("target_modules", "exclude_modules"):
        # A single one may be a regular expression, as in PEFT.
        if (modules := settings[key]) is not None and len(modules) == 1 and _REGULAR_EXPRESSION & set(modules[0]):
            settings[key] = modules[0]
    for key in ("rank_pattern", "alpha_pattern"):
        settings[key] = _pattern(settings[key], f"lora_{key}")
    for key in ("tokens_per_row", "max_rank"):
        settings[key] = _count_or_word(settings[key])
    if settings["lora_alpha"] is None:
        settings["lora_alpha"] = 2 * arguments.lora_r
    start = settings.pop("init_weights")
    return SpaceLoraConfig(**settings, init_lora_weights={"true": True, "false": False}.get(start, start))


def _pattern(given: Any, name: str) -> dict[str, Any]:
    """Ranks or scales by layer: a dict, or its JSON."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise ValueError(f"`{name}` is {given!r:.80}, which is not JSON: {error}.") from error
    given = {} if given is None else given
    if not isinstance(given, dict) or any(type(value) not in (int, float) for value in given.values()):
        raise ValueError(f'`{name}` is {given!r:.80}; expected numbers by layer, such as {{"q_proj": 16}}.')
    return given


def _count_or_word(given: Any) -> Any:
    """A number as one, "all" and "none" as `None`; [`SpaceLoraConfig`] checks what else it is."""
    if given in ("all", "none"):
        return None
    return int(given) if isinstance(given, str) and given.lstrip("-").isdigit() else given


def get_selection(arguments: SelectionArguments) -> dict[str, Any]:
    """The `selection` of [`erase`], from parsed arguments: those that are not the defaults.

    Args:
        arguments ([`SelectionArguments`]): As a parser gives them.
    """
    usual = SelectionArguments()
    told = {
        option.name.removeprefix("select_"): value
        for option in dataclasses.fields(arguments)
        if (value := getattr(arguments, option.name)) != getattr(usual, option.name)
    }
    if told.get("cache_dir") == "none":
        told["cache_dir"] = False
    return told
