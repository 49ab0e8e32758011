"""Retained rows without labels: the deployed model answers, and its answers are what is kept (self-distillation)."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from datasets import Dataset
from transformers.utils.logging import get_logger

from ..data.names import check_aliases, mentions
from ..data.pictures import load_rgb
from ..data.questions import DEFAULT_QUESTIONS, Question
from ..data.rows import check_rows
from ..data.seed_images import pixel_hash
from ..distributed import processes
from ..modeling.checksum import base_checksum
from ..modeling.layers import deployed_model, our_adapter
from ..modeling.prompts import answer_message, conversation, generate_tokens
from ..records.io import atomic_path
from ..records.stages import bar, begin, done
from .reading import RetainedRows, to_conversation


logger = get_logger(__name__)

_LINES = "picture, answer"  # What a line of a cache holds.


class OtherAnswers(ValueError):
    """A cache of answers belongs to something else."""


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

    def row(number: int) -> dict:
        image, question = asked[number]
        return conversation(questions[question], image=None if image is None else _decoded(images, image))

    identity = "" if cache is None else _identity(model, processor, questions, asked, max_new_tokens)
    said = _answered(
        model, processor, [image for image, _ in asked], row, identity,
        max_new_tokens=max_new_tokens, batch_size=batch_size, cache=cache, progress=progress,
    )  # fmt: skip
    return [
        {**one, "completion": [answer_message(answer)]}
        for _, one, answer in said
        if answer and not mentions(answer, names)
    ]


def answer_missing(
    model,
    processor,
    retained: RetainedRows,
    *,
    questions: Sequence[Question] = (*DEFAULT_QUESTIONS.naming, *DEFAULT_QUESTIONS.open),
    per_image: int = 2,
    names: Sequence[str] = (),
    max_new_tokens: int = 32,
    batch_size: int = 32,
    cache: str | os.PathLike | None = None,
    resume: bool = True,
    progress: bool = True,
) -> RetainedRows:
    """Has the deployed model answer those retained rows that have no answer; rows that have one stay as they are.

    A row is asked its own question, where it has one, or else `per_image` of `questions`, in turn. Says so in one line. In a
    distributed run rank 0 asks, and all get the answers.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model; its adapters are switched off.
        processor (`ProcessorMixin`): Its processor.
        retained ([`RetainedRows`]): Read with `unanswered=True`.
        questions (`list[str or Dialogue]`, *optional*): What rows without a question are asked.
        per_image (`int`, defaults to 2): Questions about each of them.
        names (`list[str]`, *optional*): Names of the concept to forget: answers about pictures that say one are left out.
        max_new_tokens, batch_size, progress: See [`retained_answers`].
        cache (`str` or `os.PathLike`, *optional*): JSON lines file to go on from, as of [`retained_answers`]; that of other
            rows or of another model is replaced, with a warning.
        resume (`bool`, defaults to `True`): Whether to take answers from there; else all are asked for anew.

    Returns:
        [`RetainedRows`]: All with an answer.

    Raises:
        ValueError: If there is no question, a picture does not decode, or no row is left.
    """
    if not retained.unanswered:
        return retained
    if len(questions) == 0 or per_image < 1:
        raise ValueError(f"nothing to ask: got {len(questions)} questions and per_image={per_image}.")
    begin("retain")
    logger.warning(
        "%d of %d retained rows have no answer: the model itself is asked, and its answers are what must not change.",
        len(retained.unanswered), len(retained),
    )  # fmt: skip
    turns = itertools.cycle(range(len(questions)))
    # Of each answer its row, and what it answers: the row's own question, or the number of one of ours.
    asked: list[tuple[int, list[dict] | int]] = []
    for place, prompt in retained.unanswered.items():
        own = [prompt] if prompt else itertools.islice(turns, min(per_image, len(questions)))
        asked += [(place, question) for question in own]

    def row(number: int) -> dict:
        place, question = asked[number]
        given = retained[place]
        pictures = [_decoded(given["images"], i, f"retained row {place}, image") for i in range(len(given["images"]))]
        if isinstance(question, int):
            given = {"prompt": conversation(questions[question])["prompt"], "images": pictures}
            given = to_conversation(given, unanswered=True)  # It puts the pictures where they belong.
        return {**given, "images": pictures}

    def ask(cache) -> dict[int, list[tuple[list[dict], str]]]:
        identity = "" if cache is None else _identity(model, processor, questions, asked, max_new_tokens)
        said: dict[int, list[tuple[list[dict], str]]] = {}
        places = [place for place, _ in asked]
        answered = _answered(
            model, processor, places, row, identity,
            max_new_tokens=max_new_tokens, batch_size=batch_size, cache=cache, progress=progress,
        )  # fmt: skip
        for number, one, answer in answered:
            if answer and not (one["images"] and mentions(answer, names)):
                said.setdefault(places[number], []).append((one["prompt"], answer))
        return said

    def take_up(cache) -> dict[int, list[tuple[list[dict], str]]]:
        if cache is not None and not resume:
            Path(cache).unlink(missing_ok=True)
        try:
            return ask(cache)
        except OtherAnswers:
            logger.warning(
                "The answers in %s come from another model, or answer something else, so they are made again.", cache
            )
            os.remove(cache)
            return ask(cache)

    filled = retained.with_answers(processes.divide([cache], take_up)[0])
    if len(filled) == 0:
        raise ValueError(
            f"the model's answers to all {len(retained)} retained rows are empty or name what is to be forgotten, so "
            "nothing is left to keep; give rows about other things."
        )
    done(f"asked the model about {len(retained.unanswered):,} retained rows without an answer")
    return filled


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


def _answered(
    model,
    processor,
    places: Sequence,
    row: Callable[[int], dict],
    identity: str,
    *,
    max_new_tokens: int,
    batch_size: int,
    cache: str | os.PathLike | None,
    progress: bool,
) -> Iterator[tuple[int, dict, str]]:
    """Asks the deployed model, and goes on from the cache: yields the number of each question, its row and the answer.

    Args:
        model, processor, max_new_tokens, batch_size, cache, progress: See [`retained_answers`].
        places (`list[int or None]`): Where each question's picture comes from, for errors.
        row (`Callable`): Makes the conversation of a number; pictures are decoded then, a batch at a time.
        identity (`str`): Of what the answers depend on.

    Raises:
        OtherAnswers: If the cache belongs to something else.
    """
    kept = _read_cache(cache, identity)
    answers = [answer for _, answer in kept]
    with bar("Asking the model", len(places), initial=len(answers), show=progress, leave=True) as shown:
        for start in range(0, len(places), batch_size):
            part = [row(number) for number in range(start, min(start + batch_size, len(places)))]
            keys = [_picture_key(one) for one in part] if cache is not None else []
            for number, (key, (noted, _)) in enumerate(zip(keys, kept[start : start + batch_size]), start):
                if key != noted:
                    raise OtherAnswers(
                        f"{cache} holds, in answer {number}, one about another picture than image {places[number]} is now; "
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
            yield from zip(range(start, start + len(part)), part, answers[start : start + batch_size], strict=True)


def _decoded(images, place: int, what: str = "image"):
    try:
        return load_rgb(images[place])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} {place}: {error}") from error


def _identity(model, processor, questions, asked, max_new_tokens: int) -> str:
    """Of everything that the answers depend on, but for the pictures, which stand beside their answers."""
    images = getattr(processor, "image_processor", None)
    content = [
        base_checksum(model, our_adapter(model) or "default"), [repr(question) for question in questions], asked,
        max_new_tokens, processor.chat_template, None if images is None else images.to_json_string(), _LINES,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _picture_key(row: dict) -> str | None:
    return " ".join(map(pixel_hash, row["images"])) or None


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
        raise ValueError(f"{path} is not a cache of answers ({error}); remove it.") from error
    if not isinstance(header, dict) or header.get("identity") != identity:
        raise OtherAnswers(
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
