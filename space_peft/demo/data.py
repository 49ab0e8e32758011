"""The images and the model that are shipped with the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import LlavaForConditionalGeneration, LlavaProcessor


UNSEEN_STYLE = "noto"
"""The drawing style of which the embedded model saw no image while it was trained."""

TRAINED_STYLES = ("fluent-emoji", "fluent-emoji-flat", "fxemoji", "noto-v1")
"""The styles the embedded model was trained on; the two fluent ones are one design."""

_FOLDER = Path(__file__).resolve().parent


def demo_model_path() -> Path:
    """Folder of the embedded model, for `AutoModelForImageTextToText` and `AutoProcessor`.

    Returns:
        `pathlib.Path`: The folder.

    Raises:
        `FileNotFoundError`: If the weights are missing from the installation.
    """
    folder = _FOLDER / "model"
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"no model.safetensors in {folder}. Reinstall space-peft with its package data, or train the model with the "
            "commands in examples/demo_model/README.md."
        )
    return folder


def load_demo_images() -> Dataset:
    """The drawings the embedded model knows, one row per concept and style.

    Returns:
        `datasets.Dataset`: Columns `image` (PIL, RGB, 96 x 96, on white), `name`, `kind`, `style`, `licence` (SPDX) and
        `codepoint`, sorted by kind, name and style. Not every style draws every concept.

    Raises:
        `FileNotFoundError`: If the image file is missing from the installation.
    """
    import pyarrow.parquet as pq
    from datasets import Dataset, Features, Image, Value

    path = _FOLDER / "images.parquet"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing. Reinstall space-peft with its package data, or build it with the commands in "
            "examples/demo_model/README.md."
        )
    columns = ("name", "kind", "style", "licence", "codepoint")
    features = Features({"image": Image(), **{column: Value("string") for column in columns}})
    # Read into memory instead of `Dataset.from_parquet`: no copy is left in the user's cache, no network is asked.
    return Dataset.from_dict(pq.read_table(path).to_pydict(), features=features)


def demo_concepts() -> list[str]:
    """Names of the concepts the embedded model knows, in alphabetical order."""
    return sorted(set(load_demo_images()["name"]))


def load_demo_model() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The embedded model in float32 evaluation mode, and its processor.

    Returns:
        `tuple[LlavaForConditionalGeneration, LlavaProcessor]`: Model and processor.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = demo_model_path()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(folder)
