"""Selection of anchors: its steps in a space that can be computed by hand, and on the embedded model."""

import json
import os
import shutil
import warnings

import numpy as np
import pytest
from colour_space import CAPTIONS, REDNESS, ColourEncoder, choose, make_pool, picture
from datasets import (
    ClassLabel,
    Dataset,
    Features,
    List,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets import Image as ImageFeature
from datasets.info import DatasetInfo, DatasetInfosDict
from datasets.splits import SplitDict, SplitInfo
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, DatasetCardData
from PIL import Image

from space_peft.anchors import (
    OwnSpaceEncoder,
    anchor_info,
    concept_embedding,
    select_anchors,
    select_random_anchors,
    set_anchor_info,
)
from space_peft.data.names import mentions
from space_peft.demo import load_demo_model


@pytest.fixture
def pool():
    return make_pool(REDNESS, caption=CAPTIONS, id=[f"img-{i}" for i in range(7)])


# What it selects


def test_best_scores_without_the_target(pool):
    anchors = choose("red", pool, diversity=0.0, duplicate_threshold=None)
    # Row 1 names the target in its caption.
    assert anchors["pool_row"][:] == [0, 3, 5]
    assert anchors["rank"][:] == [0, 1, 2]
    assert anchors["caption"][:] == ["rose", "cherry", "brick"]
    assert anchors["pool_id"][:] == ["img-0", "img-3", "img-5"]
    colours = np.array(REDNESS, dtype=np.float32)[[0, 3, 5]] + 1e-3
    np.testing.assert_allclose(anchors["score"][:], colours[:, 0] / np.linalg.norm(colours, axis=1), atol=1e-5)
    assert [image.getpixel((0, 0)) for image in anchors["image"]] == [REDNESS[i] for i in (0, 3, 5)]


def test_provenance(pool):
    info = anchor_info(choose("red", pool, threshold=0.5, aliases=["crimson", "CRIMSON"], description="a warm colour"))
    assert info["concept"] == "red" and info["aliases"] == ["crimson"] and info["description"] == "a warm colour"
    assert info["stage"] == "selected" and info["encoder"] == "mean colour" and info["templates"] == ["{}"]
    assert info["threshold"] == 0.5 and info["k"] == 3 and info["anchors"] == 3
    assert info["pool"]["fingerprint"] == pool._fingerprint and info["pool"]["rows"] == 7
    assert info["pool"]["caption_column"] == "caption" and info["pool"]["id_column"] == "id"
    assert set(info["versions"]) == {"space-peft", "datasets", "torch", "transformers"}
    assert info["excluded"]["caption"] == 1


def test_concept_embedding_is_the_mean_of_all_texts():
    encoder = ColourEncoder()
    got = concept_embedding(encoder, "red", aliases=["green"], description="blue", templates=["{}", "grey {}"])
    texts = ["red", "grey red", "green", "grey green", "blue"]
    mean = encoder.embed_texts(texts).numpy().mean(axis=0)
    np.testing.assert_allclose(got, mean / np.linalg.norm(mean), atol=1e-6)


def test_braces_in_a_name_are_no_template():
    assert np.linalg.norm(concept_embedding(ColourEncoder(), "red {x} {}")) == pytest.approx(1)


def test_thresholds_and_their_counts(pool):
    everything = choose("red", pool, k=6, diversity=0.0, duplicate_threshold=None)
    scores = dict(zip(everything["pool_row"], everything["score"]))
    with pytest.warns(UserWarning, match=r"1 can stand in for 'red', 3 were asked for.*2 above upper.*3 below thr"):
        anchors = choose("red", pool, threshold=0.4, upper_threshold=0.93, duplicate_threshold=None)
    kept = {row for row, score in scores.items() if 0.4 <= score <= 0.93}
    excluded = anchor_info(anchors)["excluded"]
    assert set(anchors["pool_row"]) == kept and kept
    assert excluded["above_upper_threshold"] == sum(score > 0.93 for score in scores.values())
    assert excluded["below_threshold"] == sum(score < 0.4 for score in scores.values())
    assert sum(excluded.values()) + len(anchors) == len(pool)


def test_near_duplicates_are_dropped_and_counted():
    pool = make_pool([(250, 4, 0), (250, 0, 0), (250, 8, 0), (200, 90, 0), (0, 0, 255)], caption=list("abcde"))
    anchors = choose("red", pool, diversity=0.0, k=2)
    assert anchors["pool_row"][:] == [1, 3]
    assert anchor_info(anchors)["excluded"]["near_duplicate"] == 2
    assert choose("red", pool, diversity=0.0, k=2, duplicate_threshold=None)["pool_row"][:] == [1, 0]


def test_the_same_twice_and_for_any_batch_size(pool):
    one = choose("red", pool, k=4)
    assert one["pool_row"][:] == choose("red", pool, k=4, batch_size=2)["pool_row"][:]
    assert anchor_info(one) == anchor_info(choose("red", pool, k=4))


def test_exclusion_can_be_turned_off(pool):
    anchors = choose("red", pool, exclude_by_caption=False, k=7, duplicate_threshold=None)
    assert 1 in anchors["pool_row"][:] and anchor_info(anchors)["excluded"]["caption"] == 0


@pytest.mark.parametrize(
    ("caption", "names", "expected"),
    [
        ("A Fox in the snow", ["fox"], True),
        ("two foxes", ["fox"], True),
        ("the fox's den", ["fox"], True),
        ("foxglove and firefox", ["fox"], False),
        ("eiffel_tower-2.jpg", ["Eiffel Tower"], True),
        ("EIFFEL\n tower", ["eiffel tower"], True),
        ("Cafe\u0301 de Flore", ["caf\u00e9"], True),
        ("STRASSE", ["straße"], True),
        ("夜の東京タワー", ["東京タワー"], True),
        ("東京駅", ["東京タワー"], False),
        ("written in C++, mostly", ["C++"], True),
        ("written in C", ["C++"], False),
        ("anything at all", [".*"], False),
        ("what (is) this?", ["(is)", "["], True),
        ("a red car", ["a.b", "red"], True),
        ("пушистая Лиса", ["лиса"], True),
        ("", ["fox"], False),
    ],
)
def test_captions_that_name_the_target(caption, names, expected):
    assert mentions(caption, names) is expected


def test_unicode_names_and_aliases_with_regex_characters(pool):
    anchors = choose(
        "красный", pool.map(lambda row: {"caption": row["caption"]}), aliases=["(rose", "[leaf]*", "ch.rry"]
    )
    assert anchor_info(anchors)["concept"] == "красный" and anchor_info(anchors)["excluded"]["caption"] == 0


def test_captions_as_class_labels_and_lists():
    labels = Features({"image": ImageFeature(), "label": ClassLabel(names=["red flag", "sea"])})
    images = [picture(c) for c in REDNESS[:4]]
    anchors = choose("red", Dataset.from_dict({"image": images, "label": [0, 1, None, 1]}, features=labels))
    assert anchor_info(anchors)["excluded"]["caption"] == 1 and set(anchors["caption"]) == {"sea", None}
    lists = Features({"image": ImageFeature(), "captions": List(Value("string"))})
    texts = [["a thing", "all red"], ["sea"], [], ["leaf", "tree"]]
    anchors = choose("red", Dataset.from_dict({"image": images, "captions": texts}, features=lists))
    assert anchor_info(anchors)["excluded"]["caption"] == 1 and "leaf\ntree" in anchors["caption"]


def test_retrieval_by_captions():
    captions = ["pinkish thing", "green leaf", "pinkish sky", "blue", "red", ""]
    pool = make_pool(REDNESS[:6], caption=captions)
    encoder = ColourEncoder(reads="caption")
    anchors = choose("red", pool, encoder=encoder, k=2)
    # Two images of one caption's meaning are both kept: they are different images.
    assert sorted(anchors["pool_row"]) == [0, 2] and encoder.images == 0
    assert anchor_info(anchors)["excluded"] | {"near_duplicate": 0} == {
        "no_caption": 1, "caption": 1, "above_upper_threshold": 0, "below_threshold": 0, "near_duplicate": 0,
    }  # fmt: skip


# Cache


def test_second_call_embeds_nothing(pool, tmp_path):
    first, second = ColourEncoder(), ColourEncoder()
    one = choose("red", pool, encoder=first, cache_dir=tmp_path)
    two = choose("red", pool, encoder=second, cache_dir=tmp_path)
    assert first.images == 7 and second.images == 0
    assert one["score"][:] == two["score"][:] and one["pool_row"][:] == two["pool_row"][:]
    # Another question to the same pool uses the same embeddings.
    choose("blue", pool, encoder=second, cache_dir=tmp_path, k=1)
    assert second.images == 0 and len(list(tmp_path.iterdir())) == 1


def test_cache_follows_pool_encoder_and_switch(pool, tmp_path):
    choose("red", pool, cache_dir=tmp_path)
    for other_pool, encoder in (
        (pool.select(range(6)), ColourEncoder()),
        (pool, ColourEncoder(fingerprint="colour-2")),
    ):
        choose("red", other_pool, encoder=encoder, cache_dir=tmp_path)
        assert encoder.images == len(other_pool)
    encoder = ColourEncoder()
    choose("red", pool, encoder=encoder, cache_dir=False)
    assert encoder.images == 7 and len(list(tmp_path.iterdir())) == 3


def paths_pool(folder, colours):
    """A pool that holds paths alone: its fingerprint says nothing of what the files hold."""
    paths = []
    for number, colour in enumerate(colours):
        paths.append(str(folder / f"{number}.png"))
        Image.new("RGB", (4, 4), colour).save(paths[-1])
    return Dataset.from_dict({"image": paths}).cast_column("image", ImageFeature())


def chosen(pool, folder, embedded, **options):
    encoder = ColourEncoder()
    rows = choose(
        "red",
        pool,
        encoder=encoder,
        cache_dir=folder,
        k=1,
        duplicate_threshold=None,
        exclude_by_caption=False,
        **options,
    )["pool_row"][:]
    assert encoder.images == embedded
    return rows


def test_cache_follows_files_that_are_overwritten(tmp_path):
    (tmp_path / "files").mkdir()
    colours = ["red", "blue", "green", "black"]
    pool, cache = paths_pool(tmp_path / "files", colours), tmp_path / "cache"
    assert chosen(pool, cache, 4) == [0]
    path, other = tmp_path / "files" / "0.png", tmp_path / "files" / "1.png"
    times = path.stat()
    a, b = path.read_bytes(), other.read_bytes()
    path.write_bytes(b), other.write_bytes(a)
    for place in (path, other):  # Not even the time tells.
        os.utime(place, ns=(times.st_atime_ns, times.st_mtime_ns))
    again = paths_pool_of(pool)
    assert again._fingerprint == pool._fingerprint
    assert chosen(again, cache, 4) == [1]
    assert chosen(pool, cache, 0) == [1]  # The content is what counts.


def paths_pool_of(pool):
    return Dataset(pool.data, info=pool.info, fingerprint=pool._fingerprint)


def test_cache_follows_images_that_are_edited_in_memory(tmp_path):
    """Under the fingerprint of another pool, as a `map` gives whose function reads something outside of it."""
    pool = Dataset.from_dict({"image": [Image.new("RGB", (4, 4), c) for c in ("blue", "red", "green")]})
    edited = Dataset.from_dict({"image": [Image.new("RGB", (4, 4), c) for c in ("red", "blue", "green")]})
    edited = Dataset(edited.data, info=edited.info, fingerprint=pool._fingerprint)
    assert chosen(pool, tmp_path, 3) == [1] and chosen(edited, tmp_path, 3) == [0]
    assert chosen(edited, tmp_path, 0) == [0]


def test_only_the_shard_with_another_picture_is_embedded_again(tmp_path, monkeypatch):
    monkeypatch.setattr("space_peft.anchors.embeddings.SHARD_ROWS", 2)
    (tmp_path / "files").mkdir()
    pool, cache = paths_pool(tmp_path / "files", ["blue", "green", "black", "red", "white"]), tmp_path / "cache"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Nothing is damaged.
        assert chosen(pool, cache, 5) == [3]
        Image.new("RGB", (4, 4), "navy").save(tmp_path / "files" / "3.png")
        assert chosen(pool, cache, 2, upper_threshold=None)[0] != 3
    (tmp_path / "files" / "0.png").unlink()
    with pytest.raises(ValueError, match="row 0 of the pool does not decode"):
        chosen(pool, cache, 0)


def test_default_cache_is_in_the_hugging_face_cache(pool, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_CACHE_HOME", str(tmp_path))
    choose("red", pool, cache_dir=None)
    assert len(list((tmp_path / "space_peft").iterdir())) == 1


# Saving


def hub_folder(dataset, folder):
    """What `push_to_hub` uploads: Parquet shards and a card with `dataset_info`, built by the same functions."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "data").mkdir(parents=True)
    dataset.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    splits = SplitDict({"train": SplitInfo("train", num_bytes=1, num_examples=len(dataset))})
    card = DatasetCardData()
    info = DatasetInfo(features=dataset.features, splits=splits, download_size=1, dataset_size=1)
    DatasetInfosDict({"default": info}).to_dataset_card_data(card)
    files = {"data_files": [{"split": "train", "path": "data/train-*"}]}
    MetadataConfigs({"default": files}).to_dataset_card_data(card)
    DatasetCard(f"---\n{card}\n---\n").save(folder / "README.md")
    return str(folder)


def test_provenance_survives_disk_hub_and_transforms(pool, tmp_path):
    anchors = choose("red", pool, description='quoted "wörds": {x}\nand #more', aliases=["赤"])
    info = anchor_info(anchors)
    anchors.save_to_disk(tmp_path / "disk")
    loaded = {
        "disk": load_from_disk(tmp_path / "disk"),
        "hub": load_dataset(hub_folder(anchors, tmp_path / "hub"), split="train", cache_dir=str(tmp_path / "cache")),
        "select": anchors.select([1]),
        "map": anchors.map(lambda row: {"image": row["image"], "note": 1}),
        "column": anchors.add_column("weight", [1.0] * 3),
        "sort": anchors.sort("pool_row"),
        "concatenate": concatenate_datasets([anchors, anchors]),
    }
    for how, dataset in loaded.items():
        assert anchor_info(dataset) == info, how
        assert np.asarray(dataset[0]["image"]).shape == (5, 6, 3), how
    assert loaded["disk"]["score"][:] == anchors["score"][:]


def test_set_anchor_info_leaves_the_dataset_alone(pool):
    anchors = choose("red", pool)
    changed = set_anchor_info(anchors.select([2, 0]), {**anchor_info(anchors), "stage": "refined"})
    assert anchor_info(changed)["stage"] == "refined" and anchor_info(anchors)["stage"] == "selected"
    assert changed["pool_row"][:] == [anchors["pool_row"][2], anchors["pool_row"][0]]
    with pytest.raises(ValueError, match="column 'score'"):
        set_anchor_info(anchors.remove_columns("score"), {"concept": "red"})
    with pytest.raises(ValueError, match="key 'concept'"):
        set_anchor_info(anchors, {"stage": "x"})
    with pytest.raises(ValueError, match="JSON"):
        set_anchor_info(anchors, {"concept": "red", "p": float("nan")})
    with pytest.raises(ValueError, match="no anchor provenance"):
        anchor_info(pool)


# Random anchors


def test_random_anchors_have_the_same_form(pool):
    anchors = select_random_anchors("red", pool, k=3, seed=1, encoder=ColourEncoder(), progress=False)
    selected = choose("red", pool)
    assert anchors.column_names == selected.column_names and 1 not in anchors["pool_row"][:]
    info = anchor_info(anchors)
    assert info["method"] == "random" and info["seed"] == 1 and info["excluded"]["caption"] == 1
    scores = dict(zip(*(choose("red", pool, k=6, duplicate_threshold=None)[c] for c in ("pool_row", "score"))))
    np.testing.assert_allclose(anchors["score"][:], [scores[row] for row in anchors["pool_row"]], atol=1e-6)


def test_random_anchors_follow_the_seed(pool):
    rows = [select_random_anchors("red", pool, k=3, seed=seed)["pool_row"][:] for seed in (0, 0, 1, 2, 3)]
    assert rows[0] == rows[1] and len({tuple(r) for r in rows}) > 1
    assert np.isnan(select_random_anchors("red", pool, k=3)["score"][:]).all()
    with pytest.warns(UserWarning, match="6 can stand in"):
        assert len(select_random_anchors("red", pool, k=9)) == 6
    with pytest.raises(ValueError, match="0 can stand in"):
        select_random_anchors("red", pool.select([1]), k=1)


# The embedded model


@pytest.fixture(scope="module")
def demo():
    return load_demo_model()


@pytest.fixture(scope="module")
def demo_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("embeddings")


def test_demo_model_finds_siblings_and_beats_random(demo, demo_images, demo_cache):
    model, processor = demo
    kinds = dict(zip(demo_images["name"], demo_images["kind"]))
    concepts = sorted(kinds)[::6]
    settings = {"model": model, "processor": processor, "k": 16, "progress": False}
    siblings, random_siblings, scores, random_scores = [], [], [], []
    for concept in concepts:
        anchors = select_anchors(concept, demo_images, cache_dir=demo_cache, **settings)
        control = select_random_anchors(concept, demo_images, k=16)
        assert concept not in anchors["caption"][:] and len(anchors) == 16
        for dataset, share in ((anchors, siblings), (control, random_siblings)):
            share.append(np.mean([kinds[name] == kinds[concept] for name in dataset["caption"]]))
        scores.append(np.mean(anchors["score"]))
    control = select_random_anchors(concepts[0], demo_images, **settings)
    random_scores = np.mean(control["score"])
    assert np.mean(siblings) > 3 * np.mean(random_siblings), (np.mean(siblings), np.mean(random_siblings))
    assert np.mean(scores) > random_scores + 0.15


def test_demo_model_would_find_the_target_itself(demo, demo_images, demo_cache):
    """The text embedding is that of the concept: without the exclusion its own images come first."""
    model, processor = demo
    settings = {
        "model": model,
        "processor": processor,
        "k": 4,
        "diversity": 0.0,
        "progress": False,
        "cache_dir": demo_cache,
    }
    hits = []
    for concept in sorted(set(demo_images["name"]))[::12]:
        anchors = select_anchors(concept, demo_images, exclude_by_caption=False, **settings)
        hits.append(np.mean([caption == concept for caption in anchors["caption"]]))
    assert np.mean(hits) > 0.4, hits  # by chance 0.008


def test_demo_anchors_are_json_and_self_contained(demo, demo_images, demo_cache, tmp_path):
    model, processor = demo
    anchors = select_anchors(
        "fox", demo_images, model=model, processor=processor, k=4, cache_dir=demo_cache, progress=False
    )
    anchors.save_to_disk(tmp_path / "anchors")
    again = load_from_disk(tmp_path / "anchors")
    assert json.loads(json.dumps(anchor_info(again))) == anchor_info(anchors)
    assert anchor_info(again)["encoder_fingerprint"] == OwnSpaceEncoder(model, processor).fingerprint
    assert [np.asarray(image).tolist() for image in again["image"]] == [
        np.asarray(demo_images[row]["image"]).tolist() for row in anchors["pool_row"]
    ]
