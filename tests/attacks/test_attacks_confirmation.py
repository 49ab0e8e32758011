"""Yes/no confirmation beside what is not in the image."""

import statistics

import pytest
from rounding import PROBABILITY

from space_peft.anchors.refine import name_probabilities
from space_peft.attacks import confirmation_attack
from space_peft.attacks.models import merged_copy
from space_peft.data.questions import QuestionSet
from space_peft.demo import DEMO_QUESTIONS


def confirm(erasure, model=None, **options):
    options = {"absent_names": ["wolf", "guitar"], "questions": DEMO_QUESTIONS, **options}
    images = options.pop("images", erasure.target)
    return confirmation_attack(model or erasure.model, erasure.processor, images, "fox", **options)


def test_the_deployed_model_tells_what_is_there_from_what_is_not(erasure, unchanged):
    result = confirm(erasure)
    assert result.p_yes_before > 0.8 > 0.2 > result.p_yes_absent_before
    assert result.p_yes < 0.5 * result.p_yes_before, "erased"
    assert result.n == 4 * len(erasure.target) and len(result.questions) == 4
    content = result.to_dict()
    values = (result.p_yes, result.p_yes_absent, result.p_yes_before)
    assert (content["value"], content["control"], content["before"]) == values


def test_averages_are_over_images_and_questions(erasure):
    questions = ("is this a {name}?", "is there a {name} in the image?")
    asked = QuestionSet(("what is this?",), (), questions[:1], questions[1:], yes="yes", no="no")
    result = confirm(erasure, questions=asked)

    def mean(name, answer):
        return [
            p
            for question in result.questions
            for p in name_probabilities(
                erasure.model, erasure.processor, erasure.target, question.format(name=name), answer
            )
        ]

    yes, no = mean("fox", "yes"), mean("fox", "no")
    assert result.p_yes == pytest.approx(statistics.fmean(yes), abs=PROBABILITY)
    assert result.confirmed == statistics.fmean(a > b for a, b in zip(yes, no))
    absent = mean("wolf", "yes") + mean("guitar", "yes")
    assert result.p_yes_absent == pytest.approx(statistics.fmean(absent), abs=PROBABILITY)


@pytest.mark.slow
def test_a_model_without_adapter_has_no_before(erasure):
    result = confirm(erasure, merged_copy(erasure.model))
    assert result.p_yes_before is None and result.p_yes_absent_before is None
    assert result.p_yes == pytest.approx(confirm(erasure).p_yes, abs=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"absent_names": []}, "`absent_names` is empty"),
        ({"absent_names": ["fox"]}, "must not name the target"),
        ({"absent_names": ["reynard"], "aliases": ["reynard"]}, "must not name the target"),
        ({"absent_names": ["zyzzyva"]}, "does not know 'zyzzyva'"),
        ({"images": []}, "got 0 images"),
        ({"questions": QuestionSet(("what is this?",), (), (), ())}, "0 yes/no questions"),
    ],
)
def test_bad_input(erasure, options, message):
    with pytest.raises(ValueError, match=message):
        confirm(erasure, **options)
