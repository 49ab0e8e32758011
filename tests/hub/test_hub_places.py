"""Whether the Hub has what is not here: asked once, and told apart from a Hub that does not answer."""

import pytest

from space_peft.records.places import check_place


@pytest.fixture
def asked(hub):
    hub.create("user/adapter")
    hub.create("user/rows", "dataset")
    return hub


def test_what_is_there_passes_and_what_is_not_is_said_after_one_question(asked):
    check_place("user/adapter")
    check_place("user/rows:validation", "dataset")
    asked.requests.clear()
    with pytest.raises(FileNotFoundError, match="'user/adaptr' here, and no model of that id on the Hub"):
        check_place("user/adaptr")
    with pytest.raises(FileNotFoundError, match="no dataset of that id"):
        check_place("user/adapter", "dataset")
    assert len(asked.requests) == 2


def test_a_hub_that_does_not_answer_is_not_blamed_on_the_name(asked, monkeypatch, waits):
    asked.faults.add("info", status=500)
    check_place("user/adapter")  # Whoever loads it tries again.
    asked.faults.clear()
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="'user/adapter' here, and the Hub cannot be asked"):
        check_place("user/adapter")
    assert not waits, "once is enough"


def test_what_is_in_the_cache_is_not_asked_for(asked, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--user--old").mkdir()
    asked.requests.clear()
    check_place("user/old")
    assert not asked.requests
