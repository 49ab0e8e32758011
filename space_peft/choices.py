"""The words that settings take, for the library and its command line. Imports nothing slow."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args


ConstraintName = Literal["soft", "hard", "none"]


class Asked(NamedTuple):
    """
    What a configuration has to know of a constraint; what it does is in `null_space/constraints.py`.

    Args:
        knob (`str`, *optional*): The setting that says how strict it is.
        capped (`bool`): Whether `max_rank="auto"` is a number of eigenvectors, and not as many as it takes.
        acts (`bool`, defaults to `True`): Whether it keeps anything off, so that an adapter must be attached to null spaces.
    """

    knob: str | None
    capped: bool
    acts: bool = True


CONSTRAINTS: dict[str, Asked] = {
    "soft": Asked("strength", capped=True),
    "hard": Asked("energy", capped=False),
    "none": Asked(None, capped=False, acts=False),
}
InputKind = Literal["token", "pooled"]
INPUT_KINDS: tuple[InputKind, ...] = get_args(InputKind)
RefinementMethod = Literal["fourier", "pixels"]
REFINEMENT_METHODS: tuple[RefinementMethod, ...] = get_args(RefinementMethod)
Target = Literal["vision", "language", "all"]
TARGETS: tuple[Target, ...] = get_args(Target)
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES: tuple[DtypeName, ...] = get_args(DtypeName)
DeviceName = Literal["cuda", "cpu"]
DEVICES: tuple[DeviceName, ...] = get_args(DeviceName)
