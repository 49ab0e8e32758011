"""Whose code makes the host wait inside a training step, or computes in float64: seen without a card.

On a card every `.item()`, and whatever needs to know a tensor's values to know a shape, waits for all kernels queued so
far. On a CPU the same calls can be watched: those of tensors' methods by a function mode, those inside of PyTorch's own
operations by a dispatch mode. Copies from a card to the host are `.cpu()` and `.numpy()` here; `.to(device)` cannot be
told from one to the card, and is left to the profiler on a card (`benchmarks/gpu.py`).
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback


# Methods that give Python a value, or a copy in host memory.
_METHODS = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__"}
# Operations whose result's shape, or whose success, is only known once they have run.
_OPERATIONS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "_linalg_svd",
    "_linalg_eigh", "linalg_cholesky", "linalg_inv_ex", "bincount",
}  # fmt: skip
_REPOSITORY = Path(__file__).parents[2]


class StepAudit(TrainerCallback):
    """
    Watches the training steps `first` and later: from their beginning, batches at hand, to their end, before logging.

    As a callback of a `Trainer` it must be the last one. `watching()` watches any other piece of work.

    Args:
        first (`int`, defaults to 1): Steps before it warm up.

    Attributes:
        steps (`int`): How many were watched.
        waits (`Counter`): How often the host would wait, by `(owner, what, where)`. The owner is "space_peft" or the name of
            the library whose code asks.
        doubles (`Counter`): Operations that put out float64, by the same keys.
    """

    def __init__(self, first: int = 1):
        self.first, self.steps = first, 0
        self.waits: Counter = Counter()
        self.doubles: Counter = Counter()
        self._open: contextlib.ExitStack | None = None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= self.first and self._open is None:
            self.steps += 1
            self._open = contextlib.ExitStack()
            self._open.enter_context(self.watching())

    def on_step_end(self, args, state, control, **kwargs):
        if self._open is not None:
            self._open.close()
            self._open = None

    @contextlib.contextmanager
    def watching(self):
        with _Functions(self), _Operations(self):
            yield self

    def own(self, found: Counter) -> dict[str, int]:
        """What of it the library's own code asks for, by where."""
        return {f"{what} at {where}": count for (owner, what, where), count in found.items() if owner == "space_peft"}

    def note(self, found: Counter, what: str) -> None:
        owner, where = _asking()
        found[owner, what, where] += 1


class _Functions(TorchFunctionMode):
    def __init__(self, audit: StepAudit):
        super().__init__()
        self._audit = audit

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in _METHODS and args and isinstance(args[0], torch.Tensor):
            self._audit.note(self._audit.waits, name)
            with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
                return func(*args, **(kwargs or {}))  # noted: what it is made of need not be
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, audit: StepAudit):
        super().__init__()
        self._audit = audit

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in _OPERATIONS or name in ("index", "index_put_") and _by_mask(args):
            self._audit.note(self._audit.waits, name)
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, (tuple, list)) else (result,)
        if any(isinstance(one, torch.Tensor) and one.dtype == torch.float64 for one in results):
            self._audit.note(self._audit.doubles, name)
        return result


def _by_mask(args) -> bool:
    return any(isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in args[1] if one is not None)


def _asking() -> tuple[str, str]:
    """The library nearest to the call that is not PyTorch, and the place in it."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        where = f"{path.name}:{frame.f_lineno} {frame.f_code.co_name}"
        if "site-packages" in path.parts:  # Before the repository, in which an environment may lie.
            library = path.parts[path.parts.index("site-packages") + 1]
            if library != "torch":
                return library, where
        elif _REPOSITORY in path.parents and path.name != Path(__file__).name:
            return ("space_peft" if path.parts[len(_REPOSITORY.parts)] != "benchmarks" else "benchmark"), where
        frame = frame.f_back
    return "unknown", ""
