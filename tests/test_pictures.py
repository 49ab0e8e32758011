"""Every picture becomes RGB in one way, whatever its mode and whichever road it takes to the model."""

import io

import numpy as np
import pytest
import torch
from datasets import Dataset, List
from datasets import Image as ImageFeature
from PIL import Image

from space_peft.anchors.encoders import OwnSpaceEncoder
from space_peft.anchors.pool import open_pool
from space_peft.attacks.linear_probe import hidden_states
from space_peft.data.pictures import load_rgb, open_picture
from space_peft.demo import DEMO_QUESTIONS, load_demo_model
from space_peft.evaluation.probes import Probe, _collect
from space_peft.modeling.prompts import encode_conversations
from space_peft.retained.reading import RetainedRows
from space_peft.retained.self_distillation import retained_answers
from trainers.forget_trainer import forget_conversations


RAMP = np.arange(0, 65536, 1024, dtype=np.uint16)[None].repeat(48, axis=0)  # (48, 64)


def _png(image, **options):
    held = io.BytesIO()
    image.save(held, "PNG", **options)
    return Image.open(io.BytesIO(held.getvalue()))


def _turned_file():
    """The bytes of a JPEG whose pixels lie on their side, as phones store them; its left half is red once it is upright."""
    image = Image.fromarray(
        np.concatenate([np.full((32, 32, 3), (255, 0, 0)), np.full((32, 32, 3), (0, 0, 255))]).astype("u1")
    )
    exif = Image.Exif()
    exif[0x0112] = 8  # Turn by 90 degrees, counterclockwise.
    held = io.BytesIO()
    image.save(held, "JPEG", exif=exif, quality=95)
    return held.getvalue()


def _turned():
    return Image.open(io.BytesIO(_turned_file()))


def _palette():
    image = Image.new("P", (64, 48), 1)
    image.putpalette([0, 255, 0, 200, 0, 0] + [0] * 762)
    image.paste(0, (0, 0, 32, 48))
    return _png(image, transparency=0)  # green is clear


def _half_clear(mode):
    image = Image.new("RGBA", (64, 48), (10, 20, 30, 255))
    image.paste((255, 0, 0, 0), (0, 0, 32, 48))
    return image.convert(mode)


PICTURES = {
    "I;16": lambda: Image.fromarray(RAMP),
    "I;16 of a file": lambda: _png(Image.fromarray(RAMP)),
    "I": lambda: Image.fromarray(RAMP.astype(np.int32)),
    "F": lambda: Image.fromarray((RAMP / 65535).astype(np.float32)),
    "P": _palette,
    "CMYK": lambda: Image.new("RGB", (64, 48), (10, 200, 30)).convert("CMYK"),
    "LA": lambda: _half_clear("LA"),
    "RGBA": lambda: _half_clear("RGBA"),
    "RGBa": lambda: _half_clear("RGBA").convert("RGBa"),
    "EXIF": _turned,
}


@pytest.mark.parametrize("kind", ["I;16", "I;16 of a file", "I", "F"])
def test_a_gradient_stays_one(kind):
    grey = np.asarray(load_rgb(PICTURES[kind]()))[0, :, 0].astype(int)
    assert np.abs(grey - RAMP[0] / 257).max() <= 0.5  # clipped, three quarters of it would be white
    assert (np.diff(grey) > 0).all()


def test_ranges_of_wide_modes():
    def shown(values):
        return np.asarray(load_rgb(Image.fromarray(np.array([values]))))[0, :, 0].tolist()

    assert shown(np.array([0.0, 0.5, 1.0], dtype=np.float32)) == [0, 128, 255]
    assert shown(np.array([0.0, 128.0, 255.0], dtype=np.float32)) == [0, 128, 255]
    assert shown(np.array([0, 128, 255], dtype=np.int32)) == [0, 128, 255]
    assert shown(np.array([0, 300, 65535], dtype=np.uint16)) == [0, 1, 255]
    for bad in ([-1.0, 1.0], [0.0, 300.0], [0.0, float("nan")], [0.0, float("inf")]):
        with pytest.raises(ValueError, match="its values, of mode 'F', go from .*scale it yourself"):
            shown(np.array(bad, dtype=np.float32))
    with pytest.raises(ValueError, match="of mode 'I'"):
        shown(np.array([0, 70000], dtype=np.int32))


def test_clear_parts_are_white():
    for kind in ("P", "LA", "RGBA", "RGBa"):
        image = load_rgb(PICTURES[kind]())
        assert image.getpixel((5, 5)) == (255, 255, 255), kind
        assert image.getpixel((60, 5)) != (255, 255, 255), kind
    grey = _png(Image.fromarray(RAMP), transparency=int(RAMP[0, 3]))
    assert np.asarray(load_rgb(grey))[0, 3:5, 0].tolist() == [255, 16]


def test_photographs_stand_upright_once():
    upright = load_rgb(_turned())
    left, right = upright.getpixel((4, 16)), upright.getpixel((60, 16))
    assert upright.size == (64, 32) and left[0] > 200 > left[2] and right[2] > 200 > right[0]
    assert load_rgb(upright) is upright
    assert load_rgb(_turned().convert("RGB")).tobytes() == upright.tobytes()


def test_modes_that_are_not_known_are_refused():
    lab = Image.new("LAB", (4, 4))
    with pytest.raises(ValueError, match="mode is 'LAB'; convert it to RGB yourself"):
        load_rgb(lab)


@pytest.fixture(scope="module")
def demo():
    return load_demo_model()


@pytest.mark.parametrize("kind", PICTURES)
def test_every_road_shows_the_same_picture(demo, kind, tmp_path):
    model, processor = demo
    expected = load_rgb(PICTURES[kind]())
    pixels = processor.image_processor([expected], return_tensors="pt")["pixel_values"]
    said = {"prompt": "what is this?", "completion": "fox"}

    def encoded(rows):
        return encode_conversations(processor, [rows[0]])["pixel_values"].reshape(pixels.shape)

    roads = {
        "retained rows": encoded(RetainedRows([{**said, "image": PICTURES[kind]()}])),
        "images": encoded(RetainedRows([{**said, "images": [PICTURES[kind]()]}])),
        "rows to forget": encoded(forget_conversations([{**said, "image": PICTURES[kind]()}], ["fox"], DEMO_QUESTIONS)),
        "images to forget": encoded(forget_conversations([{"image": PICTURES[kind]()}], ["fox"], DEMO_QUESTIONS)),
        "own answers": encode_conversations(
            processor,
            retained_answers(model, processor, [PICTURES[kind]()], questions=["what is this?"], progress=False)[:1]
            or [{**RetainedRows([{**said, "image": PICTURES[kind]()}])[0]}],
        )["pixel_values"].reshape(pixels.shape),
    }  # fmt: skip
    if kind != "RGBa":  # no file format holds it
        # `datasets` writes a PIL image anew, and leaves out which way is up.
        given = {"bytes": _turned_file(), "path": None} if kind == "EXIF" else PICTURES[kind]()
        stored = Dataset.from_dict({"image": [given], **{k: [v] for k, v in said.items()}})
        stored = stored.cast_column("image", ImageFeature())
        roads["a stored table"] = encoded(RetainedRows(stored))
        roads["undecoded"] = encoded(RetainedRows(stored.cast_column("image", ImageFeature(decode=False))))
        pooled = open_pool(stored).images([0])[0]
        roads["a pool"] = processor.image_processor([pooled], return_tensors="pt")["pixel_values"]
    for road, shown in roads.items():
        assert torch.equal(shown, pixels), road
    _, asked, _ = _collect(
        [Probe("forget", [{"question": "q", "answer": "a", "image": PICTURES[kind]()}], "equals")], 8
    )
    _, again, _ = _collect([Probe("forget", [{"question": "q", "answer": "a", "image": expected}], "equals")], 8)
    assert asked == again
    encoder = OwnSpaceEncoder(model, processor)
    assert np.array_equal(encoder.embed_images([PICTURES[kind]()]), encoder.embed_images([expected]))
    states = [
        hidden_states(model, processor, [image], "what is this?", progress=False)
        for image in (PICTURES[kind](), expected)
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


def test_files_bytes_and_stored_pictures_are_opened(tmp_path):
    image = Image.new("RGB", (6, 4), (200, 10, 10))
    path = tmp_path / "fox.png"
    image.save(path)
    for picture in (
        image,
        path,
        str(path),
        path.read_bytes(),
        {"bytes": path.read_bytes(), "path": None},
        {"path": str(path)},
    ):
        assert load_rgb(open_picture(picture)).tobytes() == image.tobytes()


@pytest.mark.parametrize(
    "picture, error, says",
    [
        ("https://example.org/fox.png", ValueError, "URL .* nothing is downloaded"),
        ("data:image/png;base64,AAAA", ValueError, "URL"),
        ("missing.png", ValueError, "no such file"),
        (b"no picture", ValueError, "none that Pillow opens"),
        ({"bytes": None, "path": None}, ValueError, "neither bytes nor a path"),
        ({"url": "https://example.org/fox.png"}, TypeError, "got dict"),
        (np.zeros((4, 4, 3), dtype=np.uint8), TypeError, r"got ndarray.*with_format\(None\)"),
        (torch.zeros(3, 4, 4), TypeError, r"got Tensor.*with_format\(None\)"),
        (7, TypeError, "got int"),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_named(picture, error, says):
    with pytest.raises(error, match=says):
        open_picture(picture)


def test_lists_of_stored_pictures_are_opened(tmp_path):
    paths = []
    for number in range(2):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.new("RGB", (4, 4), (number, 0, 0)).save(paths[-1])
    rows = Dataset.from_dict({"images": [paths], "prompt": ["which?"], "completion": ["these"]})
    for feature in (None, List(ImageFeature()), List(ImageFeature(decode=False))):
        cast = rows if feature is None else rows.cast_column("images", feature)
        assert [load_rgb(image).getpixel((0, 0))[0] for image in RetainedRows(cast)[0]["images"]] == [0, 1]
