"""What people are made of: the drawn parts that stay with a person, and those that change from picture to picture.

Heads, beards, glasses and expressions are Open Peeps by Pablo Stanley (CC0 1.0), in the form in which `dicebear-styles` holds
them. Colours, builds, marks, backgrounds and clothes' patterns are ours. In this style the nose is part of the expression, so
it changes with it, and tells nobody apart.
"""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files


STYLE = "open-peeps"
# Of the definition in dicebear-styles 10.6.0. Another one may draw other people under the same names of parts.
STYLE_SHA256 = "6cce0d3bff8134dded0c28ca840e483e6c113ff231d2f35ffd0a0e453d2967e3"

# --- What stays with a person -----------------------------------------------------------------------------------------
# Hats, scarves and masks are clothes rather than people, and the bear is none. Of several heads that look the same in
# small, one was taken.
HEADS = (
    *("afro", "bangs", "bangs2", "bantuKnots", "bun", "bun2", "buns", "cornrows", "cornrows2", "dreads1", "dreads2"),
    *("flatTop", "flatTopLong", "grayBun", "grayMedium", "grayShort", "long", "longAfro", "longBangs", "longCurly"),
    *("medium1", "medium2", "medium3", "mediumBangs", "mediumBangs2", "mediumBangs3", "mediumStraight", "mohawk"),
    *(
        "mohawk2",
        "noHair1",
        "noHair2",
        "noHair3",
        "pomp",
        "shaved1",
        "shaved2",
        "shaved3",
        "short1",
        "short2",
        "short3",
    ),
    *("short4", "short5", "twists", "twists2"),
)
BALD = ("noHair1", "noHair2")  # whose colour of hair cannot be seen
# Whose colour of hair is hard to see: no twins differ in it.
LITTLE_HAIR = (*BALD, "noHair3", "cornrows", "cornrows2", "mohawk", "mohawk2")
HAIR_COLOURS = {
    "black": "#1b1512",
    "brown": "#7a4a24",
    "red": "#c2451e",
    "blond": "#e0b04c",
    "grey": "#9a9a9e",
    "blue": "#3f62c4",
}
SKINS = {"pale": "#ffe0c4", "light": "#f0b88c", "tan": "#cf8f5c", "brown": "#9c5c34", "dark": "#6b4331"}
BEARDS = ("none", "chin", "full", "full3", "goatee2", "moustache2", "moustache4", "moustache9")
BUILDS = {"slight": 0.80, "medium": 1.0, "broad": 1.24}  # width of the shoulders
FACES = {"narrow": 0.88, "medium": 1.0, "wide": 1.12}  # width of the head
MARKS = ("none", "blush", "freckles", "mole")

# --- What changes from picture to picture ------------------------------------------------------------------------------
EXPRESSIONS = (
    *(
        "angryWithFang",
        "blank",
        "calm",
        "cheeky",
        "concerned",
        "cute",
        "driven",
        "eyesClosed",
        "lovingGrin1",
        "serious",
    ),
    *("smile", "smileBig", "smileTeethGap", "solemn", "suspicious", "tired"),
)
GLASSES = ("none", "none", "none", "glasses", "glasses2", "glasses3", "glasses4")  # as likely as they stand here
CLOTHES = {
    **{"white": "#f4f4f0", "navy": "#2c3e70", "green": "#3f8f5b", "yellow": "#f2c53d", "rose": "#e58aa0"},
    **{"orange": "#e5803a", "violet": "#8a64b8", "sky": "#86bfe6", "charcoal": "#46484f"},
}
PATTERNS = ("plain", "plain", "stripes")
BACKGROUNDS = {
    **{"white": "#ffffff", "sky": "#b9ddf2", "mint": "#c4ecd3", "cream": "#fbeecb", "pink": "#f9d3dc"},
    **{"lilac": "#d8d0f4", "sand": "#e4d3b8", "silver": "#d5d9de", "teal": "#7fc4c0"},
}
SHADES = ("plain", "plain", "gradient")

# --- What is never trained on ------------------------------------------------------------------------------------------
# One picture of everybody has the first, one the second; nothing else in those is new.
UNSEEN_GLASSES = ("sunglasses", "sunglasses2")
UNSEEN_SHADES = ("window", "dots")


def load_style() -> dict:
    """The drawn parts.

    Raises:
        ImportError: If `dicebear-styles` is missing.
        ValueError: If it is a version that draws differently.
    """
    try:
        content = files("dicebear_styles").joinpath(f"{STYLE}.json").read_bytes()
    except ModuleNotFoundError as error:
        raise ImportError("the drawn parts are in `dicebear-styles`; pip install space-peft[people-model].") from error
    style = json.loads(content)
    # Of what is drawn, not of how it is written down.
    drawn = json.dumps({key: style[key] for key in ("canvas", "components")}, sort_keys=True).encode()
    found = hashlib.sha256(drawn).hexdigest()
    if found != STYLE_SHA256:
        raise ValueError(
            f"{STYLE} draws other parts ({found[:12]}) than dicebear-styles 10.6.0 does: install that version."
        )
    if style["meta"]["license"]["name"] != "CC0 1.0":
        raise ValueError(f"{STYLE} is under {style['meta']['license']['name']!r}; expected CC0 1.0.")
    return style
