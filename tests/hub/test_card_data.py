"""What the trainer writes down for the card: kept exactly, refused where it could not stand on a public page."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from card_folders import card_data

from space_peft.records.card_data import DatasetRecord, ErasureCardData, is_local_path
from space_peft.records.licenses import LICENSES, check_license


def test_round_trip(tmp_path):
    data = card_data("Fuchs – 狐")
    path = data.save(tmp_path)
    assert path == tmp_path / "space_card.json"
    assert ErasureCardData.load(tmp_path) == data == ErasureCardData.load(path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"license": "apache"}, "apache-2.0"),
        ({"license": "other"}, "license_name"),
        ({"license_name": "mine"}, "license_name"),
        ({"language": "English"}, "ISO 639"),
        ({"base_model": "/models/base"}, "on the Hub"),
        ({"base_revision": 'x", trust_remote_code=True'}, "commit"),
        ({"created": "31.01.2026"}, "2026-01-31"),
        ({"aliases": "fox"}, "list of texts"),
        ({"redact": "yes"}, "True or False"),
        ({"seed": 1.5}, "whole number"),
        ({"seconds": {"erase": "49"}}, "number"),
        ({"settings": {"SpaceConfig": 3}}, "dict of settings"),
        ({"settings": {"SpaceConfig": {"x": float("nan")}}}, "JSON"),
        ({"concept": "half \ud800"}, "JSON"),
        ({"paper": {"title": "x"}}, "keys"),
        ({"paper": {"title": "x", "id": "javascript:1"}}, "arXiv"),
        ({"redaction": {"hash": "00", "salt": "00"}}, "keys"),
        ({"datasets": ["org/pool"]}, "DatasetRecord"),
        ({"datasets": [DatasetRecord("training")]}, "pool"),
        ({"datasets": [DatasetRecord("pool", id="https://x.org/pool")]}, "on the Hub"),
        ({"datasets": [DatasetRecord("pool", rows=-1)]}, "rows"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        card_data(**changes)


def test_values_changed_later_are_checked_when_saved(tmp_path):
    data = card_data()
    data.language = "English"
    with pytest.raises(ValueError, match="language"):
        data.save(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["/home/me/pool", "~/pool", "C:\\pool", "\\\\server\\pool", "file:///pool"])
def test_local_paths_are_not_saved(tmp_path, path):
    for data in (card_data(contact=path), card_data(settings={"SpaceConfig": {"extra": [{"x": path}]}})):
        with pytest.raises(ValueError, match="contact|extra"):
            data.save(tmp_path)
    assert is_local_path(path) and is_local_path(Path(path)) and not is_local_path("org/pool")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "JSON"),
        (b"[]", "object"),
        (b"{}", "format"),
        (b'{"format": "space_peft.card_data.v1", "concpet": "fox"}', "concpet"),
        (b'{"format": "space_peft.card_data.v1", "datasets": [{"role": "pool", "url": "x"}]}', "url"),
        (b'{"format": "space_peft.card_data.v1", "datasets": [{"id": "org/pool"}]}', "role"),
        (b'{"format": "space_peft.card_data.v1", "datasets": "org/pool"}', "list"),
        (b'{"format": "space_peft.card_data.v1", "license": "GPL"}', "gpl"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, content, message):
    (tmp_path / "space_card.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        ErasureCardData.load(tmp_path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        ErasureCardData.load(tmp_path)


@dataclass
class Options:
    output_dir: str = "out"
    steps: int = 10
    rate: float = 0.1
    modules: set = field(default_factory=set)
    cache: str | None = None
    hook: object = None
    debug: object = ""


def test_only_settings_that_differ_and_may_be_published_are_recorded():
    data = card_data(settings={})
    used = Options("elsewhere", 20, 0.1, {"v_proj", "q_proj"}, "/home/me/cache", print, [])
    data.add_settings("Options", used, Options())
    assert data.settings == {"Options": {"steps": 20, "modules": ["q_proj", "v_proj"]}}
    data.add_settings("Options", Options(steps=0, debug="x"), Options())
    assert data.settings == {"Options": {"steps": 0, "debug": "x"}}


def test_every_licence_passes_and_other_needs_name_and_link():
    for license in LICENSES - {"other"}:
        check_license(license)
    check_license("other", "house licence", "LICENSE")
    for arguments in [("other", "house"), ("mit", "house", "LICENSE"), (None, "house", None)]:
        with pytest.raises(ValueError, match="'other' needs both"):
            check_license(*arguments)
