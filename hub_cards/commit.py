"""One folder, one commit: all of it or nothing arrives on the Hub, however often the connection fails.

`HfApi.upload_folder` splits what it uploads into several commits where hf_xet is installed, and no commit is retried by
huggingface_hub, because a commit may have been made although its reply was lost. Here each attempt names the commit it
builds on, so that it can be made once only, and a failed one looks at the repository before it is repeated.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils.sha import git_hash

from space_peft.records.folder import MANIFEST_NAME
from space_peft.records.safe_json import read_json

from .manifest import sha256_of


logger = logging.getLogger(__name__)

T = TypeVar("T")

_TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}
_CONFLICT_STATUS = {409, 412}
_LONGEST_WAIT = 30.0

_ADVICE = {
    401: "The Hub does not know the token: log in with `hf auth login`, or pass `token=`.",
    403: "The token may not write there: it needs write permission (https://huggingface.co/settings/tokens), and its "
    "owner must be the owner of {repo} or a member of the organisation.",
    404: "There is no {repo}, no such revision in it, or the token may not see it.",
    413: "A file is too large for the Hub.",
}


@dataclass(frozen=True)
class Target:
    """
    Where a folder goes.

    Args:
        repo_id (`str`): Repository, with its owner.
        repo_type (`str`, defaults to `"model"`): `"model"` or `"dataset"`.
        revision (`str`, *optional*): Branch; the main one by default.
        create_pr (`bool`, defaults to `False`): Open a pull request instead of changing the branch.
        token (`str` or `bool`, *optional*): As in huggingface_hub.
    """

    repo_id: str
    repo_type: str = "model"
    revision: str | None = None
    create_pr: bool = False
    token: str | bool | None = None

    @property
    def where(self) -> dict:
        """Arguments of most methods of `HfApi`."""
        return {"repo_id": self.repo_id, "repo_type": self.repo_type, "token": self.token}


def commit_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str,
    token: str | bool | None = None,
    retries: int = 5,
) -> CommitInfo:
    """Makes a repository hold what a folder holds, in one commit; files that others put there stay.

    If the folder has a manifest, files are deleted that the repository's manifest names, i.e. that a former push brought,
    and the folder has no more.

    Args:
        folder (`str` or `os.PathLike`): The folder; all its files are uploaded.
        repo_id (`str`): Repository; created if there is none.
        repo_type (`str`, defaults to `"model"`): `"model"` or `"dataset"`.
        private (`bool`, *optional*): For a repository that is created; the owner's default if `None`.
        revision (`str`, *optional*): Branch; created if there is none.
        create_pr (`bool`, defaults to `False`): Open a pull request against `revision`.
        commit_message (`str`): First line of the commit.
        token (`str` or `bool`, *optional*): As in huggingface_hub.
        retries (`int`, defaults to 5): Attempts after the first that fails for a passing reason.

    Returns:
        [`~huggingface_hub.CommitInfo`]: Of the commit, or of the latest one if there was nothing to change.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: For an error that a retry does not help, with what to do about it.
        RuntimeError: If somebody else changed the same files at the same time.
    """
    api, folder = HfApi(), Path(folder)
    known_prs: set[str] = set()
    try:
        url = _retried(lambda: api.create_repo(
            repo_id, private=private, repo_type=repo_type, exist_ok=True, token=token
        ), retries)  # fmt: skip
        target = Target(url.repo_id, repo_type, revision, create_pr, token)
        if revision is not None:
            _retried(lambda: _make_branch(api, target, revision), retries)
        if create_pr:
            known_prs = set(_retried(lambda: _pull_requests(api, target), retries))
        commit = _Commit(api, target, folder, commit_message, known_prs)
        return _retried(commit.attempt, retries)
    except HfHubHTTPError as error:
        if advice := _ADVICE.get(error.response.status_code):
            error.append_to_message("\n" + advice.format(repo=repo_id))
        raise


def _retried(attempt: Callable[[], T], retries: int) -> T:
    """Calls until it succeeds, waiting 1, 2, 4, ... seconds after errors that may pass."""
    for n in range(retries + 1):
        try:
            return attempt()
        except Exception as error:
            if n == retries or not is_transient(error):
                raise
            wait = min(2.0**n, _LONGEST_WAIT)
            logger.warning("%s: trying again in %.0f s (%d of %d).", _first_line(error), wait, n + 1, retries)
            time.sleep(wait)
    raise AssertionError("the loop returns or raises")


def is_transient(error: BaseException) -> bool:
    """Whether an error of huggingface_hub may not come back: a server error, a timeout, a dropped connection."""
    if isinstance(error, _ConcurrentCommit):
        return True
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _TRANSIENT_STATUS
    if isinstance(error, HTTPError):
        return True
    # huggingface_hub wraps errors of an LFS upload in a RuntimeError.
    return isinstance(error, RuntimeError) and error.__cause__ is not None and is_transient(error.__cause__)


class _ConcurrentCommit(RuntimeError):
    """The branch moved between looking and committing."""


class _Commit:
    """A commit that is attempted until it is known to be made."""

    def __init__(self, api: HfApi, target: Target, folder: Path, message: str, known_prs: set[str]):
        self.api, self.target, self.folder, self.message, self.known_prs = api, target, folder, message, known_prs
        self.files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
        self.first_tree: dict[str, RepoFile] | None = None
        self.deleted: set[str] = set()

    def attempt(self) -> CommitInfo:
        """Commits, unless a former attempt has done so without our hearing of it."""
        api, target = self.api, self.target
        head = self._head(target.revision)
        tree = self._tree(head)
        if self.first_tree is None:
            if MANIFEST_NAME in self.files:  # It says what the repository shall hold of ours; a checkpoint has none.
                self.deleted = self._former_files(head, tree) - set(self.files)
            self.first_tree = tree
        elif target.create_pr:
            for ref in sorted(set(_pull_requests(api, target)) - self.known_prs):
                proposed = self._head(ref)
                if self._arrived(self._tree(proposed)):
                    return self._info(proposed, pr=ref)
        elif self._arrived(tree):
            return self._info(head)
        else:
            self._check_for_others(tree)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(name, path) for name, path in self.files.items()),
            *(CommitOperationDelete(name) for name in sorted(self.deleted & set(tree))),
        ]
        try:
            return api.create_commit(
                **target.where,
                operations=operations,
                commit_message=self.message,
                revision=target.revision,
                create_pr=target.create_pr,
                parent_commit=head,
            )
        except HfHubHTTPError as error:
            if error.response.status_code in _CONFLICT_STATUS:
                raise _ConcurrentCommit(f"{target.repo_id} changed during the push; push again") from error
            raise

    def _head(self, revision: str | None) -> str:
        sha = self.api.repo_info(**self.target.where, revision=revision).sha
        if sha is None:  # Without it a commit would go on top of whatever others push meanwhile.
            raise RuntimeError(f"the Hub does not say which commit {revision or 'the main branch'} is at")
        return sha

    def _tree(self, revision: str) -> dict[str, RepoFile]:
        entries = self.api.list_repo_tree(**self.target.where, revision=revision, recursive=True)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def _former_files(self, head: str, tree: dict[str, RepoFile]) -> set[str]:
        """What a former push brought, by the manifest in the repository."""
        if MANIFEST_NAME not in tree:
            return set()
        with tempfile.TemporaryDirectory() as temporary:
            try:
                path = self.api.hf_hub_download(
                    **self.target.where, filename=MANIFEST_NAME, revision=head, local_dir=temporary
                )
                listed = read_json(path, kind="manifest")["files"]
            except LocalEntryNotFoundError as error:
                # "Not on this disk" is what it says when the Hub does not answer; why is in the cause.
                raise (error.__cause__ or error) from None
            except (ValueError, KeyError) as error:
                logger.warning("The repository's manifest is damaged (%s): files of a former push stay.", error)
                return set()
        return set(listed) if isinstance(listed, dict) else set()

    def _arrived(self, tree: dict[str, RepoFile]) -> bool:
        return not self.deleted & set(tree) and all(
            name in tree and _same(path, tree[name]) for name, path in self.files.items()
        )

    def _check_for_others(self, tree: dict[str, RepoFile]) -> None:
        def oids(entries: dict[str, RepoFile]) -> dict[str, str]:
            return {name: entries[name].blob_id for name in {*self.files, *self.deleted} if name in entries}

        assert self.first_tree is not None  # What the first attempt saw.
        before, now = oids(self.first_tree), oids(tree)
        if changed := sorted(name for name in {*before, *now} if before.get(name) != now.get(name)):
            raise RuntimeError(
                f"somebody else changed {', '.join(changed)} in {self.target.repo_id} while this push was under way; "
                "nothing was pushed. Look at it, and push again if it is to be replaced."
            )

    def _info(self, oid: str, pr: str | None = None) -> CommitInfo:
        prefix = "" if self.target.repo_type == "model" else f"{self.target.repo_type}s/"
        url = f"{self.api.endpoint}/{prefix}{self.target.repo_id}"
        return CommitInfo(
            commit_url=f"{url}/commit/{oid}",
            commit_message=self.message,
            commit_description="",
            oid=oid,
            _endpoint=self.api.endpoint,
            pr_url=f"{url}/discussions/{pr.rsplit('/', 1)[-1]}" if pr else None,
        )


def _make_branch(api: HfApi, target: Target, branch: str) -> None:
    try:
        api.repo_info(**target.where, revision=branch)
    except RevisionNotFoundError:
        api.create_branch(**target.where, branch=branch, exist_ok=True)


def _pull_requests(api: HfApi, target: Target) -> list[str]:
    refs = api.list_repo_refs(**target.where, include_pull_requests=True)
    return [ref.ref for ref in refs.pull_requests or []]


def _same(path: Path, entry: RepoFile) -> bool:
    if path.stat().st_size != entry.size:
        return False
    if entry.lfs is not None:
        return entry.lfs.sha256 == sha256_of(path)
    return entry.blob_id == git_hash(path.read_bytes())


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
