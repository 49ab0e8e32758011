"""Who counts: known by the picture, and not by guessing."""

import pytest

from space_peft.suites import Protocol, Subject, Suite, SuiteQuestion, subject_eligibility


@pytest.fixture(scope="module")
def demo():
    from space_peft.demo import load_demo_model

    return load_demo_model()


def suite_of(demo_images, names, words=()):
    # The embedded model knows names, not letters: they are the labels.
    options = ("fox", "owl")
    subjects = [
        Subject(
            name,
            (SuiteQuestion("what is this?", name, "classification", "image+text", options=options),),
            images=[row["image"] for row in demo_images if row["name"] == name][:1],
        )
        for name in names
    ]
    subjects += [Subject(name, (SuiteQuestion("who?", "x", "generation", "text"),)) for name in words]
    # A prompt must hold the options; the model was never shown any, and is asked as it knows it.
    protocol = Protocol(prompts={"classification": "{question} {options}"}, labels=options, choose="probability")
    return Suite("demo", {"forget": subjects}, protocol)


def test_a_concept_counts_if_it_is_known_by_its_picture(demo, demo_images):
    suite = suite_of(demo_images, ("fox", "owl"), words=("nobody",))
    found = subject_eligibility(*demo, suite, "forget", progress=False)
    assert found["nobody"] is None
    shares = {name: found[name].shares for name in ("fox", "owl")}
    # Shown the other's picture, the model says the other's name.
    assert [shares[name]["as asked"] for name in shares] == [1.0, 1.0]
    assert [shares[name]["other image"] for name in shares] == [0.0, 0.0]
    for condition in ("no image", "options only"):
        # Without a picture it can only guess: the same for both, which is right for one of them.
        assert sum(shares[name][condition] for name in shares) == 1.0
    for name in shares:
        guessed = max(shares[name]["no image"], shares[name]["options only"])
        assert found[name].eligible == (guessed == 0.0) and found[name].questions == 1
    eligible = [name for name, one in found.items() if one and one.eligible]
    # One guess is right at most, so that one of the two at least is known by its picture.
    assert [subject.id for subject in suite.only(eligible, "forget").split("forget")] == eligible != []


def test_what_cannot_be_told_is_refused(demo, demo_images):
    with pytest.raises(ValueError, match="only one subject has a picture"):
        subject_eligibility(*demo, suite_of(demo_images, ("fox",)), "forget", progress=False)
    words = Suite("words", {"forget": [Subject("x", (SuiteQuestion("who?", "x", "generation", "text"),))]})
    with pytest.raises(ValueError, match="no subject in 'forget' of the suite 'words' has a classification question"):
        subject_eligibility(*demo, words, "forget", progress=False)
    with pytest.raises(ValueError, match=r"expected ids of subjects in 'forget', got \['y'\]"):
        words.only(["y"], "forget")
    with pytest.raises(ValueError, match=r"got \[\]"):
        words.only([], "forget")
