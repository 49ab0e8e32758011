"""What a killed fit had seen, kept in a file, so that the next one goes on from there."""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..records.io import atomic_path


if TYPE_CHECKING:
    from .moments import NullSpaceFitter

_FORMAT = "space_peft.fit_progress.v1"


class FitProgress:
    """
    Saves the sums of a fit every so many batches and finds, in a later run, where to go on.

    A saved state is used only if it is of the same model, layers and settings, and of the same first batches: these are
    read again (not put through the model) and compared by a checksum. Otherwise fitting starts anew, with a warning.

    Args:
        path (`str` or `os.PathLike`): The file; replaced as a whole each time, never written to in place.
        every (`int`): Batches between two saves.
        identity (`dict`): Plain values that tell this fit from others.
    """

    def __init__(self, path: str | os.PathLike, every: int, identity: dict):
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"batches between two saves are {every!r}; expected an integer of at least 1.")
        self._path = Path(path)
        self._every = every
        self._identity = json.loads(json.dumps(identity))
        self._checksum = 0
        self._expected = 0
        self.batches = 0  # seen so far, those of the earlier run included
        self.resumed_at = 0  # batches that the earlier run had seen
        for left_over in self._path.parent.glob(f".{self._path.name}.*.tmp"):
            left_over.unlink()  # of a run that was killed while it wrote

    def load(
        self,
        fitters: dict[str, NullSpaceFitter],
        owner: dict[str, str],
        new_fitter: Callable[[int, str], NullSpaceFitter],
    ) -> None:
        """Fills `fitters` and `owner` with what an earlier run had saved, if there is something.

        Args:
            fitters (`dict[str, NullSpaceFitter]`): By the layer that owns each; empty.
            owner (`dict[str, str]`): Owning layer of each layer; empty.
            new_fitter (`Callable`): Makes an empty fitter of a dimension, for the layer of a name.
        """
        if not self._path.is_file():
            return
        try:
            with safe_open(self._path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"its format is {metadata.get('format')!r}")
                state = json.loads(metadata["state"])
                if state["identity"] != self._identity:
                    raise ValueError("it is of another model, other layers or other settings")
                for name, (dim, counts) in state["fitters"].items():
                    fitters[name] = new_fitter(dim, name)
                    sums = {group: file.get_tensor(f"{name}|{group}") for group in counts}
                    fitters[name].load_state_dict({**fitters[name].state_dict(), "counts": counts, "sums": sums})
        except (SafetensorError, ValueError, KeyError) as error:
            fitters.clear()
            warnings.warn(f"{str(self._path)!r} cannot be used: {error}. Fitting starts again.", stacklevel=4)
            return
        owner.update(state["owner"])
        self._expected, self.resumed_at = state["checksum"], state["batches"]

    def start_batch(self, inputs: Mapping[str, torch.Tensor]) -> bool:
        """Takes note of a batch before its forward pass; returns whether it needs one.

        Raises:
            RuntimeError: If the batches are not those the saved state is of.
        """
        for key in sorted(inputs):
            if isinstance(inputs[key], torch.Tensor):
                content = inputs[key].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                self._checksum = zlib.crc32(content, self._checksum)
        self.batches += 1
        if self.batches > self.resumed_at:
            return True
        if self.batches == self.resumed_at and self._checksum != self._expected:
            raise RuntimeError(
                f"the first {self.batches} retained batches are not those of the interrupted fit in "
                f"{str(self._path)!r}; give the same data in the same order, or delete the file to start again."
            )
        return False

    def end_batch(self, fitters: dict[str, NullSpaceFitter], owner: dict[str, str]) -> None:
        """Takes note that a batch is counted; saves if it is time to."""
        if self.batches <= self.resumed_at or self.batches % self._every:
            return
        tensors, sizes = {}, {}
        for name, fitter in fitters.items():
            state = fitter.state_dict()
            sizes[name] = (fitter.dim, state["counts"])
            tensors.update({f"{name}|{group}": total.cpu() for group, total in state["sums"].items()})
        state = {
            "identity": self._identity, "batches": self.batches, "checksum": self._checksum,
            "owner": owner, "fitters": sizes,
        }  # fmt: skip
        with atomic_path(self._path) as temporary:
            save_file(tensors, temporary, metadata={"format": _FORMAT, "state": json.dumps(state)})

    def remove(self) -> None:
        """Deletes the file: the fit is over."""
        self._path.unlink(missing_ok=True)
