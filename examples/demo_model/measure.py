"""Every published figure of the embedded model, from its weights and `load_demo_images()` alone.

    python examples/demo_model/measure.py [FOLDER]

Prints what `figures.json` holds under "accuracy". An answer counts when greedy generation gives exactly it; a sentence
counts when the greedy answer holds the right name and no other ("open"), and with the right article ("open_article").
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path

import torch
from packing import Segment, SegmentMaker, answered_exactly, pack
from templates import OPEN_QUESTIONS, article_right, named_right
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor
from warm_start import image_features

from space_peft.data.questions import Question
from space_peft.demo import UNSEEN_STYLE, demo_model_path, load_demo_images
from space_peft.demo.questions import (
    DEMO_QUESTIONS,
    KIND_QUESTIONS,
    NO,
    TEXT_CONFIRM_QUESTIONS,
    TEXT_KIND_QUESTIONS,
    YES,
)
from space_peft.modeling.prompts import generate_answers


SEED = 0  # of the choice of wrong names and kinds
BATCH = 32
OPEN_PER_IMAGE = 1  # open questions each image is asked, in rotation: generating takes longer than checking
LONGEST_SENTENCE = 24


class Concepts:
    """Names, kinds and wrong names of the demo images.

    Args:
        names (`list[str]`): Name of every image.
        kinds (`list[str]`): Kind of every image.
    """

    def __init__(self, names: list[str], kinds: list[str]):
        self.kind = dict(sorted(zip(names, kinds, strict=True)))
        self.random = random.Random(SEED)

    def wrong_name(self, name: str, sibling: bool) -> str:
        kind = self.kind[name]
        return self.random.choice([n for n, k in self.kind.items() if n != name and (k == kind) == sibling])

    def wrong_kind(self, name: str) -> str:
        return self.random.choice(sorted(set(self.kind.values()) - {self.kind[name]}))


def image_questions(concepts: Concepts, name: str, row: int) -> list[tuple[str, str, str]]:
    """(group, question, answer) of everything asked about one image; every second wrong name is a sibling.

    Which wordings an erasure holds out is not the model's affair: the figures do not depend on that split.
    """
    asked = [(f"naming: {q}", q, name) for q in sorted(DEMO_QUESTIONS.naming + DEMO_QUESTIONS.naming_held_out)]
    asked += [(f"kind: {q}", q, concepts.kind[name]) for q in KIND_QUESTIONS]
    for i, q in enumerate(sorted(DEMO_QUESTIONS.confirm + DEMO_QUESTIONS.confirm_held_out)):
        sibling = (row + i) % 2 == 0
        wrong = concepts.wrong_name(name, sibling)
        asked.append((f"confirm yes: {q}", q.format(name=name), YES))
        asked.append((f"confirm no ({'sibling' if sibling else 'other'}): {q}", q.format(name=wrong), NO))
    return asked


def text_questions(concepts: Concepts) -> list[tuple[str, str, str]]:
    """(group, question, answer) of everything asked without an image."""
    asked = []
    for name, kind in concepts.kind.items():
        asked += [(f"text_kind: {q}", q.format(name=name), kind) for q in TEXT_KIND_QUESTIONS]
        for q in TEXT_CONFIRM_QUESTIONS:
            asked.append((f"text_confirm yes: {q}", q.format(name=name, kind=kind), YES))
            asked.append((f"text_confirm no: {q}", q.format(name=name, kind=concepts.wrong_kind(name)), NO))
    return asked


def open_answers(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, images, per_image: int = OPEN_PER_IMAGE
) -> list[tuple[Question, int, str]]:
    """Greedy answers to open questions.

    Args:
        model (`LlavaForConditionalGeneration`): The model, float32.
        processor (`LlavaProcessor`): Its processor.
        images (`datasets.Dataset`): As `load_demo_images` gives it.
        per_image (`int`): Questions each image is asked; with one image more, the next ones take their turn.

    Returns:
        `list[tuple[Question, int, str]]`: Question, row of the image, answer.
    """
    n = len(OPEN_QUESTIONS)
    asked = [(OPEN_QUESTIONS[(row * per_image + k) % n], row) for row in range(len(images)) for k in range(per_image)]
    asked.sort(key=lambda pair: (OPEN_QUESTIONS.index(pair[0]), pair[1]))  # prompts of one length need no padding
    pictures = list(images["image"])
    answers = generate_answers(
        model,
        processor,
        [question for question, _ in asked],
        images=[pictures[row] for _, row in asked],
        max_new_tokens=LONGEST_SENTENCE,
    )
    return [(question, row, answer) for (question, row), answer in zip(asked, answers, strict=True)]


def summarise(counts: dict[str, list[bool]]) -> dict[str, dict[str, float | int]]:
    """`{key: {"value", "n"}}` of lists of hits."""
    return {key: {"value": round(sum(hits) / len(hits), 4), "n": len(hits)} for key, hits in counts.items()}


@torch.no_grad()
def measure(model: LlavaForConditionalGeneration, processor: LlavaProcessor, images=None) -> dict:
    """Accuracy per question, per group of questions and per style.

    Args:
        model (`LlavaForConditionalGeneration`): The model, float32.
        processor (`LlavaProcessor`): Its processor.
        images (`datasets.Dataset`, *optional*): Defaults to `load_demo_images()`.

    Returns:
        `dict`: `{"summary", "per_question", "per_style"}`; leaves are `{"value", "n"}`.
    """
    images = load_demo_images() if images is None else images
    model.eval()
    maker = SegmentMaker(processor)
    concepts = Concepts(images["name"], images["kind"])
    styles, names = images["style"], images["name"]
    summary, per_question, per_style = (defaultdict(list) for _ in range(3))

    def count(group: str, side: str, style: str | None, hit: bool) -> None:
        head = group.split(":")[0]
        per_question[f"{side} | {group}"].append(hit)
        parts = (head, " ".join(head.split()[:2]), head.split()[0])
        for key in dict.fromkeys(parts):  # "confirm no (sibling)" counts for "confirm no" and "confirm" too
            summary[f"{side} | {key}"].append(hit)
        if style:
            per_style[f"{style} | {head.split()[0]}"].append(hit)

    for start in range(0, len(images), BATCH):
        part = range(start, min(start + BATCH, len(images)))
        pixels = processor.image_processor([images[i]["image"] for i in part], return_tensors="pt")["pixel_values"]
        asked = [image_questions(concepts, names[i], i) for i in part]
        segments: list[list[Segment]] = [[maker(q, a) for _, q, a in row] for row in asked]
        hits = answered_exactly(model, pack(segments, processor, image=True), image_features(model, pixels))
        for i, row, row_hits in zip(part, asked, hits, strict=True):
            side = "unseen style" if styles[i] == UNSEEN_STYLE else "trained styles"
            for (group, _, _), hit in zip(row, row_hits, strict=True):
                count(group, side, styles[i], hit)

    asked = text_questions(concepts)
    for start in range(0, len(asked), 32):
        part = asked[start : start + 32]
        (hits,) = answered_exactly(model, pack([[maker(q, a) for _, q, a in part]], processor, image=False))
        for (group, _, _), hit in zip(part, hits, strict=True):
            count(group, "text", None, hit)

    for question, row, answer in open_answers(model, processor, images):
        side = "unseen style" if styles[row] == UNSEEN_STYLE else "trained styles"
        group = "open" if question in DEMO_QUESTIONS.open else "open_held_out"
        named = named_right(answer, names[row])
        count(f"{group}: {question}", side, styles[row], named)
        count(f"{group}_article: {question}", side, None, named and article_right(answer, names[row]))
    return {
        "summary": summarise(summary),
        "per_question": summarise(per_question),
        "per_style": summarise(per_style),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=demo_model_path(), help="default: the embedded model")
    folder = parser.parse_args().folder
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    print(json.dumps(measure(model, processor), indent=2))


if __name__ == "__main__":
    main()
