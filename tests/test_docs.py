"""The documentation: every public name is in the reference, every page in the navigation, every link leads somewhere."""

import re
from pathlib import Path

import pytest
import yaml

import space_peft


ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def test_every_public_name_is_in_the_reference():
    listed = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
    names = {place.rpartition(".")[2] for place in listed}
    assert names == set(space_peft.__all__) - {"__version__"}
    for place in listed:
        module, _, name = place.rpartition(".")
        assert getattr(space_peft, name).__module__.removeprefix("space_peft.") == module.removeprefix("space_peft.")


def test_every_page_is_in_the_navigation():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    pages = {
        page for part in settings["nav"] for own in part.values() for page in ([own] if isinstance(own, str) else own)
    }
    left_out = set(settings["exclude_docs"].split())
    assert pages | left_out == {path.name for path in PAGES}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link and not link.startswith("mailto:")]
    assert not [link for link in links if not (page.parent / link).exists()]
