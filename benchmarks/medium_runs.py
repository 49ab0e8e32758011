"""What runs on the medium model have in common: the model, what is asked of a concept before and after, and its anchors."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path


EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "medium_model"
# To save time on two cores; everything else is the library's.
ANCHORS, REFINE_STEPS, BATCH_SIZE = 12, 60, 6
# Trainer arguments of the same kind.
QUICK = {"fit_batch_size": 48, "per_device_train_batch_size": BATCH_SIZE}


class MediumConcept:
    """
    A concept and the model that knows it: asked once, whatever is erased from copies of the model afterwards.

    Args:
        concept (`str`): Its name.
        work (`pathlib.Path`): The folder that `examples/medium_model/join.py` wrote.
        known (`list`): Questions in words with their answers, see `known_questions`.
    """

    def __init__(self, concept: str, work: Path, known: list[tuple[str, str]]):
        sys.path.insert(0, str(EXAMPLE))
        from space_peft.demo import load_demo_images
        from space_peft.demo.probes import demo_split

        self.concept, self.work, self.known = concept, work, known
        self.images = images = load_demo_images()
        self.public, _ = demo_split(images, concept)
        self.model, self.processor = load(work)
        self.probes = probes_of(concept, images)
        self._before = None
        self._text: dict | None = None
        self._raw, self._anchors = None, {}

    @property
    def before(self):
        """What it says before; asked the first time, so that who measures seconds has loaded the model by then."""
        from space_peft.evaluation import evaluate_probes

        if self._before is None:
            with half_precision():
                self._before = evaluate_probes(self.model, self.processor, self.probes, progress=False, batch_size=48)
        return self._before

    @property
    def named(self) -> list[float]:
        """Shares of its pictures on which it is named before: in short answers, in sentences."""
        return [self.before.scores[key]["value"] for key in ("forget", "free_form")]

    @property
    def is_known(self) -> bool:
        """Whether the model names it on nine of ten pictures, in short answers and in sentences."""
        return min(self.named) >= 0.9

    @property
    def text(self) -> dict:
        """What it knows in words, before."""
        if self._text is None:
            with half_precision():
                self._text = measure_text(self.model, self.processor, self.concept, self.known, None)
        return self._text

    def anchors(self, seed: int, steps: int):
        """Its refined anchors.

        Args:
            seed (`int`): Of the refinement.
            steps (`int`): Of the refinement.
        """
        from tasks import QUESTIONS

        from space_peft import refine_anchors, select_anchors

        options = {"model": self.model, "processor": self.processor, "progress": False}
        if (seed, steps) not in self._anchors:
            with half_precision():
                if self._raw is None:
                    self._raw = select_anchors(self.concept, self.public, k=ANCHORS, cache_dir=False, **options)
                self._anchors[seed, steps] = refine_anchors(
                    self._raw, questions=QUESTIONS, seed=seed, steps=steps, **options
                )
        return self._anchors[seed, steps]

    def asked_again(self, merged) -> tuple:
        """What a model without the concept says.

        Args:
            merged (`PreTrainedModel`): With the adapter in its weights, in which it answers faster.

        Returns:
            `tuple`: `ProbeResults`, and scores of what it knows in words (`text`, `text_target`, `perplexity_ratio`).
        """
        from space_peft.evaluation import evaluate_probes

        options = {"baseline": self.before, "progress": False, "batch_size": 48}
        with half_precision():
            after = evaluate_probes(merged, self.processor, self.probes, **options)
            text = measure_text(merged, self.processor, self.concept, self.known, self.text)
        scores = {key: text[key] for key in ("text", "text_target")}
        return after, {**scores, "perplexity_ratio": text["perplexity"] / self.text["perplexity"]}


def half_precision():
    """bfloat16 for products, where that is the faster one."""
    import torch

    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast_bf16())


def fast_bf16() -> bool:
    """Whether this processor multiplies bfloat16 matrices in hardware; where not, float32 is faster."""
    import torch

    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def load(work: Path):
    """The medium model in float32, and its processor."""
    import efficientnet  # noqa: F401  (registers the tower)
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(work / "model", dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(work / "model")


def probes_of(concept: str, images):
    """The library's standard probes: all pictures of the target, all siblings, and a part of the others."""
    from tasks import QUESTIONS

    from space_peft.demo import UNSEEN_STYLE
    from space_peft.demo.probes import demo_split
    from space_peft.evaluation import build_probes

    _, reserved = demo_split(images, concept)
    rows = [{"question": QUESTIONS.naming[0], "answer": row["name"], **row} for row in reserved]
    kinds = dict(zip(images["name"], images["kind"], strict=True))
    others = [row for row in rows if row["name"] != concept]
    trained = [row for row in others if row["style"] != UNSEEN_STYLE]
    siblings = [row for row in others if row["kind"] == kinds[concept]]
    held_out = QUESTIONS.open_held_out
    opened = [row for row in siblings if row["style"] != UNSEEN_STYLE] + trained[::6]
    opened = [{**row, "question": held_out[i % len(held_out)]} for i, row in enumerate(opened)]
    return build_probes(
        concept,
        questions=QUESTIONS,
        target_images=[row["image"] for row in rows if row["name"] == concept],
        retain_rows=trained[::3],
        retain_unseen_rows=[row for row in others if row["style"] == UNSEEN_STYLE][::3],
        retain_open_rows=opened,
        sibling_rows=siblings,
        same_kind=[kinds[concept], *(name for name, kind in kinds.items() if kind == kinds[concept])],
    )


def measure_text(model, processor, concept: str, known: list[tuple[str, str]], before: dict | None) -> dict:
    """Knowledge in words: of what was answered right before, the share still right; the passage; the target's words."""
    from tasks import PASSAGE, TARGET_TEXT_HELD_OUT, is_right
    from text_knowledge import KNOWLEDGE_TOKENS, perplexity, token_agreement

    from space_peft.modeling.prompts import generate_answers

    said = generate_answers(model, processor, [question for question, _ in known], max_new_tokens=KNOWLEDGE_TOKENS)
    right = [
        any(is_right(answer, form) for form in expected.split("|"))
        for answer, (_, expected) in zip(said, known, strict=True)
    ]
    target = [question.format(name=concept) for question in TARGET_TEXT_HELD_OUT]
    answers = generate_answers(model, processor, target, max_new_tokens=24) if before is None else before["target"]
    kept = right if before is None else [now for was, now in zip(before["right"], right, strict=True) if was]
    return {
        "right": right,
        "text": statistics.fmean(kept),
        "text_target": token_agreement(model, processor, target, answers),
        "perplexity": perplexity(model, processor, PASSAGE),
        "target": answers,
    }


def model_digest(work: Path) -> str:
    """Which model is in the folder: joined again, it is another one."""
    from space_peft.records.digests import file_digest

    return file_digest(work / "model" / "model.safetensors")[:12]


def known_questions(work: Path, most: int) -> tuple[list[tuple[str, str]], list[str]]:
    """Questions without a picture that the medium model answers right before any erasure; asked once, kept beside it.

    Returns:
        `tuple`: At most that many questions, each with its answer, to be tested; and the others, which may be retained.
    """
    sys.path.insert(0, str(EXAMPLE))
    from knowledge import KNOWLEDGE
    from text_knowledge import KNOWLEDGE_TOKENS, knowledge_right

    from space_peft.modeling.prompts import generate_answers

    path = work / f"right_before_{model_digest(work)}.json"
    if not path.exists():
        model, processor = load(work)
        questions = [question for question, _ in KNOWLEDGE]
        with half_precision():
            said = generate_answers(model, processor, questions, max_new_tokens=KNOWLEDGE_TOKENS, desc="what it knows")
        path.write_text(json.dumps([q for q, right in zip(questions, knowledge_right(said), strict=True) if right]))
    right = set(json.loads(path.read_text()))
    known = [pair for pair in KNOWLEDGE if pair[0] in right]
    if len(known) < most:
        raise SystemExit(f"the model in {work} answers {len(known)} questions right; expected at least {most}.")
    tested = known[:: max(1, len(known) // most)][:most]
    return tested, [question for question, _ in KNOWLEDGE if question not in dict(tested)]
