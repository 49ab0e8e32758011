"""What a command says of bad input, instead of a traceback."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


class BadInput(Exception):
    """The input was bad, and it has been said why: the command ends with 2."""


@contextlib.contextmanager
def bad_input(command: str, *more: type[Exception]) -> Iterator[None]:
    """Prints what is raised inside because of bad input, and raises [`BadInput`] instead.

    Args:
        command (`str`): Its name.
        more (`type[Exception]`): What counts as bad input beside `OSError` (so do errors of the Hub) and `ValueError`.

    Raises:
        BadInput: If there was any.
    """
    errors: tuple[type[Exception], ...] = (OSError, ValueError, *more)
    try:
        yield
    except errors as error:
        print(f"space-peft {command}: {error}", file=sys.stderr)
        raise BadInput from error
