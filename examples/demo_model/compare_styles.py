"""How alike two styles draw the same concept: is the unseen style honestly unseen?

    python examples/demo_model/compare_styles.py

Root mean square difference of the two drawings of a concept at 24 x 24 pixels, colours in [0, 1]. Below 0.05 the two
look the same at the model's resolution, below 0.10 they are the same design with other shades.
"""

from __future__ import annotations

import itertools

import numpy as np
from PIL import Image

from space_peft.demo import TRAINED_STYLES, UNSEEN_STYLE, load_demo_images


def main() -> None:
    drawn: dict[str, dict[str, np.ndarray]] = {}
    for row in load_demo_images():
        small = row["image"].resize((24, 24), Image.BOX)
        drawn.setdefault(row["style"], {})[row["name"]] = np.asarray(small, dtype=float) / 255
    print(f"{'pair':40} {'n':>4} {'median':>7} {'< 0.05':>7} {'< 0.10':>7}")
    for one, two in itertools.combinations([UNSEEN_STYLE, *TRAINED_STYLES], 2):
        shared = sorted(drawn[one].keys() & drawn[two].keys())
        gaps = np.array([np.sqrt(((drawn[one][n] - drawn[two][n]) ** 2).mean()) for n in shared])
        shares = f"{(gaps < 0.05).mean():7.3f} {(gaps < 0.10).mean():7.3f}"
        print(f"{one + ' / ' + two:40} {len(gaps):4d} {np.median(gaps):7.3f} {shares}")


if __name__ == "__main__":
    main()
