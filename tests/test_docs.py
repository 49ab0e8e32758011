"""The documentation: every public name is in the reference, every page in the navigation, every link leads somewhere."""

import ast
import importlib
import re
import runpy
from pathlib import Path
from pkgutil import iter_modules

import pytest
import yaml

import space_peft


ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)|<img\b([^>]*)>")
SHOWN = [
    *PAGES,
    ROOT / "README.md",
    *(ROOT / "examples").rglob("README.md"),
    ROOT / "tests" / "hub" / "golden" / "card.md",
]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
ANCHOR = re.compile(r"\]\(([^)#\s]*)#([^)\s]+)\)")
FENCED = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
READ = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def packages():
    """Every package of the library that says which of its names are public, by its name."""
    found = [space_peft, *(importlib.import_module(f"space_peft.{m.name}") for m in iter_modules(space_peft.__path__))]
    # Installed, these two are inside the package; in a checkout they lie beside it.
    found += [importlib.import_module(f"space_peft.{name}") for name in ("trainers", "hub_cards")]
    return {package.__name__: package for package in found if hasattr(package, "__all__")}


def listed():
    """What the reference pages show: places such as `space_peft.config.SpaceLoraConfig`, as they stand there."""
    pages = (page for page in PAGES if page.name.startswith("reference"))
    return [place for page in pages for place in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)]


@pytest.mark.parametrize("package", packages().values(), ids=list(packages()))
def test_every_public_name_is_in_the_reference(package):
    shown = {}
    for place in listed():
        module, _, name = place.rpartition(".")
        module = module if module.startswith("space_peft.") else f"space_peft.{module}"
        shown.setdefault(name, []).append(getattr(importlib.import_module(module), name))
    for name in set(package.__all__) - {"__version__"}:
        assert any(getattr(package, name) is value for value in shown.get(name, [])), f"{name} is on no reference page"


def test_the_reference_shows_public_names_once_and_no_others():
    names = {name for package in packages().values() for name in package.__all__} - {"__version__"}
    assert sorted(place.rpartition(".")[2] for place in listed()) == sorted(names)


def test_every_page_is_in_the_navigation():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    pages = {
        page for part in settings["nav"] for own in part.values() for page in ([own] if isinstance(own, str) else own)
    }
    assert pages == {path.name for path in PAGES}
    # A link to a page that the site leaves out would pass, and lead nowhere.
    assert settings["strict"] and "exclude_docs" not in settings
    # With `--quiet` mkdocs counts no warning, and a link that leads nowhere passes.
    (recipe,) = re.findall(r"^docs:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert re.search(r"mkdocs build\n", recipe), "strict needs the warnings that --quiet hides"


def test_the_recipes_name_the_files_that_their_table_counts():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text.partition("| recipe |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| an? (\w+) \|(.*)$", table, re.MULTILINE)
    assert len(rows) == 4
    for what, cells in rows:
        recipe = text.partition(f"## A new {what}\n")[2].partition("\n## ")[0]
        assert not [file for file in re.findall(r"`([\w./]+)`", cells) if file not in recipe], what


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


@pytest.mark.parametrize("page", READ, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link and not link.startswith("mailto:")]
    assert not [link for link in links if not (page.parent / link).exists()]
    if page in PAGES:
        # The site holds this folder alone.
        assert not [link for link in links if link.startswith("..")]


def headings(page):
    """The anchors of a page's headings, as the site and GitHub make them."""
    lines = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", line).strip().lower()) for line in lines}


@pytest.mark.parametrize("page", [*READ, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_into_pages_lead_to_a_heading(page):
    links = [(place, anchor) for place, anchor in ANCHOR.findall(page.read_text()) if "://" not in place]
    assert not [link for link in links if link[1] not in headings(page.parent / link[0] if link[0] else page)]


@pytest.mark.parametrize("page", READ, ids=lambda page: page.name)
def test_files_of_the_repository_that_are_named_are_there(page):
    named = re.findall(
        r"\b(?:tests|benchmarks|examples|space_peft|trainers|hub_cards|docs)/[\w./-]*\w", page.read_text()
    )
    # NAME stands for what somebody is going to add.
    assert not [name for name in named if "NAME" not in name and not (ROOT / name).exists()]


def test_names_in_docstrings_are_links_on_the_site():
    hook = runpy.run_path(str(ROOT / ".ci" / "site_links.py"))
    page = "<p>[<code>erase</code>], [<code>Erasure.save</code>], [<code>~peft.PeftModel</code>], <code>list[str]</code> [1]</p>"
    assert hook["on_page_content"](page, {"docs_dir": str(ROOT / "docs")}, page=None, files=None) == (
        '<p><autoref identifier="space_peft.erasing.erase" optional><code>erase</code></autoref>, '
        '<autoref identifier="space_peft.erasing.Erasure" optional><code>Erasure.save</code></autoref>, '
        "<code>peft.PeftModel</code>, <code>list[str]</code> [1]</p>"
    )


def undescribed(text):
    """Images of a page whose alt text is missing, a name, or too short to say what is seen."""
    found = []
    for alt, place, tag in IMAGE.findall(text):
        if tag:
            alt = "".join(re.findall(r"""\balt=["']([^"']*)""", tag))
        if len(alt.split()) < 6 or Path(place).stem.lower() == alt.lower():
            found.append(place or tag)
    return found


# The last is a card as it is generated: `test_card.py` compares it with the template's.
@pytest.mark.parametrize("page", SHOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_picture_says_what_is_seen(page):
    assert not undescribed(page.read_text())


def test_pictures_without_a_description_are_found():
    said = "A fox that is called a wolf"
    page = (
        f"![](a.png) ![b](b.png) ![{said}](c.png) <img src='d.png'> <img alt='{said}' src='e.png'> [![f g](f.png)](x)"
    )
    assert undescribed(page) == ["a.png", "b.png", " src='d.png'", "f.png"]
    assert sum(len(IMAGE.findall(page.read_text())) for page in SHOWN) >= 15


def test_no_picture_lies_there_unseen():
    shown = {Path(place).name for page in SHOWN for _, place, _ in IMAGE.findall(page.read_text())}
    assert not [path.name for path in (ROOT / "docs" / "images").iterdir() if path.name not in shown]


# Turns of phrase that a reader stumbles over, each of which stood in a message once.
TRANSLATED = re.compile(
    r"\banew\b|\bstands twice\b|\bis no (option|YAML|JSON|report|card|salt|ledger|cache|file name)\b|\bof which alone\b"
    r"|\bbut for\b|\bare others than\b|\bnothing of (?=an|\d|\{)|\bof all that has chance\b|, for (one|none|only) of\b"
)


def test_messages_are_idiomatic():
    sources = [file for room in ("space_peft", "trainers", "hub_cards") for file in (ROOT / room).rglob("*.py")]
    found = []
    for file in sources:
        tree = ast.parse(file.read_text())
        shown = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # Docstrings are not shown.
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in shown:
                found += [f"{file.name}:{node.lineno} {said[0]}" for said in TRANSLATED.finditer(node.value)]
    assert len(sources) > 150 and not found
