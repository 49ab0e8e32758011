"""The modules of examples, which import each other by bare name, as scripts do."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


EXAMPLES = Path(__file__).parents[1] / "examples"


@contextmanager
def example_modules(*folders: Path) -> Iterator[Callable[[str], ModuleType]]:
    """Yields what imports a module of these folders; afterwards path and modules are as before.

    Args:
        folders (`Path`): Of `examples`, first come first.
    """
    before, path = set(sys.modules), list(sys.path)
    sys.path[:0] = map(str, folders)
    try:
        yield importlib.import_module
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and Path(file).is_relative_to(EXAMPLES):
                del sys.modules[name]
