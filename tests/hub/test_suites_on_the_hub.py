"""Each suite from a dataset on the Hub, of the official layout, through stock `datasets`."""

import json

import pytest
from huggingface_hub import CommitOperationAdd, create_commit, create_repo
from suite_files import (
    clear_tables,
    fiubench_files,
    mllmu_tables,
    picture,
    unbench_row,
    with_pictures,
    write_people,
)

from space_peft.suites import load_suite
from space_peft.suites.answers import Prompt


def push_files(repo, files):
    create_repo(repo, repo_type="dataset")
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return create_commit(repo, operations, commit_message="Add", repo_type="dataset").oid


def push_configs(repo, tables):
    for config, table in tables.items():
        table.push_to_hub(repo, config_name=config, split="train")


def first_picture(suite, split):
    return Prompt("", suite.split(split)[0].images[0]).opened()


def test_mllmu(hub):
    push_configs("user/MLLMU-Bench", mllmu_tables())
    suite = load_suite("mllmu", "user/MLLMU-Bench", split="forget_5")
    assert {split: len(subjects) for split, subjects in suite.subjects.items()} == {
        "forget": 2, "test": 2, "retain": 3, "real": 1,
    }  # fmt: skip
    assert first_picture(suite, "test").size == (16, 16)
    with pytest.raises(ValueError, match="forget_10"):
        load_suite("mllmu", "user/MLLMU-Bench", split="forget_10")


def test_clear(hub):
    push_configs("user/CLEAR", clear_tables())
    suite = load_suite("clear", "user/CLEAR", split="forget05")
    assert {split: len(subjects) for split, subjects in suite.subjects.items()} == {"forget": 3, "retain": 1, "real": 3}
    assert first_picture(suite, "real").size == (16, 16)


def test_fiubench(hub):
    commit = push_files("user/FIUBench", fiubench_files())
    suite = load_suite("fiubench", "user/FIUBench", split="forget10", revision=commit)
    assert [s.id for s in suite.split("forget")] == ["00000002", "00000003"]
    assert first_picture(suite, "forget").size == (16, 16)


def test_vlm_unbench(hub):
    rows = [{**unbench_row(n, "fox", "all"), "image": {"bytes": picture("red"), "path": None}} for n in range(2)]
    push_configs(
        "user/unbench", {name: with_pictures(rows) for name in ("train_forget", "test_forget", "test_retain")[:2]}
    )
    suite = load_suite("vlm_unbench", "user/unbench")
    assert {split: len(subjects[0].questions) for split, subjects in suite.subjects.items()} == {"forget": 2, "test": 2}


def test_people(hub, tmp_path):
    lines = [json.loads(line) for line in write_people(tmp_path).read_text().splitlines()]
    for line in lines:
        line["images"] = [{"bytes": (tmp_path / name).read_bytes(), "path": None} for name in line.get("images", [])]
        line.setdefault("aliases", None)
    with_pictures(lines).push_to_hub("user/people")
    suite = load_suite("own", "user/people")
    assert suite.subjects == load_suite("own", tmp_path / "people.jsonl").subjects
    assert suite.name == "user/people" and first_picture(suite, "real").size == (16, 16)
