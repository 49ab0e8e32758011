"""A string where a list of names is expected is an error, not a list of letters."""

import pytest

from space_peft.evaluation import build_probes
from space_peft.names import check_aliases
from space_peft.questions import DEFAULT_QUESTIONS


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
