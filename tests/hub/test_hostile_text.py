"""Names, captions and all else that comes from outside stays text: on the card, in its YAML, in `report.md`, on screen."""

import html
import json
import re
import unicodedata
from pathlib import Path

import pytest
import yaml
from card_folders import card_data, report, write_folder
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from metadata_schema import check_metadata
from PIL import Image

from space_peft.evaluation.plots import plot_anchor_grid, plot_answer_page, plot_probe_bars
from space_peft.hub_cards import write_card
from space_peft.records.card_data import ErasureCardData
from space_peft.records.escape import code_span, markdown_text, plain_line


NASTY = [
    "[link](http://evil.example)", "![x](http://evil.example/x.png)", "](http://evil.example) [y", "[x]: http://evil.example",
    "[^1]", "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<!-- hidden", "-->", "<b>", "&lt;b&gt;", "&#60;b&#62;",
    "{{ 7 * 7 }}", "{% include 'x' %}", "{{ config.__class__ }}", "{# comment #}", "{{", "}}", "%}",
    "a: b", "- a", "? a", "# title", "&anchor *alias", "!!python/object/apply:os.system [id]", "|", ">", "%TAG", "@x", "`x`",
    "'", '"', "null", "true", "1.5", "~", "=", "<<", "---", "...", "a\n---\nlicense: mit", "\n\n# heading\n\n", "\n| a | b |\n|---|---|\n",
    "a | b", "\\|", "\\", "\\\\", "``` x", "```\n", "~~~", "~~x~~", "**x**", "**", "*", "_x_", "__", "* * *", "+ x", "1. x", "1) x", "> x",
    "    code", "\tcode", "x  ", "  \n", "$$x$$", "$x$", "\\(x\\)", "\\[x\\]", ":smile:", "a@b.example", "www.evil.example", "http://evil.example",
    "javascript:alert(1)", "ftp://x.y", "x.com", "\x00", "a\x00b", "\x1b[31mred\x1b[0m", "\x07", "\x85", "\u2028", "\u2029",
    "\u202egnp.exe", "\u2066x\u2069", "\u200bfox", "f\u200box", "\ufefffox", "\u00adfox", "\ufff9", "\U000e0041", "fox\ud800", "\udfff",
    "../../etc/passwd", "/etc/passwd", "C:\\Windows\\x", "CON", "NUL.txt", "aux", "..", ".", "~/x", "a/b", "file\x00.png",
    "🦊", "👩\u200d🚀", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "שועל", "ثعلب", "می\u200cخواهم", "狐狸", "é", "e\u0301\u0301\u0301", "ﬁ", "fox" * 4000, "[" * 500, "`" * 300,
    "C++", "C#", "AT&T", "O'Brien", "St. Mary's (old)", "Yahoo!", "Dr. Who?", "50 % + 3 = 4", "snake_case_name",
]  # fmt: skip
# Half of what is drawn joins hostile pieces, the rest is any text at all; JSON files hold no lone surrogates.
PIECES = st.lists(st.sampled_from([text for text in NASTY if len(text) < 100]) | st.text(max_size=5), max_size=5)
HOSTILE = (PIECES.map("".join) | st.text(max_size=300)).map(lambda text: re.sub("[\ud800-\udfff]", "", text))

markdown = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def structure(text: str) -> list[tuple[str, str]]:
    """Every token of a document but the text, which may differ in length only."""
    found = []
    for token in markdown.parse(text):
        for part in [token, *(token.children or [])]:
            target = part.attrGet("href") or part.attrGet("src") or ""
            entry = (part.type, part.tag, target, part.content if "html" in part.type else "")
            if part.type not in ("text", "text_special") or found[-1] != entry:
                found.append(entry)
    return found


def rendered(text: str) -> str:
    """What a reader sees: the text content of the page."""
    return html.unescape(re.sub("<[^>]*>", "", markdown.render(text)))


def split(card: str) -> tuple[dict, str]:
    header, body = card.removeprefix("---\n").split("\n---\n", 1)
    return yaml.safe_load(header), body


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Structure and metadata of the card that is about a fox."""
    metadata, body = split(write_card(write_folder(tmp_path_factory.mktemp("plain") / "adapter")).read_text())
    return metadata, structure(body)


def check_card(text: str, tmp_path_factory, plain) -> None:
    outside = tmp_path_factory.mktemp("hostile")
    folder = write_folder(outside / "adapter", text)
    before = files(outside)
    card = write_card(folder).read_text(encoding="utf-8")
    assert files(outside) == before | {"adapter/README.md"}
    shown = plain_line(text)
    metadata, body = split(card)
    check_metadata(metadata)
    assert metadata["model-index"][0]["name"] == f"base without {shown or 'a concept'}"
    same = {key: value for key, value in metadata.items() if key != "model-index"}
    assert same == {key: value for key, value in plain[0].items() if key != "model-index"}
    if not shown or shown in report().after:
        return  # Rows and sentences that are not on the other card, or fewer.
    assert structure(body) == plain[1]
    page = rendered(body)
    assert f"stop naming {shown.strip()} in images".replace("@", "@\u2060") in page
    # Outside of code no address that a renderer with automatic links would take.
    prose = re.sub(r"(?s)```.*?```|(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", body)
    assert not re.search(r"(?i)https?://evil|www\.evil|\w@\w", prose)


@pytest.mark.parametrize("text", [text for text in NASTY if not re.search("[\ud800-\udfff]", text)], ids=ascii)
def test_every_nasty_case_stays_text_on_the_card(text, tmp_path_factory, plain):
    check_card(text, tmp_path_factory, plain)


@settings(max_examples=50, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=HOSTILE)
def test_any_text_stays_text_on_the_card(text, tmp_path_factory, plain):
    check_card(text, tmp_path_factory, plain)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(text=PIECES.map("".join) | st.text(st.characters(exclude_categories=()), max_size=300))
@example(text="x" * 10_000)
def test_escaped_text_reads_as_itself_wherever_it_stands(text):
    shown = plain_line(text)
    assert "\n" not in shown and len(shown) <= 200
    assert not {unicodedata.category(c) for c in shown} & {"Cc", "Cs", "Zl", "Zp"}
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200b\u200e\u200f\ufeff]", shown)
    shown.encode()
    if not shown:
        return
    escaped = markdown_text(text)
    seen = shown.replace("@", "@\u2060")
    for before, after in (("", ""), ("x ", " y"), ("# ", ""), ("- ", ""), ("**", "** y"), ("| a |\n|---|\n| ", " |")):
        here, fox = before + escaped + after, before + "fox" + after
        assert structure(here) == structure(fox)
        assert rendered(here) == rendered(fox).replace("fox", seen)
    for cell in (False, True):
        before, after = ("| a |\n|---|\n| ", " |") if cell else ("x ", " y")
        here, fox = (before + code_span(t, cell=cell) + after for t in (text, "fox"))
        assert structure(here) == structure(fox)
        assert rendered(here).split() == rendered(fox).replace("fox", shown).split()


@settings(max_examples=100, derandomize=True, deadline=None)
@given(text=HOSTILE)
def test_report_page_keeps_its_structure(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    report(text).save(folder)
    page = (folder / "report.md").read_text(encoding="utf-8")
    heading, table = page.split("\n\n", 1)
    assert structure(table) == structure(report().to_table(markdown=True))
    assert structure(heading + "\n") == structure("# Erasing fox\n" if plain_line(text) else "# Erasing\n")
    assert files(folder) == {"report.md", "report.json"}
    assert json.loads((folder / "report.json").read_text(encoding="utf-8"))["concept"] == text


@pytest.mark.parametrize("text", ["fox\ud800", "\udfff"], ids=ascii)
def test_half_a_character_is_refused_before_anything_is_written(text, tmp_path):
    with pytest.raises(ValueError, match="`concept`"):
        ErasureCardData(concept=text)
    data = card_data()
    data.concept = text
    with pytest.raises(ValueError, match="`concept`"):
        data.save(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["fox", "C++", "St. Mary's (old)", "AT&T", "狐狸", "🦊", "می‌خواهم", "Dr. Who?"])
def test_ordinary_names_stay_as_they_are(text):
    assert plain_line(text) == text
    assert rendered(markdown_text(text)).strip() == text


@pytest.mark.parametrize(
    "text", ["$$x$$", "$\\frac{$", "$x_{$ y", "a\\$b", "fox\ud800", "a\x00b\n\tc", "\u202efox", "<b>"], ids=ascii
)
def test_pictures_are_drawn_of_any_name(text, tmp_path):
    image = Image.new("RGB", (4, 4))
    row = {"image": image, "before": text, "after": text, "ok": True, "forget": True}
    plot_answer_page([row], tmp_path / "answers.png", concept=text, dpi=40)
    plot_anchor_grid([row], [row], tmp_path / "anchors.png", concept=text, dpi=40)
    plot_probe_bars(report(text), tmp_path / "probes.png", dpi=40)
    assert files(tmp_path) == {"answers.png", "anchors.png", "probes.png"}
