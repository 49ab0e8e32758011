"""A string where a list of names is expected is an error at every public entry, not a list of letters."""

import json

import pytest
import torch
from datasets import Dataset
from PIL import Image

from hub_cards.redaction import find_names, redact_values, without_name
from hub_cards.staging import concept_names
from hub_cards.verify import verify_erasure
from space_peft import refine_anchors, select_anchors
from space_peft.anchors import select_random_anchors, set_anchor_info
from space_peft.anchors.refine import name_probabilities
from space_peft.anchors.select import concept_embedding
from space_peft.attacks import audit_concept, confirmation_attack, linear_probes, perturbation_attack, relearning_curve
from space_peft.attacks.report import AttackReport
from space_peft.canary.check import Canary, make_canary
from space_peft.data.names import check_aliases, check_concept, check_name_list
from space_peft.data.questions import DEFAULT_QUESTIONS
from space_peft.evaluation import ErasureReport, Probe, build_probes
from space_peft.evaluation.metrics import AnswerFluency, NamingRate
from space_peft.records.card_data import ErasureCardData
from space_peft.retained.self_distillation import retained_answers
from space_peft.trainers import CVFTrainer, GradDiffTrainer, MMUnlearnerTrainer, NPOTrainer, SpaceTrainer
from space_peft.trainers.concept_projection import project_concept


PICTURES = [Image.new("RGB", (4, 4))] * 2
BAD = ["vixen", b"vixen", [3], ["vixen", " "], 3, {"vixen": 1}]


@pytest.mark.parametrize(
    "aliases, says",
    [
        ("vixen", r"write \['vixen'\]"),
        (b"vixen", r"sequence of names.*write \['vixen'\]"),
        ([3], "alias 0: the name must be a string, got int"),
        ([b"vixen"], "alias 0: the name must be a string, got bytes"),
        ({"vixen": 1}, "got a dict"),
        (7, "got a int"),
    ],
)
def test_what_is_no_list_of_names_is_refused(aliases, says):
    with pytest.raises(TypeError, match=says):
        check_aliases(aliases)


def test_aliases_are_names():
    assert check_aliases(None) == ()
    assert check_aliases([" red  fox "]) == ("red fox",)
    assert check_aliases(["Vixen", "vixen", "FOX", "tod"], concept="fox") == ("Vixen", "tod")
    assert check_aliases({"c", "a", "b"}) == check_aliases(iter("abc")) == ("a", "b", "c")
    for blank in (" ", "\u200b", ""):
        with pytest.raises(ValueError, match="alias 1: .*empty"):
            check_aliases(["vixen", blank])
    with pytest.raises(ValueError, match="`names` is empty"):
        check_name_list([])


class _Encoder:
    name, reads, fingerprint, templates = "none", "image", "none", ("{}",)

    def embed_texts(self, texts):
        raise AssertionError(f"names passed the gate: {texts}")


def _pool():
    return Dataset.from_dict({"image": PICTURES, "caption": ["a", "b"]})


def _canary(names):
    return Canary((), None).publishable(names=names)


ALIASES = {
    "build_probes": lambda aliases: build_probes("fox", aliases=aliases, questions=DEFAULT_QUESTIONS),
    "build_probes valid": lambda names: build_probes("fox", valid_answers=names, questions=DEFAULT_QUESTIONS),
    "build_probes kind": lambda names: build_probes("fox", same_kind=names, questions=DEFAULT_QUESTIONS),
    "Probe": lambda names: Probe("forget", [], "contains_name", names=names),
    "NamingRate": lambda aliases: NamingRate().compute(predictions=["a"], references=["fox"], aliases=aliases),
    "NamingRate others": lambda others: NamingRate().compute(predictions=["a"], references=["fox"], others=others),
    "select_anchors": lambda aliases: select_anchors("fox", _pool(), encoder=_Encoder(), aliases=aliases),
    "select_random_anchors": lambda aliases: select_random_anchors("fox", _pool(), aliases=aliases),
    "concept_embedding": lambda aliases: concept_embedding(_Encoder(), "fox", aliases=aliases),
    "project_concept": lambda aliases: project_concept(torch.nn.Linear(1, 1), None, "fox", aliases=aliases),
    "make_canary": lambda names: make_canary(None, None, questions=DEFAULT_QUESTIONS, names=names),
    "publishable": _canary,
    "retained_answers": lambda names: retained_answers(None, None, names=names),
    "perturbation": lambda aliases: perturbation_attack(None, None, PICTURES, "fox", aliases=aliases),
    "perturbation others": lambda names: perturbation_attack(None, None, PICTURES, "fox", other_names=names),
    "relearning": lambda aliases: relearning_curve(None, None, PICTURES, None, "fox", other_names=["x"], aliases=aliases),
    "relearning others": lambda names: relearning_curve(None, None, PICTURES, None, "fox", other_names=names),
    "confirmation": lambda names: confirmation_attack(None, None, PICTURES, "fox", absent_names=names),
    "without_name": lambda names: without_name(ErasureCardData(), names, b""),
    "redact_values": lambda names: redact_values({}, names),
    "find_names": lambda names: find_names(".", names),
}  # fmt: skip


@pytest.mark.parametrize("aliases", BAD, ids=str)
@pytest.mark.parametrize("entry", ALIASES)
def test_every_entry_has_the_gate(entry, aliases):
    with pytest.raises((TypeError, ValueError), match="sequence of names|must be a string|is empty|list of texts"):
        ALIASES[entry](aliases)


CONCEPTS = {
    "check_concept": check_concept,
    "build_probes": lambda concept: build_probes(concept, questions=DEFAULT_QUESTIONS),
    "NamingRate": lambda concept: NamingRate().compute(predictions=["a"], references=[concept]),
    "select_random_anchors": lambda concept: select_random_anchors(concept, _pool()),
    "project_concept": lambda concept: project_concept(torch.nn.Linear(1, 1), None, concept),
    "refine_anchors": lambda concept: refine_anchors(
        set_anchor_info(Dataset.from_dict({"image": PICTURES, "score": [0.0, 0.0]}), {"concept": "fox"}),
        model=None, processor=None, concept=concept,
    ),
    "name_probabilities": lambda concept: name_probabilities(None, None, PICTURES, "what?", [concept]),
    "audit_concept": lambda concept: audit_concept(None, None, concept),
    "linear_probes": lambda concept: linear_probes(None, None, PICTURES, PICTURES, concept),
    "verify": lambda concept: verify_erasure(".", concept=concept),
}  # fmt: skip


@pytest.mark.parametrize("concept", [b"fox", 3, " ", ""], ids=str)
@pytest.mark.parametrize("entry", CONCEPTS)
def test_a_concept_is_a_name(entry, concept):
    with pytest.raises(
        (TypeError, ValueError), match="must be a(?: |.*)string|must be strings|is empty|must be the erased name"
    ):
        CONCEPTS[entry](concept)


def test_records_hold_texts():
    # Any text: they are read from others' files as well, and shown.
    for bad in ("vixen", b"vixen", [3], 3):
        with pytest.raises(ValueError, match="list of texts"):
            ErasureCardData(aliases=bad)
    for bad in (b"fox", 3, None):
        with pytest.raises(ValueError, match="must be the erased name"):
            ErasureReport(bad, {}, {})
        with pytest.raises(ValueError, match="must be the erased name"):
            AttackReport(bad, {"audit": {}})


def test_names_in_files_pass_the_gate(tmp_path):
    (tmp_path / "space_anchors.json").write_text(json.dumps({"concept": "fox", "aliases": "vixen"}))
    with pytest.raises(ValueError, match="space_anchors.json.*write"):
        concept_names(tmp_path, ErasureCardData())


def test_valid_answers_are_a_list():
    with pytest.raises(TypeError, match="`valid_answers` must be a list"):
        AnswerFluency().compute(predictions=["fox"], valid_answers="fox")


FOXES = [{"image": picture, "name": "fox"} for picture in PICTURES]


@pytest.mark.parametrize("aliases", ["vixen", b"vixen"])
@pytest.mark.parametrize("trainer", [GradDiffTrainer, NPOTrainer, MMUnlearnerTrainer, CVFTrainer])
def test_trainers_refuse_a_string(trainer, aliases):
    with pytest.raises(TypeError, match="vixen"):
        trainer(model=None, forget_dataset=FOXES, concept="fox", aliases=aliases)


@pytest.mark.parametrize("given", ["argument", "provenance"])
def test_space_trainer_refuses_a_string(given):
    """It takes the aliases from the anchors too, where an edited provenance may hold a string."""
    anchors = Dataset.from_list([{**FOXES[0], "score": 1.0}])
    anchors = set_anchor_info(anchors, {"concept": "fox", "aliases": "vixen" if given == "provenance" else []})
    with pytest.raises(TypeError, match=r"write \['vixen'\]"):
        SpaceTrainer(model=None, anchors=anchors, aliases="vixen" if given == "argument" else None)
