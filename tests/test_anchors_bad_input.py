"""Selection of anchors from pools and with settings that cannot work: clear errors, nothing half-written."""

import io
import warnings

import pytest
import torch
from colour_space import CAPTIONS, REDNESS, ColourEncoder, choose, make_pool, picture
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Value,
)
from datasets import Image as ImageFeature

from space_peft.anchors import (
    anchor_info,
    select_random_anchors,
)


@pytest.fixture
def pool():
    return make_pool(REDNESS, caption=CAPTIONS, id=[f"img-{i}" for i in range(7)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "`k` must be a whole number of at least 1, got 0"),
        ({"k": -3}, "`k` must be"),
        ({"k": 2.5}, "`k` must be"),
        ({"batch_size": 0}, "`batch_size` must be"),
        ({"diversity": 1.5}, "between 0 and 1, got 1.5"),
        ({"threshold": 7}, "`threshold` is a cosine"),
        ({"threshold": float("nan")}, "`threshold` is a cosine"),
        ({"threshold": 0.8, "upper_threshold": 0.2}, "must be below `upper_threshold`"),
        ({"templates": "a photo of {}"}, "`templates` must be a sequence"),
        ({"templates": ["a photo"]}, "where the name goes"),
        ({"caption_column": "alt"}, "no column 'alt', its columns are .* set `caption_column`"),
        ({"caption_column": "image"}, "expected strings"),
        ({"image_column": "img"}, "no column 'img'"),
        ({"image_column": "caption"}, "expected images"),
        ({"id_column": "key"}, "set `id_column`"),
        ({"encoder": None}, "give `model` and `processor`, or an `encoder`"),
    ],
)
def test_settings_out_of_range(pool, settings, message):
    with pytest.raises(ValueError, match=message):
        choose("red", pool, **settings)


@pytest.mark.parametrize("function", [choose, select_random_anchors])
@pytest.mark.parametrize("concept", ["", "  \t\n", "\u200b", "x" * 10_000])
def test_concept_that_is_no_name(pool, function, concept):
    with pytest.raises(ValueError, match="empty|no visible character|10000 characters, more than 200"):
        function(concept, pool)


def test_names_of_another_type(pool):
    with pytest.raises(TypeError, match="must be a string"):
        choose(7, pool)
    with pytest.raises(TypeError, match=r"write \['crimson'\]"):
        choose("red", pool, aliases="crimson")
    with pytest.raises(TypeError, match="alias 0: .* must be a string"):
        choose("red", pool, aliases=[None])
    with pytest.raises(ValueError, match="no visible character"):
        choose("red", pool, aliases=[" "])
    with pytest.raises(ValueError, match="alias 0: .* 300 characters"):
        choose("red", pool, aliases=["y" * 300])
    with pytest.raises(ValueError, match="description has 3000 characters"):
        choose("red", pool, description="y" * 3000)


def test_pool_that_is_no_dataset(pool):
    with pytest.raises(ValueError, match="pool is empty"):
        choose("red", pool.select([]))
    with pytest.raises(TypeError, match="IterableDataset .*Dataset.from_list"):
        choose("red", pool.to_iterable_dataset())
    with pytest.raises(TypeError, match=r"pool\['train'\]"):
        choose("red", DatasetDict({"train": pool}))
    with pytest.raises(TypeError, match="got list"):
        choose("red", [picture((1, 2, 3))])


def test_pool_of_only_the_target(pool):
    only = make_pool(REDNESS[:3], caption=["red", "Reds", "a red thing"])
    with pytest.raises(ValueError, match="3 images 0 can stand in for 'red', 3 were asked for; left out: 3 caption"):
        choose("red", only)
    with pytest.raises(ValueError, match="1 caption, 5 below threshold.*Scores range from .*Lower `threshold`"):
        choose("red", pool.select(range(1, 7)), threshold=0.99)


def test_fewer_anchors_than_asked_is_said(pool):
    with pytest.warns(UserWarning, match="7 images 6 can stand in for 'red', 20 were asked for; left out: 1 caption"):
        anchors = choose("red", pool, k=20, duplicate_threshold=None)
    assert len(anchors) == 6 and anchor_info(anchors)["anchors"] == 6 and anchor_info(anchors)["k"] == 20


def test_pool_without_captions_cannot_exclude_the_target():
    pool = make_pool(REDNESS)
    with pytest.warns(UserWarning, match="cannot be told apart"):
        anchors = choose("red", pool)
    assert "caption" not in anchors.column_names and anchor_info(anchors)["exclude_by_caption"] is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose("red", pool, upper_threshold=0.99, k=2)
        choose("red", pool, exclude_by_caption=False)
    with pytest.raises(ValueError, match="reads captions, but the pool has none"):
        choose("red", pool, encoder=ColourEncoder(reads="caption"), exclude_by_caption=False)


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def broken_pool(tmp_path):
    paths = []
    for i, colour in enumerate(REDNESS[:4]):
        paths.append(str(tmp_path / f"{i}.png"))
        picture(colour).save(paths[-1])
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:40])
    (tmp_path / "3.png").write_bytes(b"this is no image")
    return Dataset.from_dict({"image": paths, "caption": list("abcd")}).cast_column("image", ImageFeature())


def test_image_that_does_not_decode(tmp_path):
    pool, cache = broken_pool(tmp_path), tmp_path / "cache"
    with pytest.raises(ValueError, match="row 2 of the pool does not decode .*skip_undecodable=True"):
        choose("red", pool, cache_dir=cache)
    assert files_in(cache) == []
    anchors = choose("red", pool, k=2, cache_dir=cache, skip_undecodable=True)
    assert sorted(anchors["pool_row"]) == [0, 1] and anchor_info(anchors)["excluded"]["undecodable"] == 2
    # What one call may skip is still an error to the next, cache or not.
    with pytest.raises(ValueError, match="row 2 of the pool"):
        choose("red", pool, cache_dir=cache)
    with pytest.raises(ValueError, match="none of the pool's 2 images decodes"):
        choose("red", pool.select([2, 3]), skip_undecodable=True)
    first = choose("red", pool.select([3, 2, 1]), k=1, skip_undecodable=True, batch_size=1)
    assert first["pool_row"][:] == [2]
    drawn = select_random_anchors("red", pool, k=2, skip_undecodable=True)
    assert sorted(drawn["pool_row"]) == [0, 1]


def test_rows_without_an_image():
    pool = Dataset.from_dict(
        {"image": [picture((255, 0, 0)), None], "caption": ["a", "b"]},
        features=Features({"image": ImageFeature(), "caption": Value("string")}),
    )
    with pytest.raises(ValueError, match="row 1 of the pool .*holds no image"):
        choose("red", pool)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "LA", "1"])
def test_image_modes(mode):
    suffix = "TIFF" if mode == "CMYK" else "PNG"
    rows = []
    for colour in REDNESS:
        buffer = io.BytesIO()
        picture(colour, "L" if mode == "LA" else mode).convert(mode).save(buffer, suffix)
        rows.append({"bytes": buffer.getvalue(), "path": None})
    pool = Dataset.from_dict({"image": rows, "caption": CAPTIONS}).cast_column("image", ImageFeature())
    assert pool[0]["image"].mode == mode
    anchors = choose("red", pool, k=2, duplicate_threshold=None)
    assert {image.mode for image in anchors["image"]} == {"RGB"}


def test_column_that_is_not_decoded_and_formatted_pool(pool):
    raw = pool.cast_column("image", ImageFeature(decode=False)).with_format("numpy")
    assert choose("red", raw)["pool_row"][:] == choose("red", pool)["pool_row"][:]


def test_encoder_that_gives_nan_or_the_wrong_shape(pool, tmp_path):
    class Broken(ColourEncoder):
        def embed_images(self, images):
            vectors = super().embed_images(images)
            return self.broken(vectors)

    encoder = Broken()
    encoder.broken = lambda vectors: torch.where(vectors[:, :1] < 0.3, torch.nan, vectors)
    with pytest.raises(ValueError, match="NaN or infinity for pool row 2"):
        choose("red", pool, encoder=encoder, cache_dir=tmp_path)
    for broken, shape in (
        (lambda z: z[0], r"\(3,\)"),
        (lambda z: z[1:], r"\(6, 3\)"),
        (lambda z: z[:, 1:], r"\(7, 2\)"),
    ):
        encoder.broken = broken
        with pytest.raises(ValueError, match=rf"shape {shape} for 7 rows, expected \(7, 3\)"):
            choose("red", pool, encoder=encoder, cache_dir=tmp_path)
    assert files_in(tmp_path) == []
