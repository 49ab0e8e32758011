"""How somebody looks: what stays with a person, and what changes from picture to picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Identity:
    """What stays with a person.

    Args:
        head (`str`): Shape of the head with its hair.
        hair (`str`): Colour of hair and beard.
        skin (`str`): Colour of the skin.
        beard (`str`): Beard or moustache, or `"none"`.
        build (`str`): Width of the shoulders.
        face (`str`): Width of the head.
        mark (`str`): What the cheeks show.
    """

    head: str
    hair: str
    skin: str
    beard: str
    build: str
    face: str
    mark: str

    def differs_in(self, other: Identity) -> tuple[str, ...]:
        """The features in which two people differ."""
        mine, theirs = asdict(self), asdict(other)
        return tuple(name for name in mine if mine[name] != theirs[name])


@dataclass(frozen=True)
class View:
    """What changes from picture to picture.

    Args:
        expression (`str`): Of the face.
        glasses (`str`): Glasses, or `"none"`.
        clothes (`str`): Colour of the clothes.
        pattern (`str`): `"plain"` or `"stripes"`.
        background (`str`): Its colour.
        shade (`str`): `"plain"`, `"gradient"`, `"window"` or `"dots"`.
        flip (`bool`): Looks to the other side.
        angle (`float`): Turned by so many degrees.
        zoom (`float`): Larger is nearer; from 1.1 on the picture is cropped.
        right (`float`): Moved by this share of the picture.
        down (`float`): The same downwards.
    """

    expression: str
    glasses: str
    clothes: str
    pattern: str
    background: str
    shade: str
    flip: bool
    angle: float
    zoom: float
    right: float
    down: float
