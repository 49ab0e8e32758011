"""What the anchors were refined with is asked by trainer and probes as well."""

import dataclasses
import json

import pytest
from datasets import load_from_disk

from space_peft import SpaceConfig, SpaceLoraConfig, SpaceTrainer, anchor_info
from space_peft.anchors.info import anchor_questions, set_anchor_info
from space_peft.data.questions import DEFAULT_QUESTIONS, Dialogue, QuestionSet
from space_peft.demo import DEMO_QUESTIONS, load_demo_model
from space_peft.evaluation import build_probes


OWN = QuestionSet(
    naming=("what is here?",), naming_held_out=("what is it called?",), confirm=("is this {name}?",), confirm_held_out=(),
    yes="yes.", open=("describe it.", Dialogue(("hello.", "yes?", "what is this?"), system="be kind.")),
    open_held_out=(), about=("what is {name}?",),
)  # fmt: skip


def asked(anchors, questions):
    """Anchors whose provenance holds questions, of whatever kind."""
    info = anchor_info(anchors)
    return set_anchor_info(anchors, {**info, "refinement": {**info.get("refinement", {}), "questions": questions}})


def trained(anchors, retain, folder, **options):
    model, processor = load_demo_model()
    return SpaceTrainer(
        model, SpaceConfig(str(folder), report_to="none", use_cpu=True), anchors=anchors, retain_dataset=retain[:8],
        processing_class=processor, peft_config=SpaceLoraConfig(r=2), **options,
    )  # fmt: skip


@pytest.mark.parametrize("questions", [OWN, DEMO_QUESTIONS, DEFAULT_QUESTIONS])
def test_questions_survive_json(questions):
    assert QuestionSet.from_dict(json.loads(json.dumps(questions.to_dict()))) == questions


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([], "a mapping of the fields of QuestionSet, got a list"),
        ({"naming": ["?"], "hidden": []}, "they set 'hidden'"),
        ({"naming": ["?"]}, "missing"),
        ({**OWN.to_dict(), "naming": "?"}, "single one"),
        ({**OWN.to_dict(), "yes": ["yes"]}, "they set 'yes'"),
        ({**OWN.to_dict(), "open": [{"turns": "what"}]}, "single string"),
        ({**OWN.to_dict(), "open": [{"turns": ["what"], "system": 3}]}, "`system` must be a text"),
        ({**OWN.to_dict(), "naming_held_out": ["what is here?"]}, "held-out questions must not"),
    ],
)
def test_what_is_no_set_of_questions_is_refused(values, said):
    with pytest.raises(ValueError, match=said):
        QuestionSet.from_dict(values)


def test_refined_anchors_keep_them_in_files_too(demo_erasure_data, tmp_path):
    anchors, _ = demo_erasure_data
    assert anchor_questions(anchors) == DEMO_QUESTIONS != DEFAULT_QUESTIONS
    anchors.to_parquet(tmp_path / "anchors.parquet")
    assert anchor_questions(type(anchors).from_parquet(str(tmp_path / "anchors.parquet"))) == DEMO_QUESTIONS
    anchors.select(range(2)).save_to_disk(tmp_path / "anchors")
    assert anchor_questions(load_from_disk(tmp_path / "anchors")) == DEMO_QUESTIONS


def test_the_trainer_asks_what_the_anchors_were_refined_with(demo_erasure_data, tmp_path):
    anchors, retain = demo_erasure_data
    trainer = trained(asked(anchors, OWN.to_dict()), retain, tmp_path)
    assert trainer.questions == OWN
    rows = trainer.forget.given
    assert {row["prompt"][-1]["content"][-1]["text"] for row in rows} == {"what is here?", "is this fox?"}
    assert (
        trained(asked(anchors, OWN.to_dict()), retain, tmp_path, questions=DEMO_QUESTIONS).questions == DEMO_QUESTIONS
    )


def test_older_anchors_are_asked_the_librarys_questions(demo_erasure_data, tmp_path):
    anchors, retain = demo_erasure_data
    assert trained(asked(anchors, ["what is here?"]), retain, tmp_path).questions == DEFAULT_QUESTIONS


def test_questions_that_cannot_be_used_are_said_unless_others_are_passed(demo_erasure_data, tmp_path):
    anchors, retain = demo_erasure_data
    broken = asked(anchors, {"naming": []})
    with pytest.raises(ValueError, match="the questions in the anchors' provenance cannot be used: .*Pass `questions`"):
        trained(broken, retain, tmp_path)
    assert trained(broken, retain, tmp_path, questions=OWN).questions == OWN


def test_probes_ask_them_too(demo_erasure_data, demo_images):
    anchors = asked(demo_erasure_data[0], OWN.to_dict())
    images = demo_images["image"][:1]

    def naming(**options):
        return build_probes("fox", target_images=images, **options)[0].rows[0]["question"]

    assert naming(anchors=anchors) == "what is here?"
    assert naming(anchors=anchors, questions=DEMO_QUESTIONS) == DEMO_QUESTIONS.naming[0]
    assert naming() == DEFAULT_QUESTIONS.naming[0]
    held_out = dataclasses.replace(OWN, naming_held_out=("what could it be?",))
    probe = build_probes("fox", anchors=asked(anchors, held_out.to_dict()), target_images=images)[1]
    assert [row["question"] for row in probe.rows] == ["what could it be?"]
