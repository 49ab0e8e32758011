"""A local Hub: the part of huggingface.co's HTTP protocol that huggingface_hub 2.4 and what builds on it use.

Two listeners on the loopback interface, as in reality: the Hub, and the storage of large files, which knows no tokens
but signed addresses. Clients are the unmodified libraries, led here by `HF_ENDPOINT`. They transfer large files by LFS:
the other way, Xet, is a protocol of its own, and is switched off (`HF_HUB_DISABLE_XET`).

    hub.files("user/model")                                  # what is there
    hub.commit("user/model", {"README.md": b"..."})          # somebody else commits
    hub.faults.add("commit", status=500)                     # see `server_parts/faults.py`
    [request.route for request in hub.requests]              # what was asked
    subprocess.run([...], env=hub.environment(tmp_path))     # a fresh process that talks to this Hub

To read the protocol, start with `uploads.py` and `files.py`; each handler names the function it answers. What the real
Hub has besides, and nobody here asks for: redirects of small files to a cache, .gitignore, discussions, merging a pull
request, rate limits.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import threading
from pathlib import Path

from server_parts import files, repos, uploads
from server_parts.access import Account
from server_parts.errors import HubError
from server_parts.faults import Faults
from server_parts.storage import Blob, Commit, Repository, upload_mode
from server_parts.transport import Listener, Request, Routes


USER, ORGANIZATION, STRANGER = "user", "space-peft", "stranger"


class Hub:
    """A running Hub.

    Attributes:
        url: Where it listens; what `HF_ENDPOINT` has to be.
        token, read_token, stranger_token: Of `USER` (who may write under "user/" and "space-peft/"), of the same user
            but without the right to write, and of somebody who owns nothing here.
        faults: What shall go wrong, see [`Faults`].
        requests: All requests since the last `reset`, with their bodies.
        part_size: Files larger than this are uploaded in parts of this size; `None` for no such limit.
        page_size: Entries of a tree per answer.
    """

    def __init__(self):
        self.lock = threading.RLock()
        self.faults = Faults()
        self.errors: list[BaseException] = []
        self._secret = secrets.token_bytes(16)
        organizations = (ORGANIZATION,)
        self.token, self.read_token, self.stranger_token = "hf_write", "hf_read", "hf_stranger"
        self.accounts = {
            self.token: Account(USER, "write", organizations),
            self.read_token: Account(USER, "read", organizations),
            self.stranger_token: Account(STRANGER, "write"),
        }
        self.reset()
        api, storage = Routes(), Routes()
        for part in (repos, uploads, files):
            part.add_routes(api)
        repos.add_info_route(api)
        for part in (uploads, files):
            part.add_storage_routes(storage)
        self._api, self._storage = Listener(self, api), Listener(self, storage)
        self.url = self._api.url

    def reset(self) -> None:
        """An empty Hub without faults."""
        with self.lock:
            self.repositories: dict[tuple[str, str], Repository] = {}
            self.stored: dict[str, bytes] = {}  # In storage, by SHA-256.
            self.parts: dict[str, dict[int, bytes]] = {}  # Of uploads that are not complete yet.
            self.requests: list[Request] = []
            self.errors.clear()
            self.faults.clear()
            self.part_size: int | None = None
            self.page_size = 1000

    def close(self) -> None:
        self._api.close()
        self._storage.close()

    # For tests: looking at what is stored, and changing it behind the clients' backs

    def repository(self, repo_id: str, kind: str = "model") -> Repository:
        return self.repositories[kind, repo_id]

    def exists(self, repo_id: str, kind: str = "model") -> bool:
        return (kind, repo_id) in self.repositories

    def files(self, repo_id: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """All files of a revision, the .gitattributes every repository has left out."""
        commit = self.repository(repo_id, kind).resolve(revision)
        return {path: blob.content for path, blob in commit.files.items() if path != ".gitattributes"}

    def head(self, repo_id: str, revision: str = "main", kind: str = "model") -> str:
        return self.repository(repo_id, kind).resolve(revision).oid

    def create(self, repo_id: str, kind: str = "model", *, private: bool = False) -> Repository:
        with self.lock:
            self.repositories[kind, repo_id] = Repository(kind, repo_id, private, USER)
        return self.repository(repo_id, kind)

    def commit(
        self,
        repo_id: str,
        changes: dict[str, bytes | None],
        *,
        revision: str = "main",
        kind: str = "model",
        title: str = "Somebody else's commit",
    ) -> Commit:
        """Writes files (`None` deletes one) to a branch directly."""
        with self.lock:
            repository = self.repository(repo_id, kind)
            blobs: dict[str, Blob | None] = {}
            for path, content in changes.items():
                large = content is not None and upload_mode(path, len(content), content[:512]) == "lfs"
                blobs[path] = None if content is None else Blob(content, lfs=large)
                if large:
                    repository.objects[blobs[path].sha256] = content
            return repository.commit(repository.ref(revision), blobs, title, "", STRANGER)

    def requests_to(self, *routes: str, method: str | None = None) -> list[Request]:
        return [r for r in self.requests if r.route in routes and method in (None, r.method)]

    # For handlers

    def repository_url(self, kind: str, repo_id: str) -> str:
        return f"{self.url}/{'' if kind == 'model' else f'{kind}s/'}{repo_id}"

    def account_name(self, request: Request) -> str:
        return self.accounts[request.headers["authorization"].removeprefix("Bearer ")].name

    def _signature(self, path: str) -> str:
        return hmac.new(self._secret, path.encode(), hashlib.sha256).hexdigest()

    def signed_url(self, path: str) -> str:
        return f"{self._storage.url}{path}?signature={self._signature(path)}"

    def check_signature(self, request: Request) -> None:
        if request.query.get("signature") != [self._signature(request.path)]:
            raise HubError(403, "The signature does not match")

    # For clients in a process of their own

    def environment(self, home: str | os.PathLike, *, token: str | None = "") -> dict[str, str]:
        """Environment variables of a fresh process that shall talk to this Hub.

        Args:
            home: Folder for `HF_HOME`: caches that no other process shares.
            token: Who it is; by default `token`, `None` for nobody.
        """
        ours = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "DATASETS_")
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(ours) and not name.lower().endswith("_proxy")
        }
        token = self.token if token == "" else token
        return {
            **inherited,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(Path(home)),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "NO_PROXY": "127.0.0.1",
            "TOKENIZERS_PARALLELISM": "false",
            **({"HF_TOKEN": token} if token else {}),
        }
