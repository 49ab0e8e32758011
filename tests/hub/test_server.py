"""Writing to the local Hub with the unmodified huggingface_hub: what works on huggingface.co works here, and fails alike."""

import base64
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    auth_check,
    create_branch,
    create_commit,
    create_pull_request,
    create_repo,
    create_tag,
    delete_branch,
    delete_folder,
    delete_repo,
    get_session,
    hf_hub_download,
    list_repo_commits,
    list_repo_refs,
    model_info,
    repo_exists,
    snapshot_download,
    update_repo_settings,
    upload_file,
    upload_folder,
    whoami,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from packaging.version import Version
from samples import REPO, commit_files, contents
from server_parts import storage


pytestmark = pytest.mark.usefixtures("every_request_is_understood")


# Pushing


def test_upload_folder_is_one_commit_with_every_byte(hub, folder):
    assert create_repo(REPO).repo_id == REPO
    first = hub.head(REPO)
    info = upload_folder(repo_id=REPO, folder_path=folder, commit_message="Erase fox")
    assert hub.files(REPO) == contents(folder)
    newest, initial = hub.repository(REPO).history()
    assert (newest.oid, newest.title, newest.author) == (info.oid, "Erase fox", "user") and initial.oid == first
    large = {path for path, blob in newest.files.items() if blob.lfs}
    assert large == {"adapter_model.safetensors", "pictures/before & after.png"}
    assert info.commit_url == f"{hub.url}/{REPO}/commit/{info.oid}"
    # Storage is somebody else's server: it must not see the token.
    assert len(hub.requests_to("upload")) == 2
    assert all("authorization" not in request.headers for request in hub.requests_to("upload"))


@pytest.mark.skipif(
    Version(huggingface_hub.__version__) < Version("1.21"), reason="older versions send pictures that are there already"
)
def test_unchanged_files_are_not_sent_again(hub, folder, pushed):
    assert upload_folder(repo_id=REPO, folder_path=folder).oid == pushed
    assert not hub.requests_to("commit", "upload")
    (folder / "adapter_config.json").write_text('{"r": 16}')
    upload_folder(repo_id=REPO, folder_path=folder)
    (request,) = hub.requests_to("commit")
    assert b"adapter_config.json" in request.body and b"README.md" not in request.body
    assert hub.files(REPO) == contents(folder)


def test_large_content_that_is_there_already_is_not_uploaded_again(hub, folder, pushed):
    upload_file(repo_id=REPO, path_or_fileobj=folder / "adapter_model.safetensors", path_in_repo="copy.safetensors")
    assert hub.requests_to("lfs_batch") and not hub.requests_to("upload")
    assert hub.files(REPO)["copy.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()


def test_large_files_go_up_in_parts(hub):
    create_repo(REPO)
    hub.part_size = 100_000
    content = os.urandom(250_001)
    commit_files({"model.safetensors": content})
    assert [len(request.body) for request in hub.requests_to("upload_part")] == [100_000, 100_000, 50_001]
    assert len(hub.requests_to("lfs_complete")) == 1 and not hub.requests_to("upload")
    assert hub.files(REPO)["model.safetensors"] == content


def test_storage_takes_only_the_announced_content_at_a_signed_address(hub):
    url = hub.signed_url("/objects/" + "0" * 64)
    assert get_session().put(url, content=b"something else").status_code == 400
    assert get_session().put(url.split("?")[0], content=b"").status_code == 403
    assert get_session().put(url[:-1] + ("0" if url[-1] != "0" else "1"), content=b"").status_code == 403


def test_commits_on_a_moved_head_are_refused(hub, pushed):
    commit_files({"a.txt": b"1"}, parent_commit=pushed)
    head = hub.head(REPO)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        commit_files({"a.txt": b"2"}, parent_commit=pushed)
    assert error.value.response.status_code == 412
    assert hub.head(REPO) == head and hub.files(REPO)["a.txt"] == b"1"
    commit_files({"a.txt": b"2"}, parent_commit=head[:10])
    assert hub.files(REPO)["a.txt"] == b"2"


def send_commit(hub, *operations):
    """A commit as the client library would not send it."""
    lines = [{"key": "header", "value": {"summary": "Half", "description": ""}}, *operations]
    return get_session().post(
        f"{hub.url}/api/models/{REPO}/commit/main",
        content="\n".join(map(json.dumps, lines)),
        headers={"authorization": f"Bearer {hub.token}"},
    )


def file_line(path, content=""):
    return {"key": "file", "value": {"path": path, "content": content, "encoding": "base64"}}


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ({"key": "lfsFile", "value": {"path": "b.bin", "algo": "sha256", "oid": "0" * 64, "size": 1}}, 400),
        (file_line("../b"), 400),
        (file_line(".git/config"), 400),
        (file_line("b", "%"), 400),
        (file_line("README.md", base64.b64encode(b"---\ntags: one\n---\n").decode()), 400),
        ({"key": "deletedFile", "value": {"path": "missing"}}, 404),
        ({"key": "deletedFolder", "value": {"path": "missing/"}}, 404),
        ({"key": "nonsense", "value": {"path": "b"}}, 400),
    ],
)
def test_a_commit_is_done_as_a_whole_or_not_at_all(hub, pushed, line, status):
    assert send_commit(hub, file_line("good.txt"), line).status_code == status
    assert hub.head(REPO) == pushed and "good.txt" not in hub.files(REPO)


def test_a_commit_names_large_files_by_hash_and_size(hub, pushed):
    (oid,) = [oid for oid, content in hub.repository(REPO).objects.items() if len(content) == 400_000]
    value = {"path": "b.bin", "algo": "sha256", "oid": oid, "size": 399_999}
    assert send_commit(hub, {"key": "lfsFile", "value": value}).status_code == 400 and hub.head(REPO) == pushed
    assert send_commit(hub, {"key": "lfsFile", "value": value | {"size": 400_000}}).status_code == 200
    assert len(hub.files(REPO)["b.bin"]) == 400_000


def test_deleting(hub, folder, pushed):
    create_commit(
        REPO,
        [CommitOperationDelete("empty.txt"), CommitOperationAdd("new.txt", b"new")],
        commit_message="Replace",
    )
    delete_folder("pictures", REPO)
    assert set(hub.files(REPO)) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "new.txt"}
    assert "empty.txt" in hub.files(REPO, pushed)  # History keeps it.
    with pytest.raises(EntryNotFoundError):
        delete_folder("pictures", REPO)


def test_commits_at_the_same_time_all_land(hub, pushed, monkeypatch):
    # A pause between reading the head and moving it: without a lock, the others would commit to the same head.
    monkeypatch.setattr(storage, "_now", lambda: time.sleep(0.05) or "2026-01-01T00:00:00.000Z")
    names = [f"{i}.txt" for i in range(8)]
    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(lambda name: send_commit(hub, file_line(name)).status_code, names))
    assert answers == [200] * len(names)
    assert set(names) <= set(hub.files(REPO)) and len(hub.repository(REPO).history()) == 2 + len(names)


# Pull requests, branches, tags


def test_a_pull_request_leaves_main_alone(hub, folder, pushed):
    (folder / "adapter_config.json").write_text("{}")
    info = upload_folder(repo_id=REPO, folder_path=folder, create_pr=True, commit_message="Proposal")
    assert info.pr_num == 1 and info.pr_revision == "refs/pr/1" and hub.head(REPO) == pushed
    path = hf_hub_download(REPO, "adapter_config.json", revision="refs/pr/1")
    assert open(path).read() == "{}"
    assert snapshot_download(REPO, revision="refs/pr/1").endswith(info.oid)
    # Further commits go to the pull request; readers may open one.
    commit_files({"more.txt": b""}, revision="refs/pr/1")
    assert "more.txt" in hub.files(REPO, "refs/pr/1")
    assert commit_files({"idea.txt": b""}, create_pr=True, token=hub.stranger_token).pr_num == 2
    assert create_pull_request(REPO, "Third", token=hub.stranger_token).git_reference == "refs/pr/3"
    assert hub.head(REPO) == pushed


def test_a_pull_request_starts_where_it_is_told(hub, pushed):
    commit_files({"later.txt": b""})
    info = commit_files({"a.txt": b""}, create_pr=True, parent_commit=pushed)
    assert "later.txt" not in hub.files(REPO, info.pr_revision)


def test_branches_and_tags(hub, pushed):
    create_branch(REPO, branch="runs/two")
    commit_files({"a.txt": b"branch"}, revision="runs/two")
    assert hub.head(REPO) == pushed and hub.files(REPO, "runs/two")["a.txt"] == b"branch"
    create_tag(REPO, tag="v1", revision="runs/two")
    commit_files({"a.txt": b"later"}, revision="runs/two")
    assert open(hf_hub_download(REPO, "a.txt", revision="v1")).read() == "branch"
    refs = list_repo_refs(REPO, include_pull_requests=True)
    assert {branch.name for branch in refs.branches} == {"main", "runs/two"} and refs.pull_requests == []
    assert [tag.ref for tag in refs.tags] == ["refs/tags/v1"]
    assert [commit.title for commit in list_repo_commits(REPO, revision="runs/two")][:2] == ["Add", "Add"]
    with pytest.raises(HfHubHTTPError, match="409"):
        create_branch(REPO, branch="runs/two")
    create_branch(REPO, branch="runs/two", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        create_tag(REPO, tag="v1")
    delete_branch(REPO, branch="runs/two")
    with pytest.raises(RevisionNotFoundError):
        model_info(REPO, revision="runs/two")
    with pytest.raises(RevisionNotFoundError):
        commit_files({"a.txt": b""}, revision="runs/two")
    with pytest.raises(RevisionNotFoundError):
        commit_files({"a.txt": b""}, revision="v1")  # A tag does not move.


# Who may do what


def test_whoami_knows_tokens(hub):
    assert whoami()["name"] == "user" and [org["name"] for org in whoami()["orgs"]] == ["space-peft"]
    assert whoami(hub.read_token)["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        whoami("hf_wrong")


@pytest.mark.parametrize("token", ["stranger", None])
def test_private_repositories_do_not_exist_for_others(hub, folder, token):
    create_repo(REPO, private=True)
    upload_folder(repo_id=REPO, folder_path=folder)
    token = hub.stranger_token if token else False
    for attempt in (model_info, snapshot_download, lambda repo, token: hf_hub_download(repo, "README.md", token=token)):
        with pytest.raises(RepositoryNotFoundError) as error:
            attempt(REPO, token=token)
        assert error.value.response.status_code == (404 if token else 401)
    assert not repo_exists(REPO, token=token)
    assert not repo_exists("user/never-made", token=token)
    assert model_info(REPO, token=hub.read_token).private


def test_who_may_not_write(hub, folder, pushed):
    for token, status in ((hub.read_token, 403), (hub.stranger_token, 403), ("hf_wrong", 401), (False, 401)):
        with pytest.raises(HfHubHTTPError) as error:
            upload_folder(repo_id=REPO, folder_path=folder, token=token)
        assert error.value.response.status_code == status
        with pytest.raises(HfHubHTTPError) as error:
            create_repo("user/new", token=token)
        assert error.value.response.status_code == status
    with pytest.raises(HfHubHTTPError, match="don't have the rights"):
        create_repo("stranger/model")
    with pytest.raises(HfHubHTTPError):
        auth_check(REPO, token=hub.read_token, write=True)
    auth_check(REPO, write=True)
    assert hub.head(REPO) == pushed and not hub.exists("user/new") and not hub.exists("stranger/model")


def test_gated_repositories_show_themselves_but_not_their_files(hub, pushed):
    update_repo_settings(REPO, gated="manual")
    assert model_info(REPO, token=hub.stranger_token).gated == "manual"
    for token in (hub.stranger_token, False):
        with pytest.raises(GatedRepoError):
            hf_hub_download(REPO, "README.md", token=token)
        with pytest.raises(GatedRepoError):
            auth_check(REPO, token=token)
    assert hf_hub_download(REPO, "README.md")


def test_creating_and_deleting_repositories(hub):
    assert repr(create_repo("space-peft/data", repo_type="dataset")).count("space-peft/data") == 2
    with pytest.raises(HfHubHTTPError, match="already created") as error:
        create_repo("space-peft/data", repo_type="dataset")
    assert error.value.response.status_code == 409
    assert create_repo("space-peft/data", repo_type="dataset", exist_ok=True).repo_type == "dataset"
    assert hub.exists("space-peft/data", "dataset") and not hub.exists("space-peft/data")
    delete_repo("space-peft/data", repo_type="dataset")
    with pytest.raises(RepositoryNotFoundError):
        delete_repo("space-peft/data", repo_type="dataset")
