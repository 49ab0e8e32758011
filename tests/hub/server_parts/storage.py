"""Repositories as the Hub keeps them: content-addressed blobs, atomic commits, branches, tags, pull requests."""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property

from .errors import BadRequest, HubError


# What the Hub writes into a new repository's .gitattributes: these are large files whatever their size.
LFS_PATTERNS = (
    "*.7z", "*.arrow", "*.bin", "*.bz2", "*.ckpt", "*.ftz", "*.gz", "*.h5", "*.joblib", "*.lfs.*", "*.mlmodel",
    "*.model", "*.msgpack", "*.npy", "*.npz", "*.onnx", "*.ot", "*.parquet", "*.pb", "*.pickle", "*.pkl", "*.pt",
    "*.pth", "*.rar", "*.safetensors", "*.tar", "*.tflite", "*.tgz", "*.wasm", "*.xz", "*.zip", "*.zst",
)  # fmt: skip
LFS_FROM_SIZE = 10 * 1024 * 1024
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()
MAIN = "refs/heads/main"


def upload_mode(path: str, size: int, sample: bytes) -> str:
    """ "lfs" or "regular": by .gitattributes, by size, and because git blobs must be text."""
    name = path.rsplit("/", 1)[-1]
    large = any(fnmatch.fnmatch(name, pattern) for pattern in LFS_PATTERNS) or size >= LFS_FROM_SIZE
    return "lfs" if large or b"\0" in sample else "regular"


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Blob:
    """A file's content; `lfs` says whether git holds it or a pointer to it."""

    content: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        ).encode()

    @cached_property
    def git_oid(self) -> str:
        return git_hash(self.pointer if self.lfs else self.content)

    @property
    def etag(self) -> str:
        """What identifies the content to a client: sha256 of a large file, git's hash of another."""
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: dict[str, Blob] = field(repr=False)  # The whole tree, by path.


@dataclass
class PullRequest:
    num: int
    title: str
    description: str
    author: str
    base: str
    created_at: str


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def check_path(path: str) -> str:
    """A path a commit may write."""
    parts = path.split("/")
    if not path or "\0" in path or any(part in ("", ".", "..", ".git") for part in parts):
        raise BadRequest(f"Invalid path in commit: {path!r}")
    return path


class Repository:
    """A repository with a `main` branch that holds a .gitattributes, as the Hub makes it.

    `refs` maps full names to commit ids, `objects` sha256 to the large files uploaded so far; those become visible
    with the commit that names them.
    """

    def __init__(self, kind: str, repo_id: str, private: bool, author: str):
        self.kind, self.id, self.private = kind, repo_id, private
        self.gated: bool | str = False
        self.created_at = _now()
        self.refs: dict[str, str] = {}
        self.commits: dict[str, Commit] = {}
        self.objects: dict[str, bytes] = {}
        self.pull_requests: dict[int, PullRequest] = {}
        self._clock = itertools.count()
        self.commit(MAIN, {".gitattributes": Blob(GITATTRIBUTES)}, "initial commit", "", author)

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    # Names of commits

    def ref(self, revision: str) -> str | None:
        """The full name of a branch, tag or pull request."""
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return name
        return None

    def resolve(self, revision: str) -> Commit:
        """The commit a branch, tag, `refs/pr/N` or (abbreviated) commit id stands for."""
        name = self.ref(revision)
        if name is not None:
            return self.commits[self.refs[name]]
        found = [oid for oid in self.commits if oid.startswith(revision)] if len(revision) >= 7 else []
        if len(found) != 1:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[found[0]]

    def history(self, revision: str = "main") -> list[Commit]:
        """Commits of a revision, newest first."""
        commits, oid = [], self.resolve(revision).oid
        while oid is not None:
            commits.append(self.commits[oid])
            oid = commits[-1].parent
        return commits

    # Writing: a commit is made whole, and then a reference is moved

    def commit(
        self,
        ref: str,
        changes: dict[str, Blob | None],
        title: str,
        message: str,
        author: str,
        parent: str | None = None,
    ) -> Commit:
        """Adds a commit on top of `parent` (default: the head of `ref`); `None` deletes a file. Moves `ref` to it."""
        parent = parent or self.refs.get(ref)
        files = dict(self.commits[parent].files) if parent else {}
        for path, blob in changes.items():
            if blob is None:
                files.pop(path)
            else:
                files[check_path(path)] = blob
        tree = sorted((path, blob.git_oid) for path, blob in files.items())
        identity = json.dumps([self.kind, self.id, parent, tree, title, message, next(self._clock)])
        oid = hashlib.sha1(identity.encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, message, author, _now(), files)
        self.refs[ref] = oid
        return self.commits[oid]

    def open_pull_request(self, title: str, description: str, author: str, start: str) -> str:
        """Opens one at commit `start`; returns its reference."""
        num = len(self.pull_requests) + 1
        self.pull_requests[num] = PullRequest(num, title, description, author, MAIN, _now())
        self.refs[f"refs/pr/{num}"] = start
        return f"refs/pr/{num}"
