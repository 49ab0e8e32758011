"""The words that settings take, for the library and its command line. Imports nothing slow."""

from __future__ import annotations

from typing import Literal, get_args


ConstraintName = Literal["soft", "hard", "none"]
CONSTRAINTS: tuple[ConstraintName, ...] = get_args(ConstraintName)
InputKind = Literal["token", "pooled"]
INPUT_KINDS: tuple[InputKind, ...] = get_args(InputKind)
Target = Literal["vision", "language", "all"]
TARGETS: tuple[Target, ...] = get_args(Target)
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES: tuple[DtypeName, ...] = get_args(DtypeName)
DeviceName = Literal["cuda", "cpu"]
DEVICES: tuple[DeviceName, ...] = get_args(DeviceName)
