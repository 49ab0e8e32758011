"""The fictitious people: who they are is a matter of the seed, looks that stay stay, and the archive holds just these."""

import random
from collections import Counter
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

import pytest
from example_modules import example_modules

from space_peft.suites.people import ARCHIVE, read_people


ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "examples" / "people_model"


@pytest.fixture(scope="module")
def scripts():
    """The modules the people are drawn with."""
    with example_modules(SCRIPTS) as load:
        yield {name: load(name) for name in ("names", "parts", "people")}


@pytest.fixture(scope="module")
def drawn(scripts):
    return scripts["people"].draw_people()


def test_the_archive_holds_the_people_of_the_seed(drawn):
    stored = [
        {**person, "pictures": [{k: v for k, v in p.items() if k not in ("image", "part")} for p in person["pictures"]]}
        for person in read_people()
    ]
    assert stored == [
        {**asdict(person), "pictures": [asdict(picture.view) for picture in person.pictures]} for person in drawn
    ]
    assert [p["part"] for p in read_people()[0]["pictures"]] == [p.part for p in drawn[0].pictures]


def test_another_seed_gives_other_people(scripts, drawn):
    others = scripts["people"].draw_people(seed=1)
    assert len(others) == len(drawn) and [p.looks for p in others] != [p.looks for p in drawn]
    assert [p.name for p in others] != [p.name for p in drawn]


def test_how_many(drawn):
    assert Counter(p.group for p in drawn) == {"private": 120, "public": 20, "stranger": 20}
    assert len({p.id for p in drawn}) == len(drawn) == len({p.name for p in drawn})
    assert Counter(p.forget for p in drawn if p.forget) == {"5": 6, "10": 6, "15": 6}
    assert {p.group for p in drawn if p.forget or p.twin} == {"private"}
    for person in drawn:
        assert Counter(picture.part for picture in person.pictures) == {"train": 8, "test": 2, "unseen": 2}


def test_only_twins_look_alike_and_they_differ_in_one_feature(scripts, drawn):
    strong = scripts["people"].STRONG
    twins = 0
    for one, other in combinations(drawn, 2):
        differ = one.looks.differs_in(other.looks)
        if one.twin == other.id:
            assert other.twin == one.id and len(differ) == 1 and differ[0] in strong
            twins += 1
        else:
            # A second head alone would do; of the same head people differ in two things that can be seen.
            assert len(differ) >= 2, (one.name, other.name)
            assert "head" in differ or len(set(differ) & set(strong)) >= 2, (one.name, other.name)
    assert twins == 12
    features = Counter(
        one.looks.differs_in(other.looks)[0] for one, other in combinations(drawn, 2) if one.twin == other.id
    )
    assert features == {feature: 3 for feature in strong}


def test_requests_name_people_whose_twins_stay(drawn):
    named = {p.id for p in drawn if p.forget}
    with_twin = [p for p in drawn if p.forget and p.twin]
    assert len(with_twin) == 6 and not any(p.twin in named for p in with_twin)
    assert sum(p.forget == "5" for p in with_twin) == 2


def test_what_changes_changes_and_what_is_unseen_is_not_trained_on(scripts, drawn):
    parts = scripts["parts"]
    for person in drawn:
        for one, other in combinations(person.pictures, 2):
            assert one.view != other.view
        for name in ("expression", "clothes", "background", "angle"):
            assert len({getattr(p.view, name) for p in person.pictures}) >= 3, (person.name, name)
        for picture in person.pictures:
            new = (picture.view.glasses in parts.UNSEEN_GLASSES) + (picture.view.shade in parts.UNSEEN_SHADES)
            assert new == (picture.part == "unseen")
        unseen = [p.view for p in person.pictures if p.part == "unseen"]
        assert unseen[0].glasses in parts.UNSEEN_GLASSES and unseen[1].shade in parts.UNSEEN_SHADES


def test_names(scripts, drawn):
    names = scripts["names"]
    place_of = {
        part: place for table in (names.FIRST, names.LAST) for place, known in table.items() for part in known.split()
    }
    uses = Counter()
    for person in drawn:
        first, last = person.name.split(" ", 1)
        uses.update([first, last])
        assert place_of[first] != place_of[last] and not names.known(person.name)
    assert max(uses.values()) == 2 and len({place_of[name.split()[0]] for name in (p.name for p in drawn)}) >= 12
    # The check finds what it is for.
    assert names.known("Kofi Annan") and names.known("Linh Einstein") and names.known("Marie Sklodowska-Curie")
    assert not names.known("Linh Einsteinova")
    # A list too short is an error, and so is nobody left.
    with pytest.raises(ValueError, match="add some"):
        names.draw_names(10_000, random.Random(0))


def test_facts_are_spread_evenly(drawn):
    for fact in ("town", "profession", "hobby"):
        counts = Counter(getattr(person, fact) for person in drawn)
        assert len(counts) == 20 and set(counts.values()) == {8}
    assert len({(p.town, p.profession, p.hobby) for p in drawn}) == len(drawn)


def test_the_archive_is_small_and_its_licence_named():
    assert ARCHIVE.stat().st_size <= 3e6
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    assert "dicebear-styles 10.6.0" in notice and "Open Peeps" in notice and "CC0 1.0" in notice


def test_pictures_are_drawn_as_they_are_stored(scripts):
    pytest.importorskip("resvg_py")
    pytest.importorskip("dicebear_styles")
    import io

    import numpy as np
    from looks import Identity, View
    from PIL import Image
    from portrait import portrait

    looks, views = [], {}
    for person in (read_people()[0], read_people()[50]):
        identity = Identity(**person["looks"])
        for picture in person["pictures"][::5]:
            view = View(**{k: v for k, v in picture.items() if k not in ("image", "part")})
            again = np.asarray(portrait(identity, view), dtype=float)
            stored = np.asarray(Image.open(io.BytesIO(picture["image"]["bytes"])).convert("RGB"), dtype=float)
            # The stored one has a palette.
            assert stored.shape == (64, 64, 3) and np.sqrt(((again - stored) ** 2).mean()) < 8
            views[view] = again
        looks.append(identity)
    # The control: somebody else under the same view is another picture.
    view = next(iter(views))
    assert np.sqrt(((np.asarray(portrait(looks[1], view), dtype=float) - views[view]) ** 2).mean()) > 20


def test_a_pool_shows_nobody_of_the_suite(scripts, drawn, tmp_path, monkeypatch):
    pytest.importorskip("resvg_py")
    pytest.importorskip("dicebear_styles")
    import archive
    from datasets import load_dataset

    looks, portrait = [], archive.portrait

    def small(who, view):
        looks.append(who)
        return portrait(who, view, 8)

    monkeypatch.setattr(archive, "portrait", small)
    monkeypatch.setattr(archive, "draw_people", lambda seed: [*drawn[:2], *scripts["people"].draw_people(seed)[:6]])
    count = archive.write_pool(drawn, tmp_path / "pool.parquet", seeds=1)
    known = {person.looks for person in drawn}
    assert count == len(looks) == 6 and not known & set(looks)
    pool = load_dataset("parquet", data_files=str(tmp_path / "pool.parquet"), split="train", cache_dir=str(tmp_path))
    assert pool.column_names == ["image"] and len(pool) == count and pool[0]["image"].size == (8, 8)
