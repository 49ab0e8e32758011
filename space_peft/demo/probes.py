"""What the embedded model is asked before and after an erasure, and what is retained meanwhile: disjoint by design.

The target's images are probes only, all of them. Of every other concept, one *design* in three is reserved for probing;
the two fluent styles draw the same shapes, so they count as one design and are reserved together. The images in the
unseen style are all probes. What is left is public: the pool of anchors and the retained rows are drawn from it.
"""

from __future__ import annotations

import random

from datasets import Dataset

from ..choices import nearest
from ..evaluation.probes import Probe, build_probes
from ..modeling.prompts import conversation
from . import data
from .questions import DEMO_QUESTIONS, KIND_QUESTIONS, NO, TEXT_CONFIRM_QUESTIONS, TEXT_KIND_QUESTIONS, YES


# How often the text-only rows about the target stand in the retained rows.
TARGET_TEXT_REPEATS = 20


def _design(style: str) -> str:
    """Styles that share their shapes share a design."""
    return style.removesuffix("-flat")


def _check_name(concept: str, names) -> None:
    if concept not in names:
        near = nearest(str(concept), names, most=5, cutoff=0.4)
        hint = f"the nearest names: {', '.join(near)}" if near else f"one of {', '.join(sorted(names)[:8])}, ..."
        raise ValueError(f"the images hold no concept {concept!r}; expected {hint}.")


def demo_split(images: Dataset, concept: str | None = None) -> tuple[Dataset, Dataset]:
    """Splits the images into public ones and those reserved for probing, without chance.

    With concepts and each one's trained designs in alphabetical order, design j of concept i is reserved when i + j is
    divisible by the number of its designs (three at most): between a quarter and a half of a concept's images in
    trained styles, a third on average. A concept drawn in a single design would have nothing public.

    Args:
        images (`datasets.Dataset`): As returned by `load_demo_images`.
        concept (`str`, *optional*): The target; none of its images is public.

    Returns:
        `tuple[datasets.Dataset, datasets.Dataset]`: Public rows and probe rows, in the order of `images`.
    """
    names, styles = images["name"], images["style"]
    order = {name: i for i, name in enumerate(sorted(set(names)))}
    if concept is not None:
        _check_name(concept, order)
    designs: dict[str, set] = {name: set() for name in order}
    for name, style in zip(names, styles, strict=True):
        if style != data.UNSEEN_STYLE:
            designs[name].add(_design(style))
    place = {name: {design: j for j, design in enumerate(sorted(own))} for name, own in designs.items()}
    public: list[int] = []
    reserved: list[int] = []
    for row, (name, style) in enumerate(zip(names, styles, strict=True)):
        held = style == data.UNSEEN_STYLE or name == concept
        if not held:
            held = (order[name] + place[name][_design(style)]) % min(3, len(place[name])) == 0
        (reserved if held else public).append(row)
    return images.select(public), images.select(reserved)


def _kinds(images: Dataset) -> dict[str, str]:
    return dict(zip(images["name"], images["kind"], strict=True))


def _other(rng: random.Random, name: str, kinds: dict[str, str], avoid: str, sibling: bool) -> str:
    """Name of another concept to deny: a sibling (same kind) when asked for and there is one."""
    others = sorted(other for other in kinds if other not in (name, avoid))
    siblings = [other for other in others if kinds[other] == kinds[name]]
    return rng.choice(siblings if sibling and siblings else others)


def _image_rows(rows: Dataset, concept: str, kinds: dict[str, str], rng: random.Random) -> list[dict]:
    """Naming on every image; in turn a kind question on one image, a yes/no pair on the next."""
    asked = []
    confirm = DEMO_QUESTIONS.confirm[0]
    for i, row in enumerate(rows):
        image, name = row["image"], row["name"]
        questions = [(DEMO_QUESTIONS.naming[0], name)]
        if i % 2 == 0:
            questions.append((KIND_QUESTIONS[i // 2 % len(KIND_QUESTIONS)], row["kind"]))
        else:
            other = _other(rng, name, kinds, concept, sibling=i % 4 == 1)
            questions += [(confirm.format(name=name), YES), (confirm.format(name=other), NO)]
        if row["kind"] == kinds[concept]:
            # What an over-eager erasure, or one that answers "yes" to the name everywhere, would break first.
            questions.append((confirm.format(name=concept), NO))
        asked += [{"question": q, "answer": a, "image": image, "name": name, "kind": row["kind"]} for q, a in questions]
    return asked


def _text_pairs(name: str, kinds: dict[str, str], rng: random.Random, *, every_form: bool) -> list[tuple[str, str]]:
    """Text-only questions about a concept: its kind, and as many confirmations to affirm as to deny."""
    wrong = rng.choice(sorted(set(kinds.values()) - {kinds[name]}) or [kinds[name]])
    forms = TEXT_CONFIRM_QUESTIONS if every_form else (rng.choice(TEXT_CONFIRM_QUESTIONS),)
    asks = TEXT_KIND_QUESTIONS if every_form else (rng.choice(TEXT_KIND_QUESTIONS),)
    pairs = [(question.format(name=name), kinds[name]) for question in asks]
    for form in forms:
        pairs.append((form.format(name=name, kind=kinds[name]), YES))
        if wrong != kinds[name]:
            pairs.append((form.format(name=name, kind=wrong), NO))
    return pairs


def demo_probes(concept: str, images: Dataset, *, seed: int = 0) -> list[Probe]:
    """The standard probes (`build_probes`) for the embedded model.

    Every image of the target, in all styles, is asked the first naming question (`forget`) and all held-out ones
    (`generality`). Reserved images of the other concepts are asked for their name, every other one for its kind, the
    rest a yes/no pair; images of the target's kind also whether they show the target (no). Each in a trained style is also
    asked one held-out open prompt, in turn (`retain_sentences`). `siblings` are the rows
    about images of the target's kind, trained and unseen style together. Text-only: kind and yes/no, as many yes as no.

    Args:
        concept (`str`): The target's name.
        images (`datasets.Dataset`): As returned by `load_demo_images`.
        seed (`int`, defaults to 0): Of the negatives in yes/no questions. Keep it, to compare on the same probes.

    Returns:
        `list[Probe]`: One or more a key of `REPORT_KEYS`.

    Raises:
        ValueError: If the images hold no such concept; the message has the nearest names.
    """
    kinds = _kinds(images)
    _check_name(concept, kinds)
    _, reserved = demo_split(images, concept)
    styles, names = reserved["style"], reserved["name"]
    rng = random.Random(seed)
    trained = [i for i, name in enumerate(names) if name != concept and styles[i] != data.UNSEEN_STYLE]
    unseen = [i for i, name in enumerate(names) if name != concept and styles[i] == data.UNSEEN_STYLE]
    retain = _image_rows(reserved.select(trained), concept, kinds, rng)
    retain_unseen = _image_rows(reserved.select(unseen), concept, kinds, rng)

    opened = [
        {
            "question": DEMO_QUESTIONS.open_held_out[i % len(DEMO_QUESTIONS.open_held_out)],
            "answer": name,
            "image": image,
        }
        for i, (name, image) in enumerate(zip(names, reserved["image"], strict=True))
        if name != concept and styles[i] != data.UNSEEN_STYLE
    ]

    def text_rows(name: str, every_form: bool) -> list[dict]:
        pairs = _text_pairs(name, kinds, rng, every_form=every_form)
        return [{"question": question, "answer": answer, "image": None} for question, answer in pairs]

    return build_probes(
        concept,
        questions=DEMO_QUESTIONS,
        target_images=list(reserved.select([i for i, name in enumerate(names) if name == concept])["image"]),
        retain_rows=retain,
        retain_unseen_rows=retain_unseen,
        retain_open_rows=opened,
        sibling_rows=[row for row in retain + retain_unseen if row["kind"] == kinds[concept]],
        text_rows=[row for name in sorted(kinds) if name != concept for row in text_rows(name, every_form=False)],
        text_target_rows=text_rows(concept, every_form=True),
        # "bird" is a sensible answer about an image of a penguin that has no name any more.
        valid_answers=sorted({*kinds, *kinds.values()}),
        same_kind=[kinds[concept], *(name for name, kind in kinds.items() if kind == kinds[concept])],
    )


def demo_retain_rows(concept: str, public_images: Dataset, *, seed: int = 0) -> list[dict]:
    """Retained training rows in TRL's prompt-completion format, from public images without the target.

    A public image gives one naming, one kind and one yes/no pair of rows, the questions in turn and never a held-out
    one; image rows do not mention the target. Every concept, the target included, gives its text-only rows: what is
    known of it in words is to be kept, so the target's are repeated (`TARGET_TEXT_REPEATS`).

    Args:
        concept (`str`): The target's name.
        public_images (`datasets.Dataset`): Public rows of `demo_split`. Images of the target are left out if present.
        seed (`int`, defaults to 0): Of the negatives and of the order of the rows.

    Returns:
        `list[dict]`: `prompt`, `completion`, `images` (one PIL image, or none in a text-only row).

    Raises:
        ValueError: If no image is left, or the concept is unknown.
    """
    kinds = _kinds(data.load_demo_images().remove_columns("image"))
    _check_name(concept, kinds)
    kinds |= _kinds(public_images)
    rows = public_images.select([i for i, name in enumerate(public_images["name"]) if name != concept])
    if len(rows) == 0:
        raise ValueError(
            f"got {len(public_images)} public images, none of them without {concept!r}: nothing to retain."
        )
    rng = random.Random(seed)
    retained = []
    for i, row in enumerate(rows):
        name = row["name"]
        confirm = DEMO_QUESTIONS.confirm[i % len(DEMO_QUESTIONS.confirm)]
        other = _other(rng, name, kinds, concept, sibling=i % 2 == 0)
        for question, answer in (
            (DEMO_QUESTIONS.naming[i % len(DEMO_QUESTIONS.naming)], name),
            (KIND_QUESTIONS[i % len(KIND_QUESTIONS)], row["kind"]),
            (confirm.format(name=name), YES),
            (confirm.format(name=other), NO),
        ):
            retained.append(conversation(question, answer=answer, image=row["image"]))
    for name in sorted(kinds):
        pairs = _text_pairs(name, kinds, rng, every_form=True)
        # Denying the target in images pulls at what is said of it in words; seen once a pass, that would not hold.
        for question, answer in pairs * (TARGET_TEXT_REPEATS if name == concept else 1):
            retained.append(conversation(question, answer=answer))
    rng.shuffle(retained)
    return retained
