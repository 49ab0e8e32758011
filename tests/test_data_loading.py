"""One loader for pools, retained rows and pictures to test with: what it takes, and what it says of everything else."""

import json
import pickle

import datasets
import pytest
from datasets import Dataset, DatasetDict
from PIL import Image

from space_peft.anchors.pool import open_pool
from space_peft.cli import main
from space_peft.cli.pictures import load_images, load_pictures
from space_peft.data.loading import load_rows
from space_peft.modeling.prompts import answer_text
from space_peft.records.places import check_place
from space_peft.retained.reading import RetainedRows


COLOURS = ("red", "lime", "blue")
LINES = [{"image": f"pictures/{name}.png", "prompt": "what is this?", "completion": name} for name in COLOURS]
ALONE = {"prompt": "what is the capital of France?", "completion": "Paris."}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Pictures in a folder of their own, and the current folder another one."""
    (tmp_path / "pictures").mkdir()
    for name in COLOURS:
        Image.new("RGB", (4, 4), name).save(tmp_path / "pictures" / f"{name}.png")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def write(path, rows):
    """Rows as a file of the kind that the path's suffix says."""
    rows = Dataset.from_list(rows)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows.to_list()))
    else:
        {".jsonl": rows.to_json, ".parquet": rows.to_parquet, ".csv": rows.to_csv}[path.suffix](path)
    return str(path)


def check_retained(rows, alone=True):
    """The rows of `LINES`, and maybe the one in words alone."""
    retained = RetainedRows(rows)
    assert sorted(answer_text(row) for row in retained) == sorted([*COLOURS, *(["Paris."] if alone else [])])
    assert sum(retained.has_image()) == 3
    for row in retained:
        for picture in row["images"]:
            assert picture.getpixel((0, 0)) == Image.new("RGB", (1, 1), answer_text(row)).getpixel((0, 0))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_paths_in_a_file_are_pictures_wherever_the_command_is_started(folder, suffix):
    rows = load_rows(write(folder / f"rows{suffix}", [*LINES, ALONE]))
    assert isinstance(rows.features["image"], datasets.Image)
    check_retained(rows)
    # The same file is a pool, and pictures to test with.
    assert len(open_pool(load_pictures(str(folder / f"rows{suffix}")))) == 4
    write(folder / f"pictures{suffix}", LINES)
    assert [image.size for image in load_images(str(folder / f"pictures{suffix}"))] == [(4, 4)] * 3


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_lists_of_paths_are_lists_of_pictures(folder, suffix):
    lines = [{**{k: v for k, v in row.items() if k != "image"}, "images": [row["image"]]} for row in LINES]
    rows = load_rows(write(folder / f"rows{suffix}", [*lines, {**ALONE, "images": []}]))
    assert rows.features["images"] == datasets.List(datasets.Image())
    check_retained(rows)


def test_the_bytes_of_files_are_pictures_as_well(folder):
    content = (folder / "pictures" / "red.png").read_bytes()
    for name, value in (("bytes", content), ("struct", {"bytes": content, "path": None})):
        Dataset.from_dict({"image": [value]}).to_parquet(folder / f"{name}.parquet")
        assert load_images(str(folder / f"{name}.parquet"))[0].getpixel((0, 0)) == (255, 0, 0)


def test_a_path_from_where_the_command_is_started_will_do(folder, monkeypatch):
    (folder / "files").mkdir()
    place = write(folder / "files" / "rows.jsonl", LINES)
    with pytest.raises(
        ValueError, match="row 0: there is no picture 'pictures/red.png' in '.*files'; expected a path rela"
    ):
        load_rows(place)
    monkeypatch.chdir(folder)
    check_retained(load_rows(place), alone=False)


def test_addresses_are_refused(folder):
    place = write(folder / "rows.jsonl", [{**LINES[0], "image": "https://example.org/red.png"}])
    with pytest.raises(
        ValueError, match="row 0: the picture is the URL 'https://example.org/red.png', and nothing is down"
    ):
        load_rows(place)


def test_a_folder_of_pictures(folder):
    rows = load_rows(str(folder / "pictures"))
    assert rows.column_names == ["image"] and len(rows) == 3
    assert len(open_pool(load_pictures(str(folder / "pictures")))) == 3


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_folder_of_pictures_with_metadata(folder, name):
    if name.endswith(".csv") and datasets.__version__.startswith("4.0."):
        pytest.skip("imagefolder of datasets 4.0 does not take the texts that pandas 3 reads for texts")
    lines = [{"file_name": row["image"].partition("/")[2], **row} for row in LINES]
    for line in lines:
        del line["image"]
    write(folder / "pictures" / name, lines)
    rows = load_rows(str(folder / "pictures"))
    assert set(rows.column_names) == {"image", "prompt", "completion"}
    check_retained(rows, alone=False)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_a_folder_of_files_is_all_of_them(folder, suffix):
    (folder / "files" / "more").mkdir(parents=True)
    lines = [{**row, "image": str(folder / row["image"])} for row in LINES]
    write(folder / "files" / f"train{suffix}", lines[:2])
    write(folder / "files" / "more" / f"test{suffix}", lines[2:])
    (folder / "files" / "README.md").write_text("# Rows\n")
    check_retained(load_rows(str(folder / "files")), alone=False)
    assert len(load_images(str(folder / "files"))) == 3


def test_saved_datasets(folder):
    rows = Dataset.from_list([ALONE])
    rows.save_to_disk(folder / "saved")
    DatasetDict({"train": rows, "test": rows}).save_to_disk(folder / "splits")
    DatasetDict({"test": rows}).save_to_disk(folder / "test alone")
    for name in ("saved", "splits", "splits/test", "test alone/test"):
        assert load_rows(str(folder / name)).to_list() == [ALONE]
    with pytest.raises(ValueError, match=r"holds the splits \['test'\], and no 'train'; give .*test alone/test"):
        load_rows(str(folder / "test alone"))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {},
            r"holds no picture, and no data files of one kind \(found: nothing\); expected a folder of pictures, a saved",
        ),
        ({"a.txt": "", "b.txt": "", "c": ""}, r"\(found: 2 .txt, 1 without suffix\)"),
        ({"a.csv": "a\n1\n", "b.jsonl": '{"a": 1}\n'}, r"no data files of one kind \(found: 1 .csv, 1 .jsonl\)"),
        ({".hidden.csv": "a\n1\n"}, r"\(found: nothing\)"),
        ({"bad.jsonl": '{"a": 1}\nno json\n'}, "cannot be read as json: .*JSON parse error"),
        ({"empty.jsonl": ""}, "cannot be read as json: it is empty"),
    ],
)
def test_what_a_folder_holds_is_said(tmp_path, files, said):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        load_rows(str(tmp_path))
    if len(files) == 1 and (name := next(iter(files))).endswith(".jsonl"):
        with pytest.raises(ValueError, match=said):
            load_rows(str(tmp_path / name))


def test_rows_beside_pictures_are_not_passed_over(folder):
    write(folder / "rows.jsonl", LINES)
    with pytest.raises(
        ValueError, match="holds 3 pictures, and rows.jsonl, which would not be read. Give that file itself"
    ):
        load_rows(str(folder))


def test_a_file_of_another_kind_is_refused_before_anything_is_imported_or_asked(tmp_path, capsys):
    place = tmp_path / "rows.tsv"
    place.write_text("a\tb\n")
    for read in (load_rows, lambda place: check_place(place, "dataset")):
        with pytest.raises(
            ValueError, match=r"no rows are read from the file .*rows.tsv'; expected .*\.parquet, \.json, \.jso"
        ):
            read(str(place))
    assert main(["erase", "--model", "demo", "--concept", "fox", "--pool", ".", "--retain", str(place)]) == 2
    assert "space-peft erase: retain: no rows are read from the file" in capsys.readouterr().err
    check_place(str(place), "folder")


def test_a_column_without_pictures_is_refused_in_words_of_the_command_line(folder):
    write(folder / "rows.jsonl", [{"image": 1}])
    with pytest.raises(
        ValueError, match="the column `image` of .* holds Value.*; expected pictures, or the paths of files"
    ):
        load_pictures(str(folder / "rows.jsonl"))
    write(folder / "rows.jsonl", [{"picture": "red.png"}])
    with pytest.raises(ValueError, match=r"has the columns \['picture'\]; expected a column `image`"):
        load_pictures(str(folder / "rows.jsonl"))


def test_the_same_file_has_the_same_fingerprint(folder):
    place = write(folder / "rows.jsonl", LINES)
    first, again = load_rows(place), load_rows(place)
    assert first._fingerprint == again._fingerprint and len(pickle.loads(pickle.dumps(first))) == 3
