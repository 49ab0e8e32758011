"""`space-peft anchors`: the images that stand in for a concept, made and looked at before anything is erased."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from transformers import AutoProcessor

from ..anchors import anchor_info
from ..arguments import get_selection
from ..data.names import check_aliases, check_concept
from ..erasing import ANCHORS_FOLDER, make_anchors
from ..modeling.loading import load_model
from ..records.folder import ANCHORS_PICTURE_NAME
from ..records.stages import begin, done, stages
from .erase import model_kwargs, parse_run, read_questions
from .pictures import draw_sheet, load_pictures
from .places import ConfigFile, model_place


_LISTED = 10


def run_anchors(argv: Sequence[str], config: ConfigFile | None = None) -> tuple[Dataset, Path]:
    """Selects and refines, and writes a dataset and a picture of them all.

    Args:
        argv (`list[str]`): Arguments after "anchors", without `--config`.
        config ([`ConfigFile`], *optional*): What `--config` names.

    Returns:
        `tuple[datasets.Dataset, pathlib.Path]`: The anchors, and the folder that they and their picture are in.

    Raises:
        OSError: If a file or folder does not exist.
        ValueError: If an option or a picture cannot be used.
    """
    (arguments, _, selection, _), args = parse_run(argv, config, "anchors")
    concept = check_concept(arguments.concept)
    aliases = list(check_aliases(arguments.aliases, concept=concept))
    if arguments.more_concepts:
        raise ValueError("anchors are made for one name at a time; leave --more_concepts out.")
    folder, place = Path(args.output_dir), model_place(arguments.model)
    with stages(["read", "load", "select", *(["refine"] if arguments.refine_steps else []), "save"]):
        begin("read")
        pool, questions = load_pictures(arguments.pool), read_questions(arguments)
        done(f"read {len(pool):,} public images")
        begin("load")
        model = load_model(place, **model_kwargs(arguments, args))
        anchors = make_anchors(
            concept, pool, model, AutoProcessor.from_pretrained(place), aliases, questions,
            arguments.anchors, arguments.refine_steps, args, selection=get_selection(selection),
            resume=not arguments.fresh, progress=True,
        )  # fmt: skip
        begin("save")
        draw_sheet(anchors, folder, concept)
        done(f"saved to {folder}")
    return anchors, folder


def anchors_content(anchors: Dataset, folder: Path) -> dict:
    """The result as JSON values: where it is, where it came from, and all but the pictures.

    Args:
        anchors (`datasets.Dataset`): Anchors.
        folder (`pathlib.Path`): Of the run.
    """
    columns = [name for name in anchors.column_names if name not in ("image", "raw_image")]
    return {
        "folder": str(folder / ANCHORS_FOLDER),
        "picture": str(folder / ANCHORS_PICTURE_NAME),
        "provenance": anchor_info(anchors),
        "anchors": anchors.select_columns(columns).to_list(),
    }


def anchors_text(anchors: Dataset, folder: Path) -> str:
    """What the command prints.

    Args:
        anchors (`datasets.Dataset`): Anchors.
        folder (`pathlib.Path`): Of the run.
    """
    shown = [name for name in ("pool_row", "score", "p_name_before", "p_name_after") if name in anchors.column_names]
    lines = ["  ".join(f"{name:>13}" for name in shown)]
    for row in anchors.select_columns(shown).select(range(min(len(anchors), _LISTED))):
        cells = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append("  ".join(f"{cell:>13}" for cell in cells))
    if len(anchors) > _LISTED:
        lines.append(f"... and {len(anchors) - _LISTED} more")
    return "\n".join(
        [
            *lines,
            "",
            f"{len(anchors)} anchors are in {folder / ANCHORS_FOLDER}, their picture is {folder / ANCHORS_PICTURE_NAME}",
        ]
    )
