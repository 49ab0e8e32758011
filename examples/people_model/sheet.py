"""The contact sheets of the docs: twenty people, and near twins side by side.

python examples/people_model/sheet.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.font_manager import findfont
from people import STRONG, Person, draw_people
from PIL import Image, ImageDraw, ImageFont
from portrait import portrait


DEFAULT_TARGET = Path(__file__).resolve().parents[2] / "docs" / "images"
SIDE, LEFT, TOP = 64, 168, 20


def sheet(people: list[Person], notes: list[str], columns: dict[str, int]) -> Image.Image:
    """One row a person: the first pictures of each part, in their true size.

    Args:
        people (`list[Person]`): Who.
        notes (`list[str]`): What stands below each name.
        columns (`dict[str, int]`): By part, how many pictures.
    """
    # Pillow's own font lacks the letters of many names.
    font = ImageFont.truetype(findfont("DejaVu Sans"), 11)
    page = Image.new("RGB", (LEFT + sum(columns.values()) * (SIDE + 3), TOP + len(people) * (SIDE + 3)), "white")
    draw = ImageDraw.Draw(page)
    heads = {"train": "trained on", "test": "new", "unseen": "never trained on"}
    x = LEFT
    for part, count in columns.items():
        draw.text((x, 4), heads[part], fill="#333333", font=font)
        x += count * (SIDE + 3)
    for i, (person, note) in enumerate(zip(people, notes, strict=True)):
        y = TOP + i * (SIDE + 3)
        draw.text((4, y + 12), person.name, fill="black", font=font)
        draw.text((4, y + 30), note, fill="#666666", font=font)
        x = LEFT
        for part, count in columns.items():
            views = [picture.view for picture in person.pictures if picture.part == part]
            for view in views[:count]:
                page.paste(portrait(person.looks, view, SIDE), (x, y))
                x += SIDE + 3
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DEFAULT_TARGET, help="folder to write to")
    folder = parser.parse_args().output
    people = draw_people()
    by_id = {person.id: person for person in people}
    alone = [person for person in people if person.group == "private" and not person.twin][::4][:20]
    page = sheet(alone, [f"{p.profession}, {p.town}" for p in alone], {"train": 4, "test": 2, "unseen": 2})
    pairs = [(p, by_id[p.twin]) for p in people if p.twin and p.id < p.twin]
    twins = [person for pair in pairs[: 2 * len(STRONG)] for person in pair]
    notes = [f"twins but for: {p.looks.differs_in(by_id[p.twin].looks)[0]}" for p in twins]
    for name, drawn in (("people", page), ("people_twins", sheet(twins, notes, {"train": 4, "test": 2, "unseen": 2}))):
        drawn.quantize(128, dither=Image.Dither.NONE).save(folder / f"{name}.png", optimize=True)
        print(folder / f"{name}.png")


if __name__ == "__main__":
    main()
