"""TRL's row formats, and the rows that name the concept."""

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from space_peft.retained.reading import RetainedRows, answer_text, to_conversation


PICTURE = PILImage.fromarray(np.full((8, 8, 3), 120, dtype=np.uint8))


def _images(conversation):
    return sum(block["type"] == "image" for message in conversation["prompt"] for block in message["content"])


@pytest.mark.parametrize(
    "row",
    [
        {"images": [PICTURE], "prompt": "what is this?", "completion": "wolf"},
        {"image": PICTURE, "prompt": "what is this?", "completion": "wolf"},
        {
            "images": [PICTURE],
            "prompt": [{"role": "user", "content": "what is this?"}],
            "completion": [{"role": "assistant", "content": "wolf"}],
        },
        {
            "images": [PICTURE],
            "messages": [{"role": "user", "content": "what is this?"}, {"role": "assistant", "content": "wolf"}],
        },
        {
            "images": [PICTURE],
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "text": None}, {"type": "text", "text": "what is this?"}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "wolf"}]},
            ],
        },
    ],
)
def test_every_trl_format_gives_the_same_conversation(row):
    conversation = to_conversation(row)
    assert _images(conversation) == 1 and conversation["images"] == [PICTURE]
    assert answer_text(conversation) == "wolf"
    assert conversation["prompt"][-1]["content"][-1] == {"type": "text", "text": "what is this?"}


def test_text_only_rows_have_no_image():
    conversation = to_conversation({"prompt": "what is a wolf?", "completion": "mammal", "images": []})
    assert _images(conversation) == 0 and conversation["images"] == []


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "hello"}, "columns"),
        ({"prompt": "a?"}, "columns"),
        ({"messages": [{"role": "user", "content": "a?"}]}, "assistant"),
        ({"images": [PICTURE, PICTURE], "prompt": [{"role": "user", "content": [{"type": "image"}]}], "completion": "x"}, "2 images but 1"),
    ],
)  # fmt: skip
def test_unknown_rows_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        to_conversation(row)


def test_empty_retained_set_is_refused():
    with pytest.raises(ValueError, match="empty"):
        RetainedRows([])


def test_target_is_counted_in_image_rows_only():
    rows = [
        {"images": [PICTURE], "prompt": "what is this?", "completion": "fox"},
        {"images": [PICTURE], "prompt": "what is this?", "completion": "a red Fox"},
        {"images": [PICTURE], "prompt": "what is this?", "completion": "wolf"},
        {"images": [], "prompt": "what is a fox?", "completion": "a fox is a mammal"},
    ]
    features = Features({"images": List(Image()), "prompt": Value("string"), "completion": Value("string")})
    assert RetainedRows(rows).count_target(["fox"]) == 2
    assert RetainedRows(Dataset.from_list(rows, features=features)).count_target(["fox"]) == 2
