"""Renders a model card to a picture, to look at it before it is published.

    pip install -e ".[card]"     # WeasyPrint needs Pango: apt install libpango-1.0-0
    python examples/render_card.py FOLDER card.png [--height 1800]

The style is close to the Hub's; the YAML header is left out, as there. Pictures are read from the folder only.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pypdfium2
from markdown_it import MarkdownIt
from PIL import Image, ImageChops
from weasyprint import HTML
from weasyprint.urls import URLFetcher


WIDTH = 920  # CSS pixels; as wide as a card on the Hub.
MAX_HEIGHT = 14_000
STYLE = f"""
@page {{ size: {WIDTH}px {MAX_HEIGHT}px; margin: 0 }}
body {{ font: 15px/1.5 "Source Sans 3", "Noto Sans", "DejaVu Sans", sans-serif; color: #1f2328; padding: 12px 32px }}
h1, h2 {{ border-bottom: 1px solid #d1d9e0; padding-bottom: 5px; line-height: 1.25; margin: 22px 0 12px }}
h1 {{ font-size: 28px }} h2 {{ font-size: 21px }} h3 {{ font-size: 17px }}
a {{ color: #0969da; text-decoration: none }}
img {{ max-width: 100% }}
table {{ border-collapse: collapse; margin: 10px 0; font-size: 14px }}
th, td {{ border: 1px solid #d1d9e0; padding: 5px 11px; vertical-align: top }}
th:empty {{ padding: 0 }}
tr:nth-child(2n) td {{ background: #f6f8fa }}
code {{ font: 12.5px "DejaVu Sans Mono", monospace; background: #eff1f3; padding: 1px 4px; border-radius: 4px }}
pre {{ background: #f6f8fa; padding: 12px; border-radius: 6px; white-space: pre-wrap }}
pre code {{ background: none; padding: 0 }}
"""


class FolderFetcher(URLFetcher):
    """Reads files of one folder and nothing else: a card must stand on its own."""

    def __init__(self, folder: Path):
        super().__init__(allowed_protocols=["file"])
        self.folder = folder

    def fetch(self, url, headers=None):
        if self.folder not in Path(url2pathname(urlsplit(url).path)).resolve().parents:
            raise ValueError(f"the card shows {url}, which is not in its folder")
        return super().fetch(url, headers)


def card_html(text: str) -> str:
    """HTML of a card's body."""
    _, _, body = text.split("---\n", 2)
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(body)


def render(folder: Path, height: int | None = None) -> Image.Image:
    """Picture of `folder / "README.md"`.

    Args:
        folder (`Path`): An adapter folder with a card.
        height (`int`, *optional*): Cut off below this many CSS pixels.
    """
    folder = folder.resolve()
    page = f"<style>{STYLE}</style>{card_html((folder / 'README.md').read_text(encoding='utf-8'))}"
    pdf = HTML(string=page, base_url=folder.as_uri() + "/", url_fetcher=FolderFetcher(folder)).write_pdf()
    # A PDF counts in points, 3/4 of a CSS pixel.
    picture = pypdfium2.PdfDocument(io.BytesIO(pdf))[0].render(scale=4 / 3).to_pil().convert("RGB")
    blank = Image.new("RGB", picture.size, "white")
    bottom = ImageChops.difference(picture, blank).getbbox()[3] + 20
    return picture.crop((0, 0, picture.width, min(bottom, height or bottom)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="adapter folder with a README.md")
    parser.add_argument("output", type=Path, help="PNG file to write")
    parser.add_argument("--height", type=int, help="cut off below this many pixels")
    args = parser.parse_args()
    picture = render(args.folder, args.height)
    # A palette is enough for text and charts, and a quarter of the size.
    picture.quantize(192, dither=Image.Dither.NONE).save(args.output, optimize=True)
    print(f"{args.output}: {picture.width} x {picture.height}, {args.output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
