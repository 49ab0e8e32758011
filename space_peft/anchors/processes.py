"""Several processes that select together fail together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ..distributed.processes import gather_objects, rank_and_size


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """Raises in every process if the block raised in one: the others would wait for it for ever.

    Raises:
        RuntimeError: In the processes whose own block went through; says which process failed, and how.
    """
    if rank_and_size()[1] == 1:
        yield
        return
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    messages = gather_objects(failure and f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for rank, message in enumerate(messages):
        if message is not None:
            raise RuntimeError(f"process {rank} failed while the anchors were selected: {message}")
