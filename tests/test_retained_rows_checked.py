"""Every retained row is checked when `RetainedRows` is made, and the error names the row."""

import io

import datasets
import numpy as np
import pytest
import torch
from datasets import Audio, Dataset, DatasetDict, Features, IterableDatasetDict, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from space_peft.demo import load_demo_model
from space_peft.modeling.prompts import conversation, encode_conversations
from space_peft.retained.reading import RetainedRows, retained_loader


GOOD = {"prompt": "What is this?", "completion": "A cat."}
PICTURE = Image.new("RGB", (4, 4), (200, 10, 10))
SHOWN = {**GOOD, "image": PICTURE}


def _said(role, content="hello", **more):
    return {
        "prompt": [{"role": role, "content": content, **more}],
        "completion": [{"role": "assistant", "content": "A cat."}],
    }


def _bytes():
    held = io.BytesIO()
    PICTURE.save(held, "PNG")
    return held.getvalue()


@pytest.mark.parametrize(
    "bad, says",
    [
        (_said("human"), "rename 'human' to 'user'"),
        (_said("User"), "role 'User'"),
        (_said("user", [{"type": "image_url"}]), "image_url"),
        (_said("user", [{"type": "IMAGE"}]), "IMAGE"),
        ({"prompt": "hello", "completion": " "}, "empty answer"),
        ({**_said("system"), "images": [PICTURE]}, "no user turn"),
        ({**GOOD, "images": [], "image": PICTURE}, "both `images` and `image`"),
        # Pictures where none is read.
        ({**GOOD, "picture": PICTURE}, "column 'picture' holds a picture"),
        ({**SHOWN, "img": [PICTURE]}, "column 'img' holds a picture"),
        ({**GOOD, "pixel_values": np.zeros((3, 4, 4))}, "column 'pixel_values'"),
        ({**GOOD, "pixel_values": np.zeros((3, 4, 4)).tolist()}, "column 'pixel_values'"),
        ({**GOOD, "frames": torch.zeros(4, 4)}, "column 'frames'"),
        ({**GOOD, "jpg": _bytes()}, "column 'jpg'"),
        ({**GOOD, "meta": {"thumbnail": {"bytes": _bytes()}}}, "column 'meta'"),
        ({**GOOD, "image_url": "https://example.org/cat.JPG?size=3"}, "column 'image_url'"),
        ({**GOOD, "files": ["a.png", "b.png"]}, "column 'files'"),
        ({**GOOD, "video": "cat.mp4"}, "column 'video'"),
        # Pictures that are none.
        ({**GOOD, "image": "https://example.org/cat.png"}, "URL 'https://example.org/cat.png'"),
        ({**GOOD, "image": "missing.png"}, "no such file"),
        ({**GOOD, "images": "missing.png"}, "`images` holds a str; expected a list"),
        ({**GOOD, "images": PICTURE}, "`images` holds a Image; expected a list"),
        ({**GOOD, "image": [PICTURE]}, "`image` holds a list; name it `images`"),
        ({**GOOD, "images": [None]}, "expected a PIL image, got NoneType"),
        ({**GOOD, "image": b"cat"}, "none that Pillow opens"),
        ({**GOOD, "image": np.zeros((4, 4, 3), dtype=np.uint8)}, "got ndarray"),
        ({**GOOD, "image": torch.zeros(3, 4, 4)}, "got Tensor"),
        # Blocks that hold more than is read.
        (_said("user", [{"type": "image", "url": "https://example.org/cat.png"}]), "'url', which would be dropped"),
        (_said("user", [{"type": "image", "image": "https://example.org/cat.png"}]), "URL"),
        ({**_said("user", [{"type": "image", "image": PICTURE}]), "images": [PICTURE]}, "not all would be shown"),
        (_said("user", [{"type": "image", "image": PICTURE}, {"type": "image"}]), "not all would be shown"),
        (_said("user", [{"type": "text", "text": "hello", "image": PICTURE}]), "type 'text' with 'image'"),
        (
            {**_said("user", [{"type": "image", "index": 1}, {"type": "image", "index": 0}]), "images": [PICTURE] * 2},
            r"`index` \[1, 0\]",
        ),
        # The token of an image as text.
        (_said("user", "<image>\nWhat is this?"), "'<image>' as text"),
        ({**SHOWN, "prompt": "<image>\nWhat is this?"}, "'<image>' as text"),
        (_said("user", "<|image_pad|> What is this?"), "image_pad"),
        (_said("user", "What is in <image_1>?"), "image_1"),
        (_said("user", "[IMG] what is this?"), "IMG"),
        ({**GOOD, "completion": "see <image>"}, "'<image>' as text"),
        # Rows and messages that are none.
        ("What is this?", "the row is a str"),
        (["What is this?"], "the row is a list"),
        (None, "the row is a NoneType"),
        ({"prompt": "What is this?"}, "no 'completion'"),
        ({"completion": "A cat."}, "no 'prompt'"),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "A cat."}]}, r"message 0 has the keys \['role'\]"),
        ({"messages": [{"content": "hello"}, {"role": "assistant", "content": "x"}]}, r"message 0 has the keys \['content'\]"),
        ({"messages": ["hello", "A cat."]}, "message 0 has 'hello'"),
        ({"messages": "hello"}, "the messages are a str"),
        ({"messages": []}, "last message"),
        ({"prompt": [], "completion": "A cat."}, "empty prompt"),
        ({"prompt": 3, "completion": "A cat."}, "the messages are a int"),
        (_said("user", None), "message 0 has content None"),
        (_said("user", 3), "content of type int"),
        (_said("user", ["hello"]), "the block 'hello'"),
        (_said("user", [{"type": "text", "content": "hello"}]), "expected a string `text`"),
        (_said("user", tool_calls=[{"name": "search"}]), "'tool_calls', which would be dropped"),
        ({**GOOD, "completion": [{"role": "assistant", "content": [{"type": "image"}]}]}, "0 images but 1"),
    ],
)  # fmt: skip
def test_the_error_names_the_row(bad, says):
    with pytest.raises(ValueError, match=f"retained row 2: .*{says}"):
        RetainedRows([GOOD, GOOD, bad])


@pytest.mark.parametrize(
    "row, pictures",
    [
        (SHOWN, 1),
        ({**GOOD, "image": {"bytes": _bytes(), "path": None}}, 1),
        ({**GOOD, "images": [_bytes(), PICTURE]}, 2),
        (_said("user", [{"type": "image", "image": PICTURE}, {"type": "text", "text": "hello"}]), 1),
        ({**_said("user", [{"type": "image", "index": 0, "text": None}, {"type": "text", "text": "a"}]), "images": [PICTURE]}, 1),
        # What is beside a picture, or no picture, may stay.
        ({**SHOWN, "source": "https://example.org/cat.png", "score": np.float32(0.5), "tags": ["a", "b"]}, 1),
        ({**GOOD, "embedding": np.zeros(512), "box": [[0, 0, 1, 1]], "text": "see cat.png for it"}, 0),
        (_said("user", "is 1 < 2 and <b>image</b> html?", name=None, tool_calls=[]), 0),
    ],
)  # fmt: skip
def test_what_can_be_shown_is_shown(row, pictures):
    rows = RetainedRows([row])
    assert len(rows[0]["images"]) == pictures and rows.has_image() == [pictures > 0]
    placed = sum(block["type"] == "image" for message in rows[0]["prompt"] for block in message["content"])
    assert placed == pictures


def test_a_table_is_checked_without_decoding(monkeypatch):
    rows = Dataset.from_list([GOOD, {**GOOD, "completion": "\n"}])
    with pytest.raises(ValueError, match="retained row 1: .*empty answer"):
        RetainedRows(rows)
    assert len(RetainedRows(rows.select([0]))) == 1
    decoded = []
    monkeypatch.setattr(ImageFeature, "decode_example", lambda self, value, **_: decoded.append(value) or PICTURE)
    shown = RetainedRows(Dataset.from_list([SHOWN] * 3).cast_column("image", ImageFeature()))
    assert shown.has_image() == [True] * 3 and shown.count_target(["cat"]) == 3 and not decoded
    assert shown[0]["images"] == [PICTURE] and len(decoded) == 1


@pytest.mark.parametrize(
    "column, feature, values",
    [
        ("picture", ImageFeature(), [PICTURE, None]),
        ("pictures", List(ImageFeature()), [[PICTURE], []]),
        ("jpg", Value("binary"), [_bytes(), None]),
        ("file", {"bytes": Value("binary"), "path": Value("string")}, [{"bytes": _bytes(), "path": None}, None]),
        ("pixel_values", List(List(List(Value("float32")))), [[[[0.0]]], None]),
        ("sound", Audio(), [None, None]),
    ],
)
def test_columns_of_pictures_that_are_not_read(column, feature, values):
    features = Features({**{key: Value("string") for key in GOOD}, column: feature})
    rows = Dataset.from_dict({**{key: [value] * 2 for key, value in GOOD.items()}, column: values}, features=features)
    with pytest.raises(ValueError, match=f"column '{column}' of the retained dataset .*rename it to `image`"):
        RetainedRows(rows)
    assert len(RetainedRows(rows.remove_columns(column))) == 2


def test_addresses_in_a_table_are_no_pictures():
    rows = Dataset.from_list([{**GOOD, "url": "see the manual"}, {**GOOD, "url": "https://example.org/cat.webp"}])
    with pytest.raises(ValueError, match="retained row 1: the column 'url'"):
        RetainedRows(rows)


@pytest.mark.parametrize("kind", ["torch", "numpy", "arrow", "pandas"])
def test_formats_are_taken_off(kind):
    rows = Dataset.from_list([SHOWN, {**SHOWN, "image": None}]).cast_column("image", ImageFeature())
    retained = RetainedRows(rows.with_format(kind))
    assert retained.has_image() == [True, False]
    assert retained[0]["images"][0].tobytes() == PICTURE.tobytes()


def test_a_choice_of_columns_stays():
    rows = Dataset.from_list([{**SHOWN, "other": 3}]).cast_column("image", ImageFeature())
    assert RetainedRows(rows.with_format("numpy", columns=["prompt", "completion"])).has_image() == [False]


def test_transforms_are_what_is_checked():
    raw = Dataset.from_dict({"photo": [PICTURE] * 2, "answer": ["a cat", "a wolf"]}).cast_column(
        "photo", ImageFeature()
    )

    def shown(batch):
        return {"prompt": ["q"] * len(batch["photo"]), "completion": batch["answer"], "image": batch["photo"]}

    rows = RetainedRows(raw.with_transform(shown))
    assert rows.has_image() == [True, True] and rows.count_target(["cat"]) == 1
    dropped = raw.with_transform(
        lambda batch: {**shown(batch), "image": [None] * len(batch["photo"]), "photo": batch["photo"]}
    )
    with pytest.raises(ValueError, match="retained row 0: the column 'photo'"):
        RetainedRows(dropped)
    arrays = raw.with_transform(
        lambda batch: {**shown(batch), "image": [np.asarray(image) for image in batch["photo"]]}
    )
    with pytest.raises(ValueError, match="retained row 0: .*got ndarray"):
        RetainedRows(arrays)


def test_what_is_no_list_of_rows_is_refused():
    rows = Dataset.from_list([GOOD] * 2)
    for given, says in (
        (DatasetDict({"test": rows}), r"DatasetDict .*\['test'\]"),
        (IterableDatasetDict({"test": rows.to_iterable_dataset()}), r"IterableDatasetDict .*\['test'\]"),
        (rows.to_iterable_dataset(), "IterableDataset .*Dataset.from_list"),
        ((row for row in rows), "got a generator"),
        ("rows.jsonl", "the text 'rows.jsonl'"),
        ({"prompt": ["q"], "completion": ["a"]}, "got a dict .*Dataset.from_dict"),
        (rows.to_pandas(), "got a DataFrame .*Dataset.from_pandas"),
    ):
        with pytest.raises(TypeError, match=says):
            RetainedRows(given)
    assert len(RetainedRows(tuple(rows))) == len(RetainedRows(RetainedRows(rows))) == 2


def test_a_row_that_ends_early_does_not_end_the_epoch():
    calls = []

    def shown(batch):
        calls.append(1)
        if len(calls) > 4:  # good when checked
            next(iter(()))
        return batch

    retained = RetainedRows(Dataset.from_list([GOOD] * 3).with_transform(shown))
    _, processor = load_demo_model()
    with pytest.raises(RuntimeError, match="retained row 1: .*StopIteration"):
        list(retained_loader(processor, retained, range(3), 2))


def test_a_processor_that_runs_out_of_images_is_an_error(monkeypatch):
    _, processor = load_demo_model()
    monkeypatch.setattr(type(processor), "__call__", lambda *args, **kwargs: next(iter(())))
    with pytest.raises(ValueError, match="more image tokens than images"):
        encode_conversations(processor, [conversation("what is this?", answer="fox")])


def test_the_image_token_as_text_is_refused_where_it_is_encoded():
    _, processor = load_demo_model()
    row = conversation(f"what is {processor.image_token} this?", answer="fox", image=PICTURE)
    with pytest.raises(ValueError, match="row 1 of a batch says the image token"):
        encode_conversations(processor, [conversation("what is this?", answer="fox"), row])
    with pytest.raises(ValueError, match="row 0 of a batch"):
        encode_conversations(processor, [conversation("what is this?", answer=f"a {processor.image_token}")])


def test_messages_that_are_stored_as_json():
    block = [{"type": "image"}, {"type": "text", "text": "what?"}]
    lines = [_said("user"), _said("user", block)]
    lines = [{"messages": [*line["prompt"], *line["completion"]]} for line in lines]
    options = {"on_mixed_types": "use_json"} if hasattr(datasets, "Json") else {}
    if not options:
        pytest.skip("this version of datasets does not store mixed contents")
    rows = Dataset.from_list(lines, **options).add_column("images", [[], [{"bytes": _bytes(), "path": None}]])
    retained = RetainedRows(rows.cast_column("images", List(ImageFeature())))
    assert retained.has_image() == [False, True] and retained.count_target(["cat"]) == 1
    assert retained[1]["prompt"][0]["content"] == block and len(retained[1]["images"]) == 1
