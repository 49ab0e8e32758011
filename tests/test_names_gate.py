"""A string where a list of names is expected is an error, not a list of letters."""

import pytest
from datasets import Dataset
from PIL import Image

from space_peft.anchors import set_anchor_info
from space_peft.evaluation import build_probes
from space_peft.names import check_aliases
from space_peft.questions import DEFAULT_QUESTIONS
from space_peft.trainers import CVFTrainer, GradDiffTrainer, MMUnlearnerTrainer, NPOTrainer, SpaceTrainer


@pytest.mark.parametrize("aliases, says", [("vixen", r"write \['vixen'\]"), (b"vixen", "sequence"), ([3], "alias 0")])
def test_what_is_no_list_of_names_is_refused(aliases, says):
    with pytest.raises(TypeError, match=says):
        check_aliases(aliases)


def test_aliases_are_names():
    assert check_aliases(None) == ()
    assert check_aliases([" red  fox "]) == ("red fox",)
    with pytest.raises(ValueError, match="alias 1: .*empty"):
        check_aliases(["vixen", " "])


def test_probes_refuse_a_string():
    with pytest.raises(TypeError, match="vixen"):
        build_probes(
            "fox",
            aliases="vixen",
            questions=DEFAULT_QUESTIONS,
            target_images=[],
            retain_rows=[],
            retain_unseen_rows=[],
            sibling_rows=[],
            text_rows=[],
        )


PICTURES = [{"image": Image.new("RGB", (8, 8), "orange"), "name": "fox"}]


@pytest.mark.parametrize("aliases", ["vixen", b"vixen"])
@pytest.mark.parametrize("trainer", [GradDiffTrainer, NPOTrainer, MMUnlearnerTrainer, CVFTrainer])
def test_trainers_refuse_a_string(trainer, aliases):
    with pytest.raises(TypeError, match="vixen"):
        trainer(model=None, forget_dataset=PICTURES, concept="fox", aliases=aliases)


@pytest.mark.parametrize("given", ["argument", "provenance"])
def test_space_trainer_refuses_a_string(given):
    """It takes the aliases from the anchors too, where an edited provenance may hold a string."""
    anchors = Dataset.from_list([{**PICTURES[0], "score": 1.0}])
    anchors = set_anchor_info(anchors, {"concept": "fox", "aliases": "vixen" if given == "provenance" else []})
    with pytest.raises(TypeError, match=r"write \['vixen'\]"):
        SpaceTrainer(model=None, anchors=anchors, aliases="vixen" if given == "argument" else None)
