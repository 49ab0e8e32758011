"""Every fault of the local Hub does what it says, and huggingface_hub meets it as it would meet a real one."""

import importlib
import os
import time
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    constants,
    create_commit,
    create_repo,
    hf_hub_download,
    model_info,
    snapshot_download,
    upload_folder,
    whoami,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from packaging.version import Version
from samples import REPO, contents


# What huggingface_hub speaks HTTP with: httpx2, and httpx in older versions.
httpx = importlib.import_module(HTTPError.__module__.partition(".")[0])
goes_on = pytest.mark.skipif(
    Version(huggingface_hub.__version__) < Version("1.21"), reason="huggingface_hub goes on after a cut from 1.21 on"
)


@pytest.fixture
def folder(folder):
    """With one large file: several go up at the same time, and which one a fault strikes would be chance."""
    (folder / "pictures" / "before & after.png").unlink()
    return folder


@pytest.fixture
def repository(hub):
    create_repo(REPO)
    return hub.repository(REPO)


def no_partial_files(cache):
    return not [path for path in cache.rglob("*.incomplete")]


# Which requests are struck


def test_faults_strike_by_count(hub):
    hub.faults.add("whoami", status=503, after=1, times=2)
    outcomes = []
    for _ in range(5):
        try:
            outcomes.append(whoami()["name"])
        except HfHubHTTPError as error:
            outcomes.append(error.response.status_code)
    assert outcomes == ["user", 503, 503, "user", "user"]
    assert [request.status for request in hub.requests] == [200, 503, 503, 200, 200]


def test_faults_strike_one_route_one_method_or_everything(hub, pushed):
    fault = hub.faults.add("resolve", method="GET", status=500, times=None)
    assert whoami() and hf_hub_download(REPO, "adapter_model.safetensors")  # HEAD here, GET at storage
    with pytest.raises(HfHubHTTPError, match="500"):
        hf_hub_download(REPO, "README.md")
    assert fault.struck == 1
    hub.faults.clear()
    assert hf_hub_download(REPO, "README.md")
    hub.faults.add("*", status=500, times=None)
    for request in (whoami, lambda: model_info(REPO)):
        with pytest.raises(HfHubHTTPError, match="500"):
            request()


def test_faults_queue_up(hub):
    hub.faults.add("whoami", status=500)
    hub.faults.add("whoami", status=502)
    for status in (500, 502):
        with pytest.raises(HfHubHTTPError) as error:
            whoami()
        assert error.value.response.status_code == status
    assert whoami()


# Errors


@pytest.mark.parametrize(
    "route", ["create_repo", "validate_yaml", "preupload", "lfs_batch", "upload", "lfs_verify", "commit"]
)
def test_an_error_at_any_step_leaves_the_remote_unchanged_or_complete(hub, folder, repository, waits, route):
    """huggingface_hub retries some steps itself, and leaves others to its caller: who relies on it can read it here."""
    retried = {"preupload", "lfs_batch", "upload", "lfs_verify"}
    before = contents(folder)

    def push():
        create_repo(REPO, exist_ok=True)
        upload_folder(repo_id=REPO, folder_path=folder)

    hub.faults.add(route, status=500)
    if route in retried:
        push()
        assert hub.files(REPO) == before and waits == [1]
    else:
        with pytest.raises(HfHubHTTPError):
            push()
        assert hub.files(REPO) == {} and len(repository.history()) == 1
        push()
        assert hub.files(REPO) == before
    assert len(repository.history()) == 2 and contents(folder) == before


def test_an_error_that_stays_ends_the_retries(hub, folder, repository, waits):
    fault = hub.faults.add("upload", status=500, times=None)
    with pytest.raises(RuntimeError, match="Error while uploading 'adapter_model.safetensors'"):
        upload_folder(repo_id=REPO, folder_path=folder)
    assert fault.struck == 6 and waits == [1, 2, 4, 8, 8]
    assert hub.files(REPO) == {} and not hub.stored


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (401, "RepoNotFound", RepositoryNotFoundError),
        (403, "GatedRepo", GatedRepoError),
        (404, "RevisionNotFound", RevisionNotFoundError),
        (409, None, HfHubHTTPError),
        (412, None, HfHubHTTPError),
    ],
)
def test_an_error_has_the_status_and_code_that_is_asked_for(hub, pushed, status, code, error):
    hub.faults.add("commit", status=status, code=code, message="Not today", headers={"Retry-After": "7"})
    with pytest.raises(error, match="Not today") as raised:
        create_commit(REPO, [CommitOperationAdd("a.txt", b"")], commit_message="Add")
    assert raised.value.response.status_code == status and raised.value.response.headers["retry-after"] == "7"
    assert hub.head(REPO) == pushed


# Connections


@goes_on
def test_an_upload_cut_off_is_sent_again(hub, folder, repository, waits):
    hub.faults.add("upload", cut_request_after=100_000, times=2)
    upload_folder(repo_id=REPO, folder_path=folder)
    assert [request.status for request in hub.requests_to("upload")] == [None, None, 200] and waits == [1, 2]
    assert hub.files(REPO) == contents(folder)


def test_a_commit_cut_off_is_not_made(hub, folder, repository):
    hub.faults.add("commit", cut_request_after=20)
    with pytest.raises((httpx.NetworkError, httpx.RemoteProtocolError)):
        upload_folder(repo_id=REPO, folder_path=folder)
    assert hub.files(REPO) == {} and len(repository.history()) == 1


def test_a_commit_whose_reply_is_lost_is_made(hub, folder, repository):
    hub.faults.add("commit", lose_reply=True)
    with pytest.raises(httpx.RemoteProtocolError):
        upload_folder(repo_id=REPO, folder_path=folder)
    assert hub.files(REPO) == contents(folder) and len(repository.history()) == 2
    # Sent again, it changes nothing and makes no second commit.
    upload_folder(repo_id=REPO, folder_path=folder)
    assert len(repository.history()) == 2


def test_somebody_commits_in_between(hub, folder, pushed):
    hub.faults.add("commit", before=lambda: hub.commit(REPO, {"README.md": b"theirs"}))
    with pytest.raises(HfHubHTTPError) as error:
        create_commit(REPO, [CommitOperationAdd("a.txt", b"")], commit_message="Add", parent_commit=pushed)
    assert error.value.response.status_code == 412
    assert hub.files(REPO)["README.md"] == b"theirs" and "a.txt" not in hub.files(REPO)


# Downloads


@goes_on
@pytest.mark.parametrize(("name", "route"), [("README.md", "resolve"), ("adapter_model.safetensors", "download")])
def test_a_truncated_download_is_fetched_again(hub, folder, pushed, waits, name, route):
    hub.faults.add(route, method="GET", cut_reply_after=10)
    assert Path(hf_hub_download(REPO, name)).read_bytes() == (folder / name).read_bytes()
    assert len(hub.requests_to(route, method="GET")) == 2 and waits == [1]


@goes_on
def test_a_truncated_download_goes_on_where_whole_chunks_ended(hub, folder, pushed, waits, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 65_536)
    hub.faults.add("download", cut_reply_after=150_000)
    path = Path(hf_hub_download(REPO, "adapter_model.safetensors"))
    assert path.read_bytes() == (folder / "adapter_model.safetensors").read_bytes()
    first, second = hub.requests_to("download")
    assert "range" not in first.headers and second.headers["range"] == "bytes=131072-" and second.status == 206


@goes_on
def test_a_download_that_never_arrives_leaves_nothing_in_the_cache(hub, pushed, waits, tmp_path):
    hub.faults.add("download", cut_reply_after=0, times=None)
    with pytest.raises(httpx.RemoteProtocolError):
        hf_hub_download(REPO, "adapter_model.safetensors", cache_dir=tmp_path / "cache")
    assert len(waits) == 5 and no_partial_files(tmp_path / "cache")
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(REPO, "adapter_model.safetensors", cache_dir=tmp_path / "cache", local_files_only=True)
    hub.faults.clear()
    assert os.path.getsize(hf_hub_download(REPO, "adapter_model.safetensors", cache_dir=tmp_path / "cache")) == 400_000


def test_a_snapshot_falls_back_to_the_cache(hub, pushed):
    cached = snapshot_download(REPO)
    hub.faults.add("info", status=500, times=None)
    assert snapshot_download(REPO) == cached


def test_a_slow_download_takes_its_time_and_arrives(hub, folder, pushed):
    hub.faults.add("download", bytes_per_second=1_000_000)
    start = time.monotonic()
    path = Path(hf_hub_download(REPO, "adapter_model.safetensors"))
    assert time.monotonic() - start > 0.35  # 400 kB
    assert path.read_bytes() == (folder / "adapter_model.safetensors").read_bytes()


def test_an_answer_too_late_is_no_answer(hub, pushed):
    hub.faults.add("info", delay=0.6)
    with pytest.raises(httpx.ReadTimeout):
        model_info(REPO, timeout=0.2)
    start = time.monotonic()
    hub.faults.add("info", delay=0.3)
    assert model_info(REPO, timeout=5).sha == pushed
    assert time.monotonic() - start >= 0.3
