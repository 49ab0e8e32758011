"""Pushing while the Hub fails: the repository is as it was or complete, the folder untouched, one push one commit."""

import contextlib
import hashlib
import logging
import shutil
import types
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from space_peft.hub_cards import commit as commit_module
from space_peft.hub_cards import push_erasure


REPO = "user/demo-erasure"
BASE = "space-peft/demo-llava"
FORMER = {"space_manifest.json": b'{"files": {"old.json": {}}}', "old.json": b"{}", "README.md": b"# Before\n"}


@pytest.fixture(scope="module")
def folder(erasure_folder, tmp_path_factory):
    """The trained erasure with one LFS and a few small files: what is slow is not what is tested here."""
    copy = tmp_path_factory.mktemp("push") / "run"
    copy.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json", "space_config.json", "space_card.json"):
        shutil.copy(erasure_folder / name, copy / name)
    return copy


@pytest.fixture(autouse=True)
def own_waits(waits, monkeypatch):
    """Seconds our own retries would have waited; those of huggingface_hub are in `waits`."""
    seconds = []
    impatient = types.SimpleNamespace(**vars(commit_module.time) | {"sleep": seconds.append})
    monkeypatch.setattr(commit_module, "time", impatient)
    return seconds


@pytest.fixture
def former(hub):
    """A repository that holds a former push."""
    hub.create(REPO)
    hub.commit(REPO, {**FORMER, "theirs.md": b"x"}, title="former")
    return hub.files(REPO)


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


def push(folder, **options):
    return push_erasure(folder, REPO, **{"base_model": BASE, "commit_message": "pushed", **options})


def titles(hub, revision="main"):
    return [commit.title for commit in hub.repository(REPO).history(revision)]


@pytest.fixture(scope="module")
def pushed():
    """Filled by `complete`: nothing in a push depends on when it is made."""
    return {}


@pytest.fixture
def complete(hub, folder, former, pushed):
    """What the repository holds after a push without faults."""
    if not pushed:
        push(folder)
        pushed.update(hub.files(REPO))
        assert "old.json" not in pushed and pushed["theirs.md"] == b"x" and pushed["README.md"] != FORMER["README.md"]
        hub.reset()
        hub.create(REPO)
        hub.commit(REPO, {**FORMER, "theirs.md": b"x"}, title="former")
    return dict(pushed)


ROUTES = [
    "create_repo",
    "info",
    "tree",
    "resolve",
    "validate_yaml",
    "preupload",
    "lfs_batch",
    "upload",
    "lfs_verify",
    "commit",
]
PASSING = {
    "500": {"status": 500},
    "lost reply": {"lose_reply": True},
    "cut reply": {"cut_reply_after": 1},
    "slow": {"delay": 0.2},
}


@pytest.mark.parametrize("kind", PASSING)
@pytest.mark.parametrize("route", ROUTES)
def test_one_fault_and_the_push_is_complete_in_one_commit(hub, folder, complete, route, kind):
    if route in ("upload", "lfs_verify") and kind == "cut reply":
        pytest.skip("its reply has no body")
    before = hashes(folder)
    fault = hub.faults.add(route, **PASSING[kind])
    info = push(folder)
    assert fault.struck == 1
    assert hub.files(REPO) == complete and titles(hub)[:2] == ["pushed", "former"]
    assert info.oid == hub.head(REPO) and info.commit_url.endswith(info.oid)
    assert hashes(folder) == before


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
def test_every_passing_status_is_retried(hub, folder, complete, own_waits, status):
    hub.faults.add("commit", status=status, times=2)
    push(folder)
    assert own_waits == [1, 2] and hub.files(REPO) == complete and titles(hub)[:2] == ["pushed", "former"]


@pytest.mark.parametrize("route", ["preupload", "lfs_batch", "upload", "commit"])
@pytest.mark.parametrize("count", [1, 1000])
def test_a_connection_cut_while_sending(hub, folder, complete, route, count):
    fault = hub.faults.add(route, cut_request_after=count)
    push(folder)
    assert fault.struck == 1 and hub.files(REPO) == complete and titles(hub)[:2] == ["pushed", "former"]


@pytest.mark.parametrize("options", [{"status": 500}, {"cut_request_after": 10}, {"cut_reply_after": 1}], ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_a_fault_that_stays_leaves_the_repository_as_it_was_or_complete(hub, folder, former, complete, route, options):
    before, head = hashes(folder), hub.head(REPO)
    fault = hub.faults.add(route, times=None, **options)
    try:
        push(folder, retries=1)
    except (HTTPError, RuntimeError):
        arrived = False
    else:
        arrived = True
    assert fault.struck >= 1
    made = titles(hub)[:2] == ["pushed", "former"]
    assert hub.files(REPO) == (complete if made else former) and (made or hub.head(REPO) == head)
    assert made or not arrived  # Whoever is told of success finds it.
    assert hashes(folder) == before
    hub.faults.clear()
    push(folder)  # The next try completes it, in one commit at most.
    assert hub.files(REPO) == complete and titles(hub)[:2] == ["pushed", "former"]


def test_waits_grow_and_end(hub, folder, own_waits):
    hub.faults.add("create_repo", times=None, status=503)
    with pytest.raises(HfHubHTTPError):
        push(folder, retries=7)
    assert own_waits == [1, 2, 4, 8, 16, 30, 30]


def test_retries_0_tries_once(hub, folder, former):
    fault = hub.faults.add("commit", status=500, times=None)
    with pytest.raises(HfHubHTTPError):
        push(folder, retries=0)
    assert fault.struck == 1 and hub.files(REPO) == former


def test_a_commit_whose_reply_was_lost_is_not_made_again_after_somebody_elses(hub, folder, complete):
    hub.faults.add("commit", lose_reply=True)
    # By the time we look again somebody has committed on top of ours.

    def commit_after_ours():
        if titles(hub)[0] == "pushed":
            hub.commit(REPO, {"later.md": b"y"})

    hub.faults.add("info", times=None, before=commit_after_ours)
    push(folder)
    assert hub.files(REPO) == {**complete, "later.md": b"y"}
    assert titles(hub)[:3] == ["Somebody else's commit", "pushed", "former"]


def test_a_lost_pull_request_is_found_again(hub, folder, complete):
    def open_another():
        addition = CommitOperationAdd("other.md", b"y")
        return HfApi().create_commit(REPO, [addition], commit_message="other", create_pr=True)

    open_another()
    hub.faults.add("commit", lose_reply=True)
    # And one more before we look again.
    hub.faults.add("refs", after=1, before=open_another)
    info = push(folder, create_pr=True)
    opened = {num: request.title for num, request in hub.repository(REPO).pull_requests.items()}
    assert opened == {1: "other", 2: "pushed", 3: "other"} and info.pr_num == 2
    assert hub.files(REPO, "refs/pr/2") == complete and titles(hub)[0] == "former"


@pytest.mark.parametrize("status", [409, 412])
def test_a_conflict_that_is_none_is_retried(hub, folder, complete, status):
    fault = hub.faults.add("commit", status=status)
    push(folder)
    assert fault.struck == 1 and hub.files(REPO) == complete and titles(hub)[:2] == ["pushed", "former"]


@contextlib.contextmanager
def somebody_commits_first(hub, changes):
    """Between our looking at the branch and our commit; the Hub answers 412."""
    yield hub.faults.add("commit", before=lambda: hub.commit(REPO, changes))


def test_a_concurrent_commit_to_other_files_stays(hub, folder, complete):
    with somebody_commits_first(hub, {"theirs.md": b"new"}):
        push(folder)
    assert hub.files(REPO) == {**complete, "theirs.md": b"new"}
    assert titles(hub)[:3] == ["pushed", "Somebody else's commit", "former"]


@pytest.mark.parametrize(
    "changes", [{"README.md": b"theirs"}, {"old.json": b"[]"}, {"adapter_config.json": b"{}"}], ids=str
)
def test_a_concurrent_commit_to_our_files_is_an_error(hub, folder, complete, former, changes):
    with somebody_commits_first(hub, changes), pytest.raises(RuntimeError, match=f"changed {next(iter(changes))}"):
        push(folder)
    assert hub.files(REPO) == {**former, **changes}


def test_a_branch_that_never_rests_is_given_up(hub, folder, former):
    hub.faults.add("commit", times=None, before=lambda: hub.commit(REPO, {"theirs.md": hub.head(REPO).encode()}))
    with pytest.raises(RuntimeError, match="push again"):
        push(folder, retries=3)
    assert len(hub.requests_to("commit")) == 4 and hub.files(REPO)["README.md"] == FORMER["README.md"]


ADVICE = {401: "hf auth login", 403: "write permission", 404: "no user/demo-erasure"}


@pytest.mark.parametrize("route", ["create_repo", "preupload", "lfs_batch", "commit"])
@pytest.mark.parametrize("status", ADVICE)
def test_what_a_retry_does_not_help_is_said_at_once(hub, folder, former, own_waits, waits, status, route):
    if (route, status) in (("create_repo", 401), ("create_repo", 403)):
        pytest.skip("huggingface_hub then looks whether the repository exists, and goes on")
    hub.faults.add(route, status=status, times=None)
    with pytest.raises(HfHubHTTPError) as caught:
        push(folder)
    assert ADVICE[status] in str(caught.value) and own_waits == [] and waits == []
    assert hub.files(REPO) == former


def test_a_token_that_may_only_read(hub, folder, former, own_waits):
    with pytest.raises(HfHubHTTPError, match="write permission"):
        push(folder, token=hub.read_token)
    assert hub.files(REPO) == former and own_waits == []


def test_a_strangers_private_repository(hub, folder):
    hub.create(REPO, private=True)
    with pytest.raises(HfHubHTTPError, match="write permission|no user/demo-erasure"):
        push(folder, token=hub.stranger_token)
    assert hub.files(REPO) == {}


def test_a_wrong_token(hub, folder, former):
    with pytest.raises(HfHubHTTPError, match="hf auth login"):
        push(folder, token="hf_nobody")
    assert hub.files(REPO) == former


def test_retries_are_logged_without_the_token(hub, folder, caplog):
    hub.faults.add("commit", status=500)
    with caplog.at_level(logging.DEBUG):
        push(folder)
    assert "trying again in 1 s (1 of 5)" in caplog.text and hub.token not in caplog.text


def test_no_commit_goes_on_top_of_one_that_the_hub_does_not_name(hub, folder, former, monkeypatch):
    """`parent_commit=None` would be no check at all of what others push meanwhile."""
    told = HfApi.repo_info

    def nameless(*args, **kwargs):
        info = told(*args, **kwargs)
        info.sha = None
        return info

    monkeypatch.setattr(HfApi, "repo_info", nameless)
    with pytest.raises(RuntimeError, match="does not say which commit the main branch is at"):
        push(folder)
    assert hub.files(REPO) == former
