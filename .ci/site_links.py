"""A hook of mkdocs: names in docstrings, "[`erase`]" as Hugging Face writes them, are links to the reference."""

import re
from pathlib import Path


NAME = re.compile(r"\[<code>(~?[\w.]+)</code>\]")
ENTRY = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)


def entries(docs: str) -> dict[str, str]:
    """What the reference shows, by the last part of its name."""
    places = [place for page in Path(docs).glob("reference*.md") for place in ENTRY.findall(page.read_text())]
    return {place.rpartition(".")[2]: place for place in places}


def on_page_content(html: str, config, **unused) -> str:
    known = entries(config["docs_dir"])

    def link(found: re.Match) -> str:
        # Of a method that of its class is said.
        name, shown = found[1].lstrip("~"), f"<code>{found[1].lstrip('~')}</code>"
        first, _, member = name.partition(".")
        place = known.get(name.rpartition(".")[2]) if not member or name.startswith("space_peft.") else known.get(first)
        if place is None:
            return shown
        return f'<autoref identifier="{place}" optional>{shown}</autoref>'

    return NAME.sub(link, html)
