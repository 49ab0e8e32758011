"""Which rows are held out: no image and no text of theirs is among the fitted ones."""

import io
import random

import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from test_architectures import pictures

from space_peft.retained.held_out import HeldOut, content_keys, first_seen, split_by_content, warn_if_few
from space_peft.retained.reading import RetainedRows, split_retained


def row(question, *images, answer="a thing"):
    return {"prompt": question, "completion": answer, "images": list(images)}


def many_rows(seed=0):
    """Thirty images under three questions each, forty texts of which some are repeated, in any order."""
    rows = [row(question, image) for image in pictures(30) for question in ("What is this?", "And this?", "Is it big?")]
    rows += [row(f"What is number {i}?", answer=str(j)) for i in range(40) for j in range(1 + i % 3)]
    random.Random(seed).shuffle(rows)
    return RetainedRows(rows)


def contents(retained, rows):
    """What rows are about, found without the code that is tested."""
    return {
        (None, retained[i]["prompt"][0]["content"][-1]["text"]) if not retained[i]["images"] else
        retained[i]["images"][0].convert("RGB").tobytes() for i in rows
    }  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_held_out_is_seen_under_another_question(seed):
    retained = many_rows(seed)
    fitted, held_out = split_by_content(content_keys(retained), 0.1, seed)
    assert sorted(fitted + held_out) == list(range(len(retained)))
    assert not contents(retained, fitted) & contents(retained, held_out)
    shown = retained.has_image()
    assert sum(shown[i] for i in held_out) == 9  # three of thirty images, with all of their rows
    assert len({key for key in contents(retained, held_out) if isinstance(key, tuple)}) == 4
    assert split_by_content(content_keys(retained), 0.1, seed) == (fitted, held_out)
    assert split_by_content(content_keys(retained), 0.1, seed + 1) != (fitted, held_out)
    # As it was: by row, and then nearly every image is on both sides.
    fitted, held_out = split_retained(len(retained), 0.1, seed)
    assert contents(retained, fitted) & contents(retained, held_out)


def test_every_image_is_held_out_as_often_as_any_other():
    keys = content_keys(many_rows())
    counts = dict.fromkeys(keys, 0)
    for seed in range(400):
        for key in {keys[i] for i in split_by_content(keys, 0.1, seed)[1]}:
            counts[key] += 1
    images = [count for (kind, _), count in counts.items() if kind == "image"]
    assert sum(images) == 400 * 3 and max(images) < 40 + 5 * 6 and min(images) > 40 - 5 * 6  # six: a standard deviation


def test_an_image_is_its_pixels_whatever_file_it_came_from():
    one, other = pictures(2)
    buffers = []
    for options in ({"compress_level": 0}, {"compress_level": 9}):
        buffers.append(io.BytesIO())
        one.save(buffers[-1], "PNG", **options)
    assert buffers[0].getvalue() != buffers[1].getvalue()
    same = [one, one.copy(), Image.open(buffers[0]), Image.open(buffers[1]), one.convert("RGBA")]
    keys = content_keys(RetainedRows([row("What?", image) for image in [*same, other]]))
    assert len(set(keys[:5])) == 1 and keys[5] != keys[0]
    features = Features({"prompt": Value("string"), "completion": Value("string"), "image": ImageFeature()})
    columns = {"prompt": ["a?", "b?", "c?"], "completion": ["x"] * 3, "image": [*same[:2], other]}
    assert content_keys(RetainedRows(Dataset.from_dict(columns, features=features))) == [keys[0], keys[1], keys[5]]


def test_rows_linked_by_images_stay_together():
    a, b, c, d = pictures(4)
    keys = content_keys(RetainedRows([row("?", a), row("?", c, d), row("?", d), row("?", a, b), row("?", b, c)]))
    assert len(set(keys)) == 1
    apart = content_keys(RetainedRows([row("?", a), row("?", c, d), row("?", d), row("?", a, b)]))
    assert apart[0] == apart[3] != apart[1] == apart[2]


def test_a_text_is_its_prompt():
    def key(row):
        return content_keys(RetainedRows([row]))[0]

    assert key(row("What  is\nit?")) == key(row("what is it?", answer="another")) != key(row("what is it"))
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"}]
    asked, answer = {"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "it"}
    assert key({"messages": [*turns, asked, answer]}) != key({"messages": [asked, answer]}) == key(row("what is it?"))
    image = pictures(1)[0]
    assert key(row("what is it?", image)) == key(row("something else", image))  # of an image, not of a question


@pytest.mark.parametrize(("images", "texts", "held_out"), [(1, 50, 0), (2, 50, 6), (0, 2, 0), (0, 6, 1), (20, 1, 2)])
def test_few_images_and_texts(images, texts, held_out):
    rows = [row("?", image) for image in pictures(images)] + [row(f"{i}?") for i in range(texts)]
    assert len(split_by_content(content_keys(RetainedRows(rows)), 0.1, 0)[1]) == held_out


def test_a_certificate_says_how_its_rows_were_held_out():
    retained = many_rows()
    keys = content_keys(retained)
    now = HeldOut(len(retained), 0.1, 3, len(set(keys)))
    assert now.split(retained) == split_by_content(keys, 0.1, 3)
    assert HeldOut(len(retained), 0.1, 3).split(retained) == split_retained(len(retained), 0.1, 3)  # version 0.1.0
    assert HeldOut(len(retained) - 1, 0.1, 3, now.groups).split(retained) is None
    assert HeldOut(len(retained), 0.1, 3, now.groups - 1).split(retained) is None


def test_rows_that_were_seen_are_named():
    a, b, c, d = pictures(4)
    retained = RetainedRows([row("?", a, b), row("what is it?"), row("?", d)])
    assert first_seen(RetainedRows([row("?", c), row("new?")]), retained, range(3)) is None
    assert first_seen(RetainedRows([row("?", c), row("new?", b)]), retained, range(3)) == (1, "image")
    # c is new, but shown together with what was seen.
    assert first_seen(RetainedRows([row("?", c), row("new?", c, a)]), retained, range(3)) == (0, "image")
    assert first_seen(RetainedRows([row("What is it?")]), retained, range(3)) == (0, "text")
    assert first_seen(RetainedRows([row("?", d)]), retained, [0, 1]) is None


def test_an_image_that_does_not_decode_is_named():
    broken = io.BytesIO()
    pictures(1)[0].save(broken, "PNG")
    image = Image.open(io.BytesIO(broken.getvalue()[:60]))
    with pytest.raises(ValueError, match="retained row 1: .* does not decode"):
        content_keys(RetainedRows([row("?", pictures(1)[0]), row("?", image)]))


@pytest.mark.parametrize(
    "distinct, held_out, share, says",
    [
        (3, 0, 0.1, "about 3 distinct images and texts; there will be no certificate.* retain 200"),
        (96, 10, 0.1, "about 96 distinct .*measured on 10,.*up to 26% .* It takes 20 .*retain 200"),
        (38, 19, 0.5, "measured on 19,.*retain 40"),
    ],
)
def test_too_few_for_a_certificate_are_said(distinct, held_out, share, says):
    with pytest.warns(UserWarning, match=says):
        warn_if_few(distinct, held_out, share)


@pytest.mark.parametrize("distinct, held_out, share", [(200, 20, 0.1), (3, 0, 0.0)])
def test_enough_for_a_certificate_are_not(recwarn, distinct, held_out, share):
    warn_if_few(distinct, held_out, share)
    assert not recwarn


def test_a_single_image_is_why_there_is_no_certificate():
    with pytest.warns(
        UserWarning, match="about 27 distinct .*only one of them is an image.*Retain more images, or none"
    ):
        warn_if_few(27, 0, 0.1, images=1)
