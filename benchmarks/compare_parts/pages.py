"""Tables that a program wrote into a page that people wrote."""

from __future__ import annotations

import re
from pathlib import Path


def write_blocks(path: Path, blocks: dict[str, str]) -> None:
    """Replaces what is between `<!-- NAME: begin ... -->` and `<!-- NAME: end -->` for every block.

    Raises:
        ValueError: If the page has no such pair of comments; it is left as it is.
    """
    text = path.read_text(encoding="utf-8")
    for name, block in blocks.items():
        pattern = rf"(<!-- {re.escape(name)}: begin[^>]*-->\n).*?(<!-- {re.escape(name)}: end -->)"
        text, count = re.subn(
            pattern, lambda found, block=block: f"{found[1]}{block}\n{found[2]}", text, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(
                f"{path} must have one block between comments `{name}: begin` and `{name}: end`, got {count}."
            )
    path.write_text(text, encoding="utf-8")
