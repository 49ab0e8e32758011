"""Loading an erased model back, with every check that can be made on the way."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import peft
import torch
from peft import LoraConfig, PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from space_peft.canary.check import Canary, CanaryResult, check_canary
from space_peft.config import ALLOWED_OPTIONS, INITIALISATIONS, SpaceLoraConfig
from space_peft.modeling.loading import check_dtype, default_dtype, load_config, model_class
from space_peft.modeling.prompts import conversation
from space_peft.records.base_commit import loaded_commit
from space_peft.records.card_data import is_local_path
from space_peft.records.digests import weight_content
from space_peft.records.escape import plain_line
from space_peft.records.folder import ADAPTER_CONFIG_NAME, ADAPTER_NAME, CANARY_NAME, MANIFEST_NAME, SPACE_CONFIG_NAME
from space_peft.records.safe_json import read_json

from .limits import check_patterns
from .manifest import check_manifest
from .processor import check_processor_files, load_processor
from .source import AdapterSource, RecordedBase, fetch, recorded_base, refuse_unsafe


# Of `adapter_config.json`: what may be anything, for it says where `s B A` is and how large. Everything else must be as a
# plain LoRA has it, and a key that is not known here is refused: what it changes is not known either.
_FREE_OPTIONS = ALLOWED_OPTIONS - {"task_type", "init_lora_weights", "auto_mapping", "runtime_config"}
_ALLOWED_OPTIONS = {
    "task_type": (None, "CAUSAL_LM"),  # Others have PEFT train and load whole modules.
    "init_lora_weights": INITIALISATIONS,  # Others change the base's weights on loading.
}
_LORA_KEY = re.compile(r"base_model\.model\.[^\s]+\.lora_[AB]\.weight")
_LORA_DTYPES = ("F64", "F32", "F16", "BF16")
_FULL_COMMIT = re.compile(r"[0-9a-f]{40}")


def load_erased(
    repo_or_folder: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    base_model: str | os.PathLike | nn.Module | None = None,
    check_canary: bool = True,
    **model_kwargs: Any,
) -> PeftModel:
    """Loads an erased model: its base model, and the adapter on it.

    `PeftModel.from_pretrained` does the same; this checks as well that the files are those that were published, that
    every weight of the adapter finds its place, that the base model is the recorded one, and that the canary's questions
    are answered as they were after training. Nothing is unpickled and no code of a repository is run.

    Args:
        repo_or_folder (`str` or `os.PathLike`): Hub id or folder of the adapter.
        revision (`str`, *optional*): Branch, tag or commit of the adapter. Only the hash of a commit protects against
            an author, or somebody with the author's token, who publishes something else later.
        token (`str` or `bool`, *optional*): For the adapter and the base model, as in huggingface_hub.
        base_model (`str`, `os.PathLike` or `torch.nn.Module`, *optional*): Hub id, folder, or the loaded base model
            itself, which then carries the adapter; by default the one recorded, at the recorded commit.
        check_canary (`bool`, defaults to `True`): Whether to ask the canary's questions.
        model_kwargs: Arguments of the base model's `from_pretrained`, e.g. `dtype` (by default "auto"; `None` is the one
            that suits a CPU) or `device_map`.

    Returns:
        [`~peft.PeftModel`]: In evaluation mode.

    Raises:
        FileNotFoundError: If there is no adapter.
        ValueError: If any check fails; the message names the file.
        huggingface_hub.errors.HfHubHTTPError: If the repository cannot be downloaded.
        ConnectionError: If the connection breaks.

    Example:

    ```python
    >>> from space_peft.hub_cards import load_erased

    >>> model = load_erased("user/model-without-fox", revision="5d5c9f8a...")
    ```
    """
    source = fetch(repo_or_folder, revision=revision, token=token)
    refuse_unsafe(source)
    refuse_changed(source, stacklevel=3)
    recorded = recorded_base(source)
    check_processor_files(source.folder)
    model = attach_adapter(source, load_base(recorded, base_model, token=token, **model_kwargs))
    warn_about_base(model, recorded, revision=model_kwargs.get("revision"))
    if not check_canary:
        return model
    result = ask_canary(source, model, recorded, token=token)
    if result is None:
        warnings.warn(
            f"the adapter comes without {CANARY_NAME}, so whether it answers as it did after training was not checked.",
            stacklevel=2,
        )
    elif found := canary_problems(result):
        raise ValueError(f"the model does not answer as it did after training. {' '.join(found)}")
    return model


def refuse_changed(source: AdapterSource, *, stacklevel: int = 2) -> None:
    """Refuses a folder whose files are not those that were published; of a repository that does not say, warns.

    Args:
        source (`AdapterSource`): The adapter.
        stacklevel (`int`, defaults to 2): Whose line the warning names.

    Raises:
        ValueError: If a file is another one.
    """
    try:
        problems = check_manifest(source.folder)
    except FileNotFoundError:
        problems = []
        if source.repo_id is not None:
            warnings.warn(
                f"{source.repo_id!r} has no {MANIFEST_NAME}, so nothing says whether its files are those that were "
                "published; it was not pushed with space-peft, or the manifest was removed.",
                stacklevel=stacklevel,
            )
    if problems:
        listed = "; ".join(f"{plain_line(problem.file)}: {problem.message}" for problem in problems[:5])
        raise ValueError(f"{len(problems)} files are not as they were published. {listed}")


def load_base(
    recorded: RecordedBase,
    base_model: str | os.PathLike | nn.Module | None = None,
    *,
    token: str | bool | None = None,
    **model_kwargs: Any,
) -> nn.Module:
    """Loads the base model of an adapter, without running code of its repository.

    Args:
        recorded (`RecordedBase`): What the adapter says.
        base_model (`str`, `os.PathLike` or `torch.nn.Module`, *optional*): See [`load_erased`].
        token (`str` or `bool`, *optional*): See [`load_erased`].
        model_kwargs: See [`load_erased`].

    Raises:
        UnknownArchitectureError: If nothing here knows its architecture.
        ValueError: If there is no base model to load, it takes no pictures, or `trust_remote_code` is asked for.
    """
    if isinstance(base_model, nn.Module):
        if model_kwargs:
            raise ValueError(
                f"`base_model` is loaded already, so {sorted(model_kwargs)} come too late; leave them out."
            )
        return base_model
    if model_kwargs.pop("trust_remote_code", False):
        raise ValueError(
            "`trust_remote_code` is True, but an adapter must not choose what code runs here. If you trust the base "
            "model's code, load it yourself and pass the model as `base_model`."
        )
    name = recorded.name if base_model is None else os.fspath(base_model)
    if not name:
        raise ValueError("the adapter does not say what its base model is; give `base_model`.")
    if name == recorded.name and recorded.revision:
        model_kwargs.setdefault("revision", recorded.revision)
    options = {"dtype": "auto", "use_safetensors": True, "token": token, **model_kwargs}
    check_dtype(options["dtype"])
    config = load_config(name, **options)
    if options["dtype"] is None:
        options["dtype"] = default_dtype(config, "cpu")
    return model_class(config).from_pretrained(name, trust_remote_code=False, **options)


def attach_adapter(source: AdapterSource, base: nn.Module) -> PeftModel:
    """Puts the adapter on its base model; every weight must find its place, and every place its weight.

    Args:
        source (`AdapterSource`): The adapter.
        base (`torch.nn.Module`): The base model, changed in place.

    Raises:
        FileNotFoundError: If there are no weights.
        ValueError: If they are damaged or do not fit.
    """
    folder = source.folder
    stored = adapter_keys(folder)
    check_options(folder)
    _check_size(folder)
    kind = SpaceLoraConfig if (folder / SPACE_CONFIG_NAME).is_file() else LoraConfig
    config = kind.from_pretrained(str(folder))
    whole = [option for option in (config.target_modules, config.exclude_modules) if isinstance(option, str)]
    layers = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern or ()
    check_patterns(
        whole=[pattern for pattern in whole if pattern != "all-linear"],
        endings=[*(config.rank_pattern or ()), *(config.alpha_pattern or ())],
        layers=layers,
        names=[name for name, _ in base.named_modules()],
        where=ADAPTER_CONFIG_NAME,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # An error, below.
        try:
            model = PeftModel.from_pretrained(base, str(folder), config=config)
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{ADAPTER_NAME} does not fit the base model {_name(base)!r}. Is it the one that the adapter "
                f"was trained on? PEFT says: {plain_line(error, 400)}"
            ) from error
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    missing, unexpected = wanted - stored, stored - wanted
    if getattr(base, "_checkpoint_conversion_mapping", None) and len(missing) == len(unexpected):
        if _contents(get_peft_model_state_dict(model, save_embedding_layers=False)) == _contents(
            load_file(folder / ADAPTER_NAME)
        ):
            missing = unexpected = set()  # Older names of the same weights, which PEFT has translated.
    for keys, problem in ((missing, "lacks"), (unexpected, "holds, without a place in the model,")):
        if keys:
            raise ValueError(
                f"{ADAPTER_NAME} {problem} {len(keys)} weights, the first is {min(keys)!r:.200}. It was "
                "changed, or does not belong to this adapter_config.json and base model."
            )
    return model


def _contents(weights: Mapping[str, torch.Tensor]) -> list[tuple]:
    """What weights hold, whatever their names."""
    return sorted(map(weight_content, weights.values()))


def adapter_keys(folder: Path) -> set[str]:
    """Names of the weights in `adapter_model.safetensors`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or holds anything but the matrices of a LoRA.
    """
    path = folder / ADAPTER_NAME
    if not path.is_file():
        raise FileNotFoundError(f"no {ADAPTER_NAME} in {str(folder)!r}; it holds no adapter.")
    try:
        with safe_open(path, framework="pt") as file:
            kinds = {name: (len((part := file.get_slice(name)).get_shape()), part.get_dtype()) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{ADAPTER_NAME} is damaged or cut off: {error}. Download it again.") from error
    odd = sorted(
        name
        for name, (dims, dtype) in kinds.items()
        if not _LORA_KEY.fullmatch(name) or dims != 2 or dtype not in _LORA_DTYPES
    )
    if odd:
        raise ValueError(
            f"{ADAPTER_NAME} holds {len(odd)} weights that are not matrices `lora_A` and `lora_B`, the first is "
            f"{odd[0]!r:.200}; such an adapter changes more than its certificate covers. Do not load it, and tell its "
            "author."
        )
    return set(kinds)


def check_options(folder: Path) -> None:
    """Refuses an `adapter_config.json` by which the adapter would be anything but `s B A` added to linear layers.

    Args:
        folder (`pathlib.Path`): Of the adapter.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or an option is not on the list of those that are allowed.
    """
    content = read_json(folder / ADAPTER_CONFIG_NAME, kind="adapter's configuration")
    defaults = LoraConfig().to_dict()

    def refuse(key: str, expected: str) -> NoReturn:
        raise ValueError(
            f"`{key}` of {ADAPTER_CONFIG_NAME} is {content[key]!r:.120}; expected {expected}. With it the adapter changes more "
            "than s B A, which is all that its certificate covers. Do not load it, and tell its author."
        )

    for key, value in content.items():
        if key in _FREE_OPTIONS:
            continue
        if key in _ALLOWED_OPTIONS:
            if not any(type(value) is type(allowed) and value == allowed for allowed in _ALLOWED_OPTIONS[key]):
                refuse(key, f"one of {', '.join(map(repr, _ALLOWED_OPTIONS[key]))}")
        elif key == "auto_mapping":
            # PEFT imports the module that stands there.
            names = {} if value is None else value
            library = names.get("parent_library", "transformers.models") if isinstance(names, dict) else None
            known = isinstance(library, str) and re.fullmatch(r"transformers(\.\w+)*", library)
            if not known and not _is_imported_model(library, names):
                refuse(key, "a class of transformers, or of a module of yours that is imported (`--import MODULE`)")
        elif key not in defaults:
            refuse(key, f"no such key: this version of PEFT ({peft.__version__}) does not know it; update it")
        elif type(value) is not type(defaults[key]) or value != defaults[key]:
            refuse(key, f"{defaults[key]!r}")


def _is_imported_model(library: Any, names: dict) -> bool:
    """Whether a class of a model is named that is there already, so that nothing would be imported."""
    module = sys.modules.get(library) if isinstance(library, str) else None
    kind = getattr(module, str(names.get("base_model_class")), None)
    return isinstance(kind, type) and issubclass(kind, PreTrainedModel)


def _check_size(folder: Path) -> None:
    """Refuses ranks that the file of weights has no matrix for: PEFT would make room for them first."""
    content = read_json(folder / ADAPTER_CONFIG_NAME, kind="adapter's configuration")
    with safe_open(folder / ADAPTER_NAME, framework="pt") as file:
        largest = max(
            (file.get_slice(name).get_shape()[0] for name in file.keys() if name.endswith(".lora_A.weight")), default=0
        )
    patterns = content.get("rank_pattern") or {}
    for option in ("rank_pattern", "alpha_pattern"):
        if not isinstance(content.get(option, {}), dict):
            raise ValueError(f"`{option}` of {ADAPTER_CONFIG_NAME} is {content[option]!r:.80}; expected an object.")
    for rank in (content.get("r", 0), *patterns.values()):
        if type(rank) is not int or rank > largest:
            raise ValueError(
                f"{ADAPTER_CONFIG_NAME} asks for the rank {rank!r:.40}, but the largest in {ADAPTER_NAME}, which it does "
                f"not fit, is {largest}."
            )


def warn_about_base(model: nn.Module, recorded: RecordedBase, revision: str | None = None) -> None:
    """Warns if the base model is another repository or commit than the recorded one; what it answers is the canary's matter.

    Args:
        model (`torch.nn.Module`): The loaded model.
        recorded (`RecordedBase`): What the adapter says.
        revision (`str`, *optional*): What was asked for when the base model was loaded.
    """
    name = _name(model)
    if not recorded.name or is_local_path(recorded.name) or is_local_path(name):
        return
    commit = loaded_commit(name, revision)
    wanted = recorded.revision if recorded.revision and _FULL_COMMIT.fullmatch(recorded.revision) else None
    if name != recorded.name or wanted and commit and commit != wanted:
        told = [
            f"{place!r:.120}" + (f" at commit {at}" if at else "")
            for place, at in ((recorded.name, wanted), (name, commit))
        ]
        warnings.warn(
            f"the adapter was trained on {told[0]}; this is {told[1]}. What was measured of the erasure need not hold for it.",
            stacklevel=3,
        )


def ask_canary(
    source: AdapterSource, model: PeftModel, recorded: RecordedBase, *, token: str | bool | None = None
) -> CanaryResult | None:
    """Asks the canary's questions; `None` if the adapter has none.

    Raises:
        ValueError: If the canary is damaged, or the adapter's processor is refused.
        OSError: If the base model has no processor.
    """
    if not (source.folder / CANARY_NAME).is_file():
        return None
    canary = Canary.load(source.folder)
    processor = load_processor(source, model, recorded, canary_conversations(canary), token=token)
    return check_canary(model, processor, canary)


def canary_conversations(canary: Canary) -> list[list[dict]]:
    """What the chat template is asked to render for a canary's questions."""
    picture = Image.new("RGB", (1, 1))
    return [conversation(item.question, image=picture)["prompt"] for item in canary.items]


def canary_problems(result: CanaryResult) -> list[str]:
    """What a canary found, as sentences; empty if all is well."""
    problems = []
    if result.damaged:
        problems.append(f"{CANARY_NAME}: {result.damaged[0]} ({len(result.damaged)} of {result.count}).")
    if result.base:
        problems.append(
            f"The base model is not the one the adapter was trained on: {len(result.base)} of the {result.base_compared} "
            f"weights recorded of it are others, the first is {result.base[0]!r:.120}."
        )
    if result.deployed:
        problems.append(
            f"Without the adapter, {len(result.deployed)} of {result.count} answers are others: the base model, its "
            f"processor or precision is not the one recorded. {plain_line(result.deployed[0], 400)}."
        )
    if result.erased:
        problems.append(
            f"With the adapter, {len(result.erased)} of {result.count} answers are others. "
            f"{plain_line(result.erased[0], 400)}."
        )
    if not result.acts:
        problems.append("The adapter has no effect on any answer.")
    return problems


def _name(model: nn.Module) -> str:
    return str(getattr(model.config, "_name_or_path", "") or "")
