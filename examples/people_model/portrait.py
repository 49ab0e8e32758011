"""Draws a person: an identity, whose features stay, under a view, whose features change."""

from __future__ import annotations

import io
from functools import lru_cache
from xml.sax.saxutils import quoteattr

import resvg_py
from looks import Identity, View
from parts import BACKGROUNDS, BUILDS, CLOTHES, FACES, HAIR_COLOURS, SKINS, load_style
from PIL import Image


SIDE = 64  # of the pictures, which is what the embedded models see
_CANVAS = 704.0  # side of the style's drawing
_INK = "#17120f"


@lru_cache(maxsize=1)
def _style() -> dict:
    return load_style()


def _element(node: dict, colours: dict[str, str]) -> str:
    """An element of the style's definition as SVG."""
    attributes = ""
    for name, value in node.get("attributes", {}).items():
        value = colours[value["name"]] if isinstance(value, dict) else value
        attributes += f" {name}={quoteattr(str(value))}"
    inner = "".join(_element(child, colours) for child in node.get("children", ()))
    return f"<{node['name']}{attributes}>{inner}</{node['name']}>"


def _part(kind: str, variant: str, colours: dict[str, str]) -> str:
    return "".join(_element(node, colours) for node in _style()["components"][kind]["variants"][variant]["elements"])


def _marks(mark: str) -> str:
    """On both cheeks, in the coordinates of the canvas; drawn below the beard."""
    if mark == "blush":
        spots = [(330, 470, 34), (520, 470, 34)]
        return "".join(
            f'<ellipse cx="{x}" cy="{y}" rx="{r}" ry="{r * 0.7}" fill="#e0405a" fill-opacity="0.55"/>'
            for x, y, r in spots
        )
    if mark == "freckles":
        spots = [(310, 455), (345, 478), (325, 500), (365, 450), (505, 455), (530, 480), (500, 500)]
        return "".join(f'<circle cx="{x}" cy="{y}" r="8" fill="#6b2f14" fill-opacity="0.8"/>' for x, y in spots)
    return '<circle cx="345" cy="500" r="14" fill="#2a120a"/>' if mark == "mole" else ""


def _background(view: View) -> str:
    colour, side = BACKGROUNDS[view.background], _CANVAS
    whole = f'<rect width="{side}" height="{side}" fill="{{}}"/>'
    if view.shade == "gradient":
        stops = f'<stop offset="0" stop-color="{colour}"/><stop offset="1" stop-color="#8f9bab"/>'
        return f'<linearGradient id="g" x1="0" y1="0" x2="0.4" y2="1">{stops}</linearGradient>' + whole.format(
            "url(#g)"
        )
    drawn = whole.format(colour)
    if view.shade == "window":
        bars = [(60, 40, 230, 330), (330, 40, 230, 330)]
        drawn += "".join(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" fill="#fff8d8" stroke="#7c6a58" stroke-width="22"/>'
            for x, y, w, h in bars
        )
    if view.shade == "dots":
        drawn += "".join(
            f'<circle cx="{x}" cy="{y}" r="30" fill="#ffffff" stroke="#8894a6" stroke-width="8"/>'
            for x in range(50, 704, 150)
            for y in range(50, 704, 150)
        )
    return drawn


def portrait_svg(identity: Identity, view: View) -> str:
    """The picture as SVG."""
    hair = HAIR_COLOURS[identity.hair]
    colours = {"skin": SKINS[identity.skin], "ink": _INK, "headContrast": hair, "clothing": CLOTHES[view.clothes]}
    skin, cloth, outline = _style()["canvas"]["elements"][:3]
    body = _element(skin, colours) + _element(cloth, colours)
    if view.pattern == "stripes":
        lines = "".join(f'<rect x="-300" y="{y}" width="1400" height="26"/>' for y in range(560, 1100, 70))
        body += f'<clipPath id="c">{_element(cloth, colours)}</clipPath>'
        body += f'<g clip-path="url(#c)" fill="#ffffff" fill-opacity="0.65">{lines}</g>'
    body += _element(outline, colours)
    # Most heads are drawn with their hair in ink: it takes the colour of the hair, and so does the line around the face.
    drawn = _part("head", identity.head, colours if _has_own_hair(identity.head) else {**colours, "ink": hair})
    head = f'<g transform="matrix(.99789 0 0 1 6.3 -58)">{drawn}</g>{_marks(identity.mark)}'
    head += f'<g transform="translate(351 275)">{_part("expression", view.expression, colours)}</g>'
    if identity.beard != "none":
        # A beard as dark as the skin would not be seen without its own colour.
        head += f'<g transform="translate(58 333)">{_part("facialHair", identity.beard, {**colours, "ink": hair})}</g>'
    if view.glasses != "none":
        head += f'<g transform="translate(190 243)">{_part("accessories", view.glasses, colours)}</g>'
    middle = _CANVAS / 2
    build, face = BUILDS[identity.build], FACES[identity.face]
    person = (
        f'<g transform="translate({middle} 0) scale({build} 1) translate({-middle} 0)">{body}</g>'
        f'<g transform="translate(400 0) scale({face} 1) translate(-400 0)">{head}</g>'
    )
    zoom, flip = 0.8 * view.zoom, -1 if view.flip else 1
    moved = (
        f"translate({middle + view.right * _CANVAS} {middle + view.down * _CANVAS}) rotate({view.angle}) "
        f"scale({zoom * flip} {zoom}) translate({-middle} {-middle})"
    )
    size = f'width="{SIDE}" height="{SIDE}" viewBox="0 0 {_CANVAS:.0f} {_CANVAS:.0f}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{_background(view)}<g transform="{moved}">{person}</g></svg>'
    )


def _has_own_hair(head: str) -> bool:
    """Whether the head's hair has a colour of its own in the style, beside its lines."""
    return "headContrast" in str(_style()["components"]["head"]["variants"][head])


def portrait(identity: Identity, view: View, side: int = SIDE) -> Image.Image:
    """The picture, drawn at twice its size and made smaller.

    Args:
        identity ([`Identity`]): Who.
        view ([`View`]): How.
        side (`int`, defaults to 64): Of the picture.

    Returns:
        `PIL.Image.Image`: RGB.
    """
    png = resvg_py.svg_to_bytes(svg_string=portrait_svg(identity, view), skip_system_fonts=True, width=2 * side)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    return image.resize((side, side), Image.Resampling.BOX)
