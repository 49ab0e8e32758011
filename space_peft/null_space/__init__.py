"""The (near-)null space of retained knowledge: observed, fitted, applied to a LoRA while it is trained, certified."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_exports


_EXPORTS = {
    "NullSpace": "space",
    "NullSpaceFitter": "moments",
    "load_null_spaces": "space",
    "save_null_spaces": "space",
}


if TYPE_CHECKING:
    from .moments import NullSpaceFitter as NullSpaceFitter
    from .space import NullSpace as NullSpace
    from .space import load_null_spaces as load_null_spaces
    from .space import save_null_spaces as save_null_spaces
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, _EXPORTS)
