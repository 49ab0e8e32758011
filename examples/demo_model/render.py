"""Align the emoji sets by codepoint and render every drawing once.

    python examples/demo_model/render.py --work work

Writes `<work>/emoji.npz`: `images` (n, 96, 96, 4) uint8 RGBA, `emoji` (n,) index into `names`, `style` (n,), and per
emoji `names`, `codepoints`, `groups`.
"""

from __future__ import annotations

import argparse
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import resvg_py
from concepts import FXEMOJI_NAMES
from fetch import IMAGE_PACKAGES, NAME_PACKAGE, package_folder
from PIL import Image
from tqdm.auto import tqdm


SIZE = 96
# Flags are patterns, people differ by skin tone and hair only: neither teaches the tower about objects.
GROUPS = {
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Smileys & Emotion",
    "Symbols",
}
STYLES = tuple(IMAGE_PACKAGES)


class IconSet:
    """One Iconify JSON package: finds an emoji's drawing and wraps it as an SVG document.

    Args:
        style (`str`): Key of `IMAGE_PACKAGES`.
        folder (`Path`): Unpacked package.
    """

    def __init__(self, style: str, folder: Path):
        self.style = style
        self.icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
        self.chars = json.loads((folder / "chars.json").read_text(encoding="utf-8"))

    def find(self, emoji: str, emoji_name: str, slug: str) -> str | None:
        """Name of the icon that draws `emoji`, or `None`."""
        points = ["-".join(f"{ord(c):x}" for c in text) for text in (emoji, emoji.replace("\ufe0f", ""))]
        candidates = [self.chars[p] for p in points if p in self.chars]
        slug = slug.replace("_", "-")
        if self.style == "fxemoji":  # ships no codepoint table and writes its names without separators
            candidates.append(FXEMOJI_NAMES.get(emoji_name, slug.replace("-", "")))
        else:
            candidates.append(slug)
        for name in candidates:
            if name in self.icons["icons"]:
                return name
            alias = self.icons.get("aliases", {}).get(name)
            # A rotated or flipped alias is another drawing; only plain renames are taken.
            if alias and not set(alias) - {"parent", "hidden"} and alias["parent"] in self.icons["icons"]:
                return alias["parent"]
        return None

    def svg(self, name: str) -> str:
        icon = self.icons["icons"][name]
        width = icon.get("width", self.icons.get("width", 16))
        height = icon.get("height", self.icons.get("height", 16))
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{SIZE}" height="{SIZE}" viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">'
            f"{icon['body']}</svg>"
        )


def render_svg(svg: str) -> np.ndarray | None:
    """Render to (96, 96, 4) uint8 RGBA; `None` when the drawing is empty."""
    png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE))
    pixels = np.asarray(image)
    return pixels if pixels[..., 3].any() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("work"), help="work folder (default: ./work)")
    work = parser.parse_args().work

    names_file = package_folder(work, *NAME_PACKAGE) / "data-by-emoji.json"
    listed = json.loads(names_file.read_text(encoding="utf-8"))
    sets = [IconSet(style, package_folder(work, *package)) for style, package in IMAGE_PACKAGES.items()]

    emoji_rows, jobs = [], []
    for emoji, entry in listed.items():
        if entry["group"] not in GROUPS:
            continue
        found = [(icons, name) for icons in sets if (name := icons.find(emoji, entry["name"], entry["slug"]))]
        jobs += [(len(emoji_rows), icons, name) for icons, name in found]
        emoji_rows.append((entry["name"], "-".join(f"{ord(c):x}" for c in emoji), entry["group"]))

    with ThreadPoolExecutor(2) as pool:  # resvg releases the interpreter lock
        drawn = pool.map(lambda job: render_svg(job[1].svg(job[2])), jobs)
        drawn = list(tqdm(drawn, total=len(jobs), desc="rendering", mininterval=5))
    kept = [(job, pixels) for job, pixels in zip(jobs, drawn, strict=True) if pixels is not None]
    names, codepoints, groups = (np.array(column) for column in zip(*emoji_rows, strict=True))
    np.savez(
        work / "emoji.npz",
        images=np.stack([pixels for _, pixels in kept]),
        emoji=np.array([job[0] for job, _ in kept]),
        style=np.array([job[1].style for job, _ in kept]),
        names=names,
        codepoints=codepoints,
        groups=groups,
    )
    print(f"{len(kept)} drawings of {len(emoji_rows)} emoji; {len(jobs) - len(kept)} empty ones left out")


if __name__ == "__main__":
    main()
