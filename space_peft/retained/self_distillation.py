"""Retained rows without labels: the deployed model answers, and its answers are what is kept (self-distillation)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from datasets import Dataset

from ..data.names import check_aliases, mentions
from ..data.pictures import load_rgb
from ..data.questions import DEFAULT_QUESTIONS, Question
from ..data.rows import check_rows
from ..data.seed_images import pixel_hash
from ..modeling.checksum import base_checksum
from ..modeling.layers import deployed_model, our_adapter
from ..modeling.prompts import conversation, generate_tokens
from ..records.io import atomic_path
from ..records.stages import bar


_LINES = "picture, answer"  # What a line of a cache holds.


def retained_answers(
    model,
    processor,
    images: Dataset | Sequence | None = None,
    *,
    questions: Sequence[Question] = (*DEFAULT_QUESTIONS.naming, *DEFAULT_QUESTIONS.open),
    per_image: int = 2,
    names: Sequence[str] = (),
    max_new_tokens: int = 32,
    batch_size: int = 32,
    cache: str | os.PathLike | None = None,
    progress: bool = True,
) -> list[dict]:
    """Asks the deployed model about images, or in words alone, and returns its answers as retained rows.

    Each image is asked `per_image` of the questions, which take turns, so that all of them are asked about equally many
    images. Without `images` every question is asked once, without a picture.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model; its adapters are switched off.
        processor (`ProcessorMixin`): Its processor.
        images (`datasets.Dataset` or `list[PIL.Image.Image]`, *optional*): A dataset with a column `image`, or images. None
            of them should show what is to be forgotten.
        questions (`list[str or Dialogue]`, *optional*): What is asked; by default the library's naming and open questions.
        per_image (`int`, defaults to 2): Questions about each image.
        names (`list[str]`, *optional*): Names of the concept to forget: answers that say one are left out, because they
            would protect it. Leave it empty for answers in words alone, which are to be kept.
        max_new_tokens (`int`, defaults to 32): Longest answer, in tokens; a longer one is cut, and kept as far as it goes.
        batch_size (`int`, defaults to 32): Rows a forward pass.
        cache (`str` or `os.PathLike`, *optional*): JSON lines file to which answers are written as they come. A call that
            was interrupted goes on from it; a file of another model, of other questions or other pictures is an error.
        progress (`bool`, defaults to `True`): Show a progress bar.

    Returns:
        `list[dict]`: `prompt`, `completion` and `images`, for `retain_dataset`. Empty answers are left out.

    Raises:
        ValueError: If there is nothing to ask, an image does not decode, or the cache belongs to something else.
    """
    names = check_aliases(names, what="names")
    if images is not None:
        checked = check_rows(images, "images")
        if hasattr(checked, "column_names"):
            if "image" not in checked.column_names:
                raise ValueError(f"`images` has the columns {checked.column_names}; expected a column `image`.")
            checked = checked["image"]
        images = checked
    if len(questions) == 0 or (images is not None and len(images) == 0) or per_image < 1:
        raise ValueError(
            f"nothing to ask: got {len(questions)} questions, {0 if images is None else len(images)} images and "
            f"per_image={per_image}."
        )
    asked: list[tuple[int | None, int]]
    if images is None:
        asked = [(None, question) for question in range(len(questions))]
    else:
        per_image = min(per_image, len(questions))
        asked = [
            (image, (image * per_image + turn) % len(questions))
            for image in range(len(images))
            for turn in range(per_image)
        ]
    identity = "" if cache is None else _identity(model, processor, questions, asked, max_new_tokens)
    kept = _read_cache(cache, identity)
    answers = [answer for _, answer in kept]
    rows = []
    with bar("Asking the model", len(asked), initial=len(answers), show=progress, leave=True) as shown:
        for start in range(0, len(asked), batch_size):
            part = [
                conversation(questions[question], image=None if image is None else _decoded(images, image))
                for image, question in asked[start : start + batch_size]
            ]
            keys = [_picture_key(row) for row in part] if cache is not None else []
            for number, (key, (noted, _)) in enumerate(zip(keys, kept[start : start + batch_size]), start):
                if key != noted:
                    raise ValueError(
                        f"{cache} holds, in answer {number}, one about another picture than image {asked[number][0]} is now; "
                        "remove it, or choose another file."
                    )
            missing = part[max(0, len(answers) - start) :]
            if missing:
                with deployed_model(model) as deployed:
                    said = generate_tokens(
                        deployed, processor, missing, batch_size=batch_size, max_new_tokens=max_new_tokens
                    )
                said = [text.strip() for text in processor.batch_decode(said, skip_special_tokens=True)]
                _append(cache, zip(keys[len(part) - len(missing) :], said))
                answers += said
                shown.update(len(missing))
            for row, answer in zip(part, answers[start : start + batch_size], strict=True):
                if answer and not mentions(answer, names):
                    row["completion"] = [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
                    rows.append(row)
    return rows


def retained_texts(
    texts: Iterable[str], *, prompt: str = "Continue this text: {beginning}", beginning: int = 12, longest: int = 60
) -> list[dict]:
    """Plain texts as retained rows without images: the first words are the prompt, the following ones the answer to keep.

    Args:
        texts (iterable of `str`): For instance the column of any text dataset. Texts of fewer words than `beginning` + 1
            are left out.
        prompt (`str`): With a `{beginning}` field.
        beginning (`int`, defaults to 12): Words in the prompt.
        longest (`int`, defaults to 60): Words in the answer at most.

    Returns:
        `list[dict]`: `prompt`, `completion` and `images` (none), for `retain_dataset`.

    Raises:
        TypeError: If a text is no string.
        ValueError: If `prompt` has no field, or no text is long enough.
    """
    if "{beginning}" not in prompt:
        raise ValueError(f"`prompt` needs a {{beginning}} field, got {prompt!r}.")
    rows = []
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {i} is a {type(text).__name__}; expected a string. Pass one column of the dataset.")
        words = text.split()
        if len(words) > beginning:
            start, rest = " ".join(words[:beginning]), " ".join(words[beginning : beginning + longest])
            rows.append(conversation(prompt.format(beginning=start), answer=rest))
    if not rows:
        raise ValueError(f"no text has more than {beginning} words, so none could be continued.")
    return rows


def _decoded(images, place: int):
    try:
        return load_rgb(images[place])
    except (TypeError, ValueError) as error:
        raise ValueError(f"image {place}: {error}") from error


def _identity(model, processor, questions, asked, max_new_tokens: int) -> str:
    """Of everything that the answers depend on, but for the pictures, which stand beside their answers."""
    images = getattr(processor, "image_processor", None)
    content = [
        base_checksum(model, our_adapter(model) or "default"), [repr(question) for question in questions], asked,
        max_new_tokens, processor.chat_template, None if images is None else images.to_json_string(), _LINES,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _picture_key(row: dict) -> str | None:
    return pixel_hash(row["images"][0]) if row["images"] else None


def _read_cache(cache: str | os.PathLike | None, identity: str) -> list[tuple[str | None, str]]:
    """The answers there are, each after the hash of its picture."""
    if cache is None:
        return []
    path = Path(cache)
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps({"identity": identity}) + "\n", encoding="utf-8")
        return []
    whole, _, torn = path.read_text(encoding="utf-8").rpartition("\n")
    lines = whole.split("\n")
    try:
        header, answers = json.loads(lines[0]), [json.loads(line) for line in lines[1:]]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no cache of answers ({error}); remove it.") from error
    if not isinstance(header, dict) or header.get("identity") != identity:
        raise ValueError(
            f"{path} holds answers of another model, or to other questions or numbers of images; remove it, or choose "
            "another file."
        )
    if torn:  # A call that was killed has left half of a line.
        path.write_text(whole + "\n", encoding="utf-8")
    return [(picture, answer) for picture, answer in answers]


def _append(cache: str | os.PathLike | None, answers: Iterable[tuple[str | None, str]]) -> None:
    if cache is not None:
        with open(cache, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))
