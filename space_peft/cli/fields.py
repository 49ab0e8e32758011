"""Options that are the fields of dataclasses, as `HfArgumentParser` makes them, without the seconds that importing it takes."""

from __future__ import annotations

import argparse
import types
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def add_fields(
    parser: argparse.ArgumentParser,
    kind: type,
    *,
    only: Collection[str] | None = None,
    spelled: Mapping[str, str] | None = None,
    hidden: bool = False,
) -> None:
    """Adds an option for each field of a dataclass: its name with underscores, and with dashes.

    None is required of the parser: a file may give it, and `required_fields` are asked for afterwards.

    Args:
        parser (`argparse.ArgumentParser`): To add to.
        kind (`type`): The dataclass. The metadata of a field are its `help` and `metavar`.
        only (`list[str]`, *optional*): Names of fields; by default all.
        spelled (`dict[str, str]`, *optional*): By field, another spelling, which is the one that help shows.
        hidden (`bool`, defaults to `False`): Whether help leaves them out.
    """
    hints = get_type_hints(kind)
    required = required_fields(kind)
    for part in fields(kind):
        if only is not None and part.name not in only:
            continue
        names = [f"--{part.name}", f"--{part.name.replace('_', '-')}"]
        names = list(dict.fromkeys([(spelled or {}).get(part.name, names[0]), *names]))
        default = part.default if part.default_factory is MISSING else part.default_factory()
        told: dict[str, Any] = {**part.metadata, "default": None if default is MISSING else default}
        if part.name in required:
            told["help"] += " (required)"
        if default is True:
            told["help"] += f" (default: true; --no_{part.name})"
        if hidden:
            told["help"] = argparse.SUPPRESS
        parser.add_argument(*names, dest=part.name, **told, **_how(hints[part.name], default))
        if default is True:
            off = [name.replace("--", "--no_" if "_" in name else "--no-", 1) for name in names]
            parser.add_argument(*off, dest=part.name, action="store_false", default=True, help=argparse.SUPPRESS)


def required_fields(kind: type) -> list[str]:
    """Names of a dataclass's fields that have no default."""
    return [part.name for part in fields(kind) if part.default is MISSING and part.default_factory is MISSING]


def _how(hint: Any, default: Any) -> dict[str, Any]:
    """How argparse reads a value of a type."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if get_origin(hint) is list:
        return {"nargs": "+" if default is None else "*", "type": get_args(hint)[0]}
    if hint is bool:
        return {"nargs": "?", "const": True, "type": as_bool}
    return {"type": hint}


def as_bool(text: str | bool) -> bool:
    """A yes or no as people write it.

    Raises:
        argparse.ArgumentTypeError: If it is neither.
    """
    word = str(text).lower()
    if word not in (*_YES, *_NO):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return word in _YES


def from_file(values: Mapping[str, Any], options: Mapping[str, argparse.Action], path: str) -> dict[str, Any]:
    """Values of a YAML file as defaults of a parser's options.

    Args:
        values (`dict`): What the file holds.
        options (`dict[str, argparse.Action]`): By name.
        path (`str`): Of the file.

    Raises:
        ValueError: If one is none of an option's choices.
    """
    read = dict(values)
    for key, value in values.items():
        action = options[key]
        if action.nargs in ("*", "+"):
            # One alone is a list of one: of a text each letter would be taken for a name.
            read[key] = value if isinstance(value, list) else action.default if value is None else [value]
        elif action.choices is not None and value is not None:
            if isinstance(value, bool):  # YAML takes a bare no for one.
                read[key] = next((word for word in (_YES if value else _NO) if word in action.choices), value)
            if read[key] not in action.choices:
                expected = ", ".join(map(repr, action.choices))
                raise ValueError(f"{path} sets {key!r} to {value!r}; expected one of {expected}.")
    return read
