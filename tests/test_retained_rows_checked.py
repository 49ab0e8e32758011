"""Every retained row is checked when `RetainedRows` is made, and the error names the row."""

import pytest
from datasets import Dataset
from PIL import Image

from space_peft.retain import RetainedRows


GOOD = {"prompt": "What is this?", "completion": "A cat."}


def _said(role, content="hello"):
    return {
        "prompt": [{"role": role, "content": content}],
        "completion": [{"role": "assistant", "content": "A cat."}],
    }


@pytest.mark.parametrize(
    "bad, says",
    [
        (_said("human"), "rename 'human' to 'user'"),
        (_said("User"), "role 'User'"),
        (_said("user", [{"type": "image_url"}]), "image_url"),
        (_said("user", [{"type": "IMAGE"}]), "IMAGE"),
        ({"prompt": "hello", "completion": " "}, "empty answer"),
        ({**_said("system"), "images": [Image.new("RGB", (4, 4))]}, "no user turn"),
        ({**GOOD, "images": [], "image": Image.new("RGB", (4, 4))}, "both `images` and `image`"),
    ],
)
def test_the_error_names_the_row(bad, says):
    with pytest.raises(ValueError, match=f"retained row 2: .*{says}"):
        RetainedRows([GOOD, GOOD, bad])


def test_a_table_is_checked_without_decoding():
    rows = Dataset.from_list([GOOD, {**GOOD, "completion": "\n"}])
    with pytest.raises(ValueError, match="retained row 1: .*empty answer"):
        RetainedRows(rows)
    assert len(RetainedRows(rows.select([0]))) == 1
