"""The processor an adapter is asked with: the base model's, and of the adapter's own only what cannot do harm."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch import nn
from transformers import AutoProcessor

from space_peft.records.folder import PROCESSOR_CONFIGS, TEMPLATE_NAME, TOKENIZER_NAME
from space_peft.records.safe_json import read_json

from .limits import LONGEST_TEMPLATE, check_template
from .source import AdapterSource, RecordedBase


PROCESSOR_FILES = (*PROCESSOR_CONFIGS, TEMPLATE_NAME)
# The second is newer and goes first where both are there.
_IMAGE_CONFIGS = ("preprocessor_config.json", "processor_config.json")
# Keys under which transformers may find a text, or an object; numbers may stand anywhere. It loads whatever others
# name: an `audio_tokenizer` is a model, an `auto_map` a program, a `tokenizer_file` any file.
_CLASSES = {
    "processor_class", "image_processor_type", "feature_extractor_type", "video_processor_type", "tokenizer_class",
    "backend",
}  # fmt: skip
_TEXTS = _CLASSES | {
    "padding_side", "truncation_side", "vision_feature_select_strategy", "data_format", "input_data_format",
    "transformers_version", "name_or_path", "_name_or_path", "chat_template", "model_input_names",
    "additional_special_tokens", "extra_special_tokens", "valid_kwargs", "_valid_processor_keys", "content", "__type",
}  # fmt: skip
_OBJECTS = {
    "image_processor", "video_processor", "feature_extractor", "size", "crop_size", "pad_size", "extra_special_tokens",
    "model_specific_special_tokens", "added_tokens_decoder",
}  # fmt: skip
_SPECIAL_TOKEN = re.compile(r"\w+_token|\d+")
# What `extra_special_tokens` and the like hold: names of the author's.
_NAMED = {"extra_special_tokens", "model_specific_special_tokens"}
# What an adapter may have trained with other than its base model's: how a picture is scaled.
_LARGEST_SIDE = 4096
_FLAGS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
_SIZES = ("size", "crop_size")
_SCALES = ("image_mean", "image_std", "rescale_factor", "resample")


def check_processor_files(folder: Path) -> None:
    """Refuses an adapter's processor or tokenizer if a file of it says more than what is on a list.

    Args:
        folder (`pathlib.Path`): Of the adapter; it need not have a processor.

    Raises:
        ValueError: See [`check_processor_file`].
    """
    for name in PROCESSOR_FILES:
        if (folder / name).is_file():
            check_processor_file(folder, name)


def check_processor_file(folder: Path, name: str) -> None:
    """Refuses one file of a processor or tokenizer.

    Args:
        folder (`pathlib.Path`): Of the adapter.
        name (`str`): One of `PROCESSOR_FILES`.

    Raises:
        ValueError: If it is damaged, would have transformers load something that it names, or is of a size that no such
            thing has.
    """
    if name != TEMPLATE_NAME:
        _check_values(name, read_json(folder / name, kind="processor's configuration"))
    _template_of(folder, name)
    _settings_of(folder, name)


def _check_values(file: str, content: dict) -> None:
    def refuse(key: str, value: Any) -> NoReturn:
        raise ValueError(
            f"`{key}` of {file} is {value!r:.120}; transformers may load what stands there, and no processor of a model "
            "for images and text needs it. Do not load this processor, and tell its author."
        )

    pending = [(key, value, key in _NAMED) for key, value in content.items()]
    while pending:
        key, value, named = pending.pop()
        token = named or _SPECIAL_TOKEN.fullmatch(key)
        if key == "trust_remote_code" and value not in (None, False) or key == "auto_map" and value is not None:
            refuse(key, value)
        if isinstance(value, str):
            if not (key in _TEXTS or token) or key in _CLASSES and not re.fullmatch(r"\w{1,100}", value):
                refuse(key, value)
        elif isinstance(value, list):
            pending += [(key, part, named) for part in value]
        elif isinstance(value, dict):
            # A list of templates, as older versions have it, holds objects, too.
            if not (key in _OBJECTS or token or key == "chat_template" or _numbers_alone(value)):
                refuse(key, value)
            inner = {"name", "template"} if key == "chat_template" else set()
            pending += [(part, held, named or key in _NAMED or part in inner) for part, held in value.items()]


def _numbers_alone(value: object) -> bool:
    """Whether an object names nothing that could be loaded, at any depth, as SmolVLM2's `video_sampling`."""
    if isinstance(value, dict):
        return all(map(_numbers_alone, value.values()))
    return value is None or isinstance(value, (bool, int, float))


def own_template(folder: Path) -> str | None:
    """The chat template an adapter comes with.

    Raises:
        ValueError: If it is longer than any, or no text.
    """
    names = (TEMPLATE_NAME, "chat_template.json", "processor_config.json", "tokenizer_config.json")
    found = (_template_of(folder, name) for name in names if (folder / name).is_file())
    return next((template for template in found if template is not None), None)


def _template_of(folder: Path, name: str) -> str | None:
    if name == TEMPLATE_NAME:
        with (folder / name).open("rb") as file:
            template = file.read(4 * LONGEST_TEMPLATE + 1).decode("utf-8", errors="replace")
    else:
        template = read_json(folder / name, kind="processor's configuration").get("chat_template")
    if isinstance(template, list):  # Several with their names, as older versions have it.
        named = {str(part.get("name")): part.get("template") for part in template if isinstance(part, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"the chat template in {name} is {template!r:.80}; expected a text.")
    if template is not None and len(template) > LONGEST_TEMPLATE:
        raise ValueError(
            f"the chat template in {name} is longer than {LONGEST_TEMPLATE} characters, more than such a template ever is."
        )
    return template


def own_settings(folder: Path) -> dict:
    """How an adapter's processor scales pictures, as far as it says so.

    Raises:
        ValueError: If a value is not of its kind.
    """
    settings: dict = {}
    for name in _IMAGE_CONFIGS:
        if (folder / name).is_file():
            settings.update(_settings_of(folder, name))
    return settings


def _settings_of(folder: Path, name: str) -> dict:
    if name not in _IMAGE_CONFIGS:
        return {}
    stored = read_json(folder / name, kind="processor's configuration")
    content = stored.get("image_processor", stored if name == _IMAGE_CONFIGS[0] else None)
    if not isinstance(content, dict):
        return {}
    settings = {key: content[key] for key in (*_FLAGS, *_SIZES, *_SCALES) if content.get(key) is not None}
    kinds = {
        **dict.fromkeys(_FLAGS, lambda value: isinstance(value, bool)),
        **dict.fromkeys(_SIZES, lambda value: all(map(_side, value.values() if isinstance(value, dict) else [value]))),
        **dict.fromkeys(_SCALES, lambda value: all(map(_number, value if isinstance(value, list) else [value]))),
    }
    for key, value in settings.items():
        if not kinds[key](value):
            raise ValueError(
                f"`{key}` of the image processor in {name} is {value!r:.80}; no picture is scaled by that."
            )
    return settings


def _side(value: Any) -> bool:
    return value is None or type(value) is int and value >= 1


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _largest(sizes: Any) -> int:
    return max((side for side in (sizes.values() if isinstance(sizes, dict) else [sizes]) if side), default=0)


def load_processor(
    source: AdapterSource,
    model: nn.Module,
    recorded: RecordedBase,
    conversations: Sequence[Sequence[dict]],
    *,
    token: str | bool | None = None,
    kind: Any = AutoProcessor,
) -> Any:
    """The base model's processor, with the adapter's own chat template and scaling of pictures where they differ.

    Nothing of the adapter's folder is loaded: its files are compared and a few values taken over. The template is first
    run in another process, within limits.

    Args:
        source (`AdapterSource`): The adapter.
        model (`torch.nn.Module`): The loaded model.
        recorded (`RecordedBase`): What the adapter says of its base model.
        conversations (`Sequence[list[dict]]`): Messages that the processor will be asked to render.
        token (`str` or `bool`, *optional*): See [`load_erased`].
        kind (`type`, defaults to `AutoProcessor`): What loads it; `AutoTokenizer` for a text model.

    Raises:
        OSError: If the base model has no processor, or it is not known where that would be.
        ValueError: If the adapter's processor is refused, see [`check_processor_files`].
    """
    check_processor_files(source.folder)
    place = str(getattr(model.config, "_name_or_path", "") or "") or recorded.name
    if not place:
        raise OSError("the base model says neither a repository nor a folder to load its processor from")
    options = {"revision": recorded.revision} if place == recorded.name and recorded.revision else {}
    processor = kind.from_pretrained(place, trust_remote_code=False, token=token, **options)
    template = own_template(source.folder)
    if template is not None and template != getattr(processor, "chat_template", None):
        tokenizer = getattr(processor, "tokenizer", processor)  # A text model's is its processor.
        tokens = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        check_template(template, [_texts_only(messages) for messages in conversations], tokens, where="the adapter")
        processor.chat_template = template
    images = getattr(processor, "image_processor", None)
    if images is not None:
        known = json.loads(images.to_json_string())
        changed = {
            key: value for key, value in own_settings(source.folder).items() if key in known and known[key] != value
        }
        for key in _SIZES:
            if key in changed and _largest(changed[key]) > max(_LARGEST_SIDE, _largest(known[key])):
                raise ValueError(
                    f"`{key}` of the image processor is {changed[key]!r:.80}, larger than pictures are made."
                )
        if changed:
            processor.image_processor = type(images).from_dict({**images.to_dict(), **changed})
    return processor


def tokenizer_problem(folder: Path, processor: Any) -> str | None:
    """What is wrong with an adapter's `tokenizer.json`: an adapter trains no words, so it must be the base model's.

    Args:
        folder (`pathlib.Path`): Of the adapter.
        processor (`ProcessorMixin`): The base model's.

    Raises:
        ValueError: If the file is damaged.
    """
    backend = getattr(processor.tokenizer, "backend_tokenizer", None)
    if backend is None or not (folder / TOKENIZER_NAME).is_file():
        return None
    own = read_json(folder / TOKENIZER_NAME, kind="tokenizer", max_bytes=2**26, max_values=2**23)
    base = json.loads(backend.to_str())
    for key in sorted({*own, *base} - {"version", "padding", "truncation"}):
        if _same_merges(own.get(key)) != _same_merges(base.get(key)):
            return f"{key!r:.40} is not that of the base model's tokenizer: what it reads or writes may be other words"
    return None


def _same_merges(part: Any) -> Any:
    """Older files write a merge as "a b", newer ones as ["a", "b"]."""
    if not isinstance(part, dict) or not isinstance(part.get("merges"), list):
        return part
    return {**part, "merges": [" ".join(merge) if isinstance(merge, list) else merge for merge in part["merges"]]}


def _texts_only(messages: Sequence[dict]) -> list[dict]:
    """Messages without their pictures, which templates only count."""
    return [
        {**message, "content": message["content"]}
        if isinstance(message["content"], str)
        else {
            **message,
            "content": [
                {key: part[key] for key in ("type", "text") if isinstance(part.get(key), str)}
                for part in message["content"]
            ],
        }
        for message in messages
    ]
