"""Probes from a dataset of pictures with names: the target's, and all others beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from datasets import ClassLabel, Dataset, Value
from PIL import Image
from transformers.utils.logging import get_logger

from ..data.names import check_aliases, check_target, mentions
from ..data.questions import QuestionSet
from .probes import Probe, build_probes


logger = get_logger(__name__)

NAME_COLUMNS = ("name", "label")


@dataclass(frozen=True)
class NamedImages:
    """
    Pictures of a target, and of other things.

    Args:
        target (`tuple[PIL.Image.Image, ...]`): Pictures of the target.
        others (`tuple[tuple[str, PIL.Image.Image], ...]`): Names and pictures of other things.
    """

    target: tuple[Image.Image, ...]
    others: tuple[tuple[str, Image.Image], ...] = ()

    @property
    def other_names(self) -> list[str]:
        """Of the other pictures, each once, in order."""
        return list(dict.fromkeys(name for name, _ in self.others))


def split_by_name(images: Dataset, concept: str, aliases: Sequence[str] = ()) -> NamedImages:
    """Sorts pictures by what they show: a column `name` or `label` of texts or class labels says it, where there is one.

    Args:
        images (`datasets.Dataset`): Column `image`. Without a column of names all are of the target.
        concept (`str`): The target's name.
        aliases (`list[str]`, *optional*): Other names of it.

    Returns:
        [`NamedImages`]

    Raises:
        ValueError: If there is no column `image`, a picture has no name, the names are numbers, or none is the target's.
    """
    if "image" not in images.column_names:
        raise ValueError(f"the pictures have the columns {images.column_names}; expected a column `image`.")
    concept, aliases = check_target(concept, aliases)
    column = next((name for name in NAME_COLUMNS if name in images.features and _is_text(images.features[name])), None)
    if column is None:
        _refuse_numbers(images)
        return NamedImages(tuple(images["image"]))
    names = images[column]
    feature = images.features[column]
    if isinstance(feature, ClassLabel):
        names = [None if number is None else feature.int2str(number) for number in names]
    for number, name in enumerate(names):
        if name is None or not name.strip():
            raise ValueError(f"picture {number} has no name in the column {column!r}; name it, or leave it out.")
    known, target = sorted(set(names)), (concept, *aliases)
    own = {name for name in known if name.casefold() in {part.casefold() for part in target}}
    longer = {name for name in known if name not in own and mentions(name, target)}
    if not own:
        own, longer = longer, set()
    if longer:
        # A hot dog is no dog, and the Eiffel Tower at night is the Eiffel Tower: nobody can tell.
        logger.warning("Pictures named %s are left out: they may show %r or something else.", sorted(longer), concept)
    if not own:
        shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
        raise ValueError(
            f"none of the {len(images)} pictures is named {concept!r} in the column {column!r}: it holds {shown}. Give the "
            "name as it stands there (or as an alias), or drop the column if all of them show the target."
        )
    rows = list(zip(names, images["image"], strict=True))
    return NamedImages(
        tuple(image for name, image in rows if name in own),
        tuple((name, image) for name, image in rows if name not in own | longer),
    )


def named_probes(
    concept: str,
    images: NamedImages,
    *,
    questions: QuestionSet,
    aliases: Sequence[str] = (),
    siblings: Sequence[str] = (),
) -> list[Probe]:
    """The standard probes ([`build_probes`]) of pictures with names.

    Every picture of something else is asked the first naming question and, in turn, one held-out open prompt; those named
    in `siblings` count as the target's kind, too.

    Args:
        concept (`str`): The erased name.
        images ([`NamedImages`]): Of both, see [`split_by_name`].
        questions (`QuestionSet`): What is asked.
        aliases (`list[str]`, *optional*): Other names of the target.
        siblings (`list[str]`, *optional*): Names among the other pictures, of the same kind as the target.

    Returns:
        `list[Probe]`

    Raises:
        ValueError: If a sibling is not among the pictures.
    """
    siblings = check_aliases(siblings, what="siblings")
    if unknown := [name for name in siblings if name not in images.other_names]:
        raise ValueError(f"there is no picture of the siblings {unknown}; the others are {images.other_names}.")
    asked = [{"question": questions.naming[0], "answer": name, "image": image} for name, image in images.others]
    prompts = questions.open_held_out
    opened = [
        {"question": prompts[number % len(prompts)], "answer": name, "image": image}
        for number, (name, image) in enumerate(images.others if prompts else ())
    ]
    return build_probes(
        concept,
        questions=questions,
        target_images=images.target,
        retain_rows=asked,
        retain_open_rows=opened,
        sibling_rows=[row for row in asked if row["answer"] in siblings],
        aliases=aliases,
        same_kind=siblings,
    )


def _refuse_numbers(images: Dataset) -> None:
    """Refuses a column `name` or `label` that tells pictures apart and holds no names: not all of them are the target's."""
    for column in NAME_COLUMNS:
        if column in images.column_names and len(found := set(map(repr, images[column]))) > 1:
            shown = ", ".join(sorted(found)[:8]) + (", ..." if len(found) > 8 else "")
            raise ValueError(
                f"the column {column!r} of the pictures holds {images.features[column]} ({shown}), which are not names, so "
                "nothing says which pictures show the target. Make texts or class labels of them (`cast_column` to "
                "`ClassLabel(names=[...])`), or drop the column if all of them show the target."
            )


def _is_text(feature) -> bool:
    return isinstance(feature, ClassLabel) or isinstance(feature, Value) and feature.dtype in ("string", "large_string")
