"""TRL's row formats, and the rows that name the concept."""

from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from space_peft.demo import load_demo_model
from space_peft.retained.reading import RetainedRows, answer_text, retained_loader, to_conversation
from space_peft.trainers.certifying import CertifyingMixin


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


def test_rows_of_like_length_are_read_together():
    """Texts apart from images, long prompts from short ones, and of like prompts long answers from short ones."""
    prompts = ("what is this?", "what is this? " * 8)
    rows = [
        {"prompt": prompt, "completion": " ".join(["wolf"] * words), "images": [PICTURE] * shown}
        for words in (1, 12)
        for shown in (1, 0)
        for prompt in prompts
    ]
    retained = RetainedRows(rows * 2)
    loader = retained_loader(load_demo_model()[1], retained, range(16), 2)
    order = loader.dataset.indices
    assert sorted(order) == list(range(16)) and [retained.has_image()[row] for row in order] == [False] * 8 + [True] * 8
    assert all(batch["attention_mask"].all() for batch in loader)  # Each row beside its twin: nothing is padded.
    # Who draws some of them draws the same ones, however they are put into batches.
    held_out = CertifyingMixin._unseen(SimpleNamespace(retained=retained, held_out=loader), None)[1]
    assert held_out == [2, 3, 6, 7, 10, 11, 14, 15, 0, 1, 4, 5, 8, 9, 12, 13]


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
