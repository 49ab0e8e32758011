"""What all commands share: options from a YAML file, results as JSON, help that fits a screen. Imports nothing slow."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import shlex
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..choices import nearest
from ..records.io import json_text, write_json
from ..records.stages import say
from .places import take_config


STDOUT = "-"
"""The place of `--json` that is no file."""
_WIDTH = 80
_BELOW = r"(torch|transformers|peft|accelerate|datasets|trl|bitsandbytes|huggingface_hub)\b"


def called() -> str:
    """What to type for `space-peft`: its path, where it was called by one and the shell would not find the name."""
    name, path = "space-peft", Path(sys.argv[0])
    return shlex.quote(str(path)) if path.name == name and shutil.which(name) is None else name


class Help(argparse.HelpFormatter):
    """Help of one line an option where that is enough; of several spellings of an option the first is shown."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=26, width=_WIDTH)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        shown = [text for text in action.option_strings if not text.startswith("--")] + [_long(action)]
        if action.nargs == 0 or action.nargs == "?" and action.const is True:
            return ", ".join(shown)
        return ", ".join(shown) + " " + self._format_args(action, self._get_default_metavar_for_optional(action))

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs in ("*", "+"):
            return f"{self._metavar_formatter(action, default_metavar)(1)[0]} ..."
        return super()._format_args(action, default_metavar)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        if not text or not action.option_strings or "(default" in text or "(required)" in text:
            return text
        usual = isinstance(default, str) and default not in ("", argparse.SUPPRESS)
        usual = usual or isinstance(default, (int, float)) and not isinstance(default, bool)
        return f"{text} (default: %(default)s)" if usual else text

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "N" if action.type is int else "X" if action.type is float else "TEXT"


def _long(action: argparse.Action) -> str:
    return next((text for text in action.option_strings if text.startswith("--")), action.option_strings[0])


def short_usage(parser: argparse.ArgumentParser) -> None:
    """Has the usage line name what is required, and not every option, which the lines below it do.

    Args:
        parser (`argparse.ArgumentParser`): Of a command.
    """
    parts: list[str] = []
    options = False
    for group in parser._mutually_exclusive_groups:
        if group.required:
            parts.append(
                "(" + " | ".join(f"{_long(a)} {a.metavar or a.dest.upper()}" for a in group._group_actions) + ")"
            )
    for action in parser._actions:
        if not action.option_strings:
            parts.append(str(action.metavar or action.dest.upper()))
        elif action.required:
            parts.append(f"{_long(action)} {action.metavar or action.dest.upper()}")
        else:
            options = True
    text = " ".join([parser.prog, *parts, *(["[options]"] if options else [])])
    parser.usage = textwrap.fill(text, _WIDTH - len("usage: "), subsequent_indent=" " * 9).replace("%", "%%")


def nearest_option(name: str, options: Iterable[str], command: str) -> str:
    """What to say after the name of something that is no option: the nearest one, or where they are listed.

    Args:
        name (`str`): That was given.
        options (`list[str]`): Names of options.
        command (`str`): Its name.
    """
    near = nearest(name, options, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"see space-peft {command} --help."


def refuse_unknown(rest: Sequence[str], parser: argparse.ArgumentParser, command: str) -> None:
    """Refuses what a parser did not know.

    Args:
        rest (`list[str]`): What it left.
        parser (`argparse.ArgumentParser`): Of the command.
        command (`str`): Its name.

    Raises:
        ValueError: If it left anything.
    """
    if not rest:
        return
    flags = [word.partition("=")[0] for word in rest if word.startswith("-")]
    if not flags:
        raise ValueError(f"{rest[0]!r} belongs to no option; see space-peft {command} --help.")
    known = [_long(action) for action in parser._actions if action.option_strings]
    raise ValueError(f"{flags[0]} is not an option; {nearest_option(flags[0], known, command)}")


def refuse_misspelt(argv: Sequence[str], parser: argparse.ArgumentParser, command: str) -> None:
    """Refuses flags that a command does not have, before argparse says that what they were meant for is missing.

    Args:
        argv (`list[str]`): Arguments after the command's name.
        parser (`argparse.ArgumentParser`): Of the command.
        command (`str`): Its name.

    Raises:
        ValueError: If there is one; the message has the nearest options.
    """
    known = {spelling for action in parser._actions for spelling in action.option_strings}
    flags = argv[: argv.index("--")] if "--" in argv else argv
    flags = [word.partition("=")[0] for word in flags if word.startswith("--")]
    # With a blank in it argparse takes it for a value.
    refuse_unknown([flag for flag in flags if flag not in known and " " not in flag], parser, command)


def check_keys(values: Iterable, options: Iterable[str], path: str, command: str) -> None:
    """Refuses keys of a file that are no options.

    Args:
        values (`dict`): What the file holds.
        options (`list[str]`): Names of options, with underscores.
        path (`str`): Of the file.
        command (`str`): Its name.

    Raises:
        ValueError: If there is one; the message has the nearest options.
    """
    options = list(options)
    for key in values:
        if key not in options:
            raise ValueError(
                f"{path} sets {key!r}, which is not an option; {nearest_option(str(key), options, command)}"
            )


def with_config(
    parser: argparse.ArgumentParser,
    argv: Sequence[str],
    command: str,
    passed_over: Callable[[str], bool] | None = None,
) -> list[str]:
    """Arguments of a command with those of its `--config FILE` before them, so that flags win.

    They go through the parser as flags do: what would be refused there is refused.

    Args:
        parser (`argparse.ArgumentParser`): Of the command.
        argv (`list[str]`): Arguments after the command's name.
        command (`str`): Its name.
        passed_over (`Callable`, *optional*): Whether a key that is no option is left out, which is said; by default none is.

    Raises:
        OSError: If there is no such file.
        ValueError: If it is no YAML mapping, or a key or value of it cannot be used.
    """
    config, rest = take_config(argv)
    if config is None:
        return rest
    path, values = config
    spellings = {
        name.lstrip("-").replace("-", "_"): (name, action)
        for action in parser._actions
        for name in action.option_strings or [action.dest]
        if action.dest not in ("help", "config")
    }
    if passed_over is not None:
        left_out = [key for key in values if key not in spellings and passed_over(key)]
        values = {key: value for key, value in values.items() if key not in left_out}
        if left_out:
            print(f"space-peft {command}: not looked at in {path}: {', '.join(left_out)}", file=sys.stderr)
    check_keys(values, spellings, path, command)
    given = {token.partition("=")[0] for token in rest}
    set_already = {action.dest for action in parser._actions if given & {*action.option_strings}}
    from_file: list[str] = []
    for key, value in values.items():
        flag, action = spellings[key]
        if value is None or action.dest in set_already:
            continue
        if not action.option_strings:
            # One that is given wins as well.
            action.nargs, action.required, action.default = argparse.OPTIONAL, False, str(value)
            continue
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise ValueError(f"{path} sets {key!r} to {value!r}; expected true or false.")
            from_file += [flag] if value else []
            continue
        if isinstance(value, dict) and action.metavar == "JSON":
            value = json.dumps(value)
        if isinstance(value, bool) and (action.choices or action.const is True):
            value = str(value).lower()
        several = action.nargs is not None or isinstance(action, argparse._AppendAction)
        if isinstance(value, (dict, bool)) or isinstance(value, list) and not several:
            expected = "a list" if several else "one value"
            raise ValueError(f"{path} sets {key!r} to the {type(value).__name__} {value}; expected {expected}.")
        parts = [str(part) for part in (value if isinstance(value, list) else [value])]
        # In one word: a value may begin with a dash.
        from_file += [f"{flag}={part}" for part in parts] if action.nargs is None else [flag, *parts]
    # A list takes whatever follows it, up to the next flag: what has no flag goes first.
    positional = any(not action.option_strings for action in parser._actions)
    return [*rest, *from_file] if positional else [*from_file, *rest]


def tell(args: argparse.Namespace, text: str, content: Any) -> None:
    """Prints a command's result, or writes it as JSON where `--json` says.

    Args:
        args (`argparse.Namespace`): Of the command, with `json` and with the `out` to print to.
        text (`str`): For people.
        content (`Any`): The same for programs: JSON values.
    """
    if args.json == STDOUT:
        print(json_text(content), end="", file=args.out)
        return
    print(text, file=args.out)
    if args.json is not None:
        write_json(args.json, content)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--json`."""
    parser.add_argument("--json", metavar="FILE", help="write the result to this file, too; - prints it instead")


def add_config(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--config`, for its help: `with_config` takes it out before."""
    parser.add_argument("--config", metavar="FILE", help="YAML file of these options; flags win")


def check_json(place: str | None) -> None:
    """Refuses a place for JSON that cannot be one, before anything is done.

    Raises:
        IsADirectoryError: If it is a folder.
    """
    if place is not None and place != STDOUT and Path(place).is_dir():
        raise IsADirectoryError(f"--json takes a file to write, and {place!r} is a folder.")


@contextlib.contextmanager
def without_developers_warnings() -> Iterator[None]:
    """Hides what the libraries below tell their developers: nobody who runs a command can do anything about it."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=_BELOW)
        yield


@contextlib.contextmanager
def as_notes() -> Iterator[None]:
    """Has warnings, and what the library logs, printed as `note: ...`: where in the source they arose helps no user."""
    handler = _Notes()
    ours = logging.getLogger("space_peft")
    propagates, ours.propagate = ours.propagate, False
    ours.addHandler(handler)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, category, filename, *place: _note(message, filename)
        try:
            yield
        finally:
            ours.removeHandler(handler)
            ours.propagate = propagates


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _note(record.getMessage())


def _note(message: object, filename: str = "") -> None:
    # What speaks of another library's settings may be of no option here.
    package = filename.replace("\\", "/").rpartition("/site-packages/")[2].partition("/")[0] if filename else ""
    whose = f" ({package})" if "site-packages" in filename and not package.startswith("space_peft") else ""
    say(f"note{whose}: {message}")


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Switches off the bars that `datasets` and `transformers` draw of what is on this disk; downloads keep theirs."""
    from datasets import utils as datasets
    from huggingface_hub import utils as hub
    from transformers.utils import logging as transformers

    of_datasets, of_transformers = not datasets.are_progress_bars_disabled(), transformers.is_progress_bar_enabled()
    downloads = not hub.are_progress_bars_disabled()

    def keep_downloads() -> None:
        # transformers switches those of the Hub with its own.
        if downloads:
            hub.enable_progress_bars()
        else:
            hub.disable_progress_bars()

    datasets.disable_progress_bars()
    transformers.disable_progress_bar()
    keep_downloads()
    try:
        yield
    finally:
        if of_datasets:
            datasets.enable_progress_bars()
        if of_transformers:
            transformers.enable_progress_bar()
            keep_downloads()


@contextlib.contextmanager
def quietly(args: argparse.Namespace) -> Iterator[None]:
    """Sends what is printed meanwhile to the error stream, if `--json -` asks for the result alone.

    Args:
        args (`argparse.Namespace`): Of the command; gets `out`, where the result goes.
    """
    args.out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr) if args.json == STDOUT else contextlib.nullcontext():
        yield
