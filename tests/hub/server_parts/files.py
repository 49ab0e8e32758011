"""Reading: the tree, and the files in it."""

from __future__ import annotations

import hashlib
import re
from urllib.parse import parse_qs, quote

from .access import find_repository
from .errors import HubError
from .repos import REPO
from .storage import Blob, Commit
from .transport import Reply, Routes, json_reply


FILE = (
    r"/(?:(?P<kind>datasets|spaces)/)?(?P<repo>[^/]+(?:/[^/]+)?)/(?P<view>resolve|raw)"
    r"/(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+)/(?P<path>.+)"
)


def add_routes(routes: Routes) -> None:
    routes.add("tree", "GET", REPO + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?")(tree)
    routes.add("paths_info", "POST", REPO + "/paths-info/(?P<revision>[^/]+)")(paths_info)
    routes.add("resolve", "GET HEAD", FILE)(resolve)


def add_storage_routes(routes: Routes) -> None:
    routes.add("download", "GET HEAD", r"/objects/(?P<oid>[0-9a-f]{64})")(download)


def _file_entry(path: str, blob: Blob) -> dict:
    entry = {"type": "file", "oid": blob.git_oid, "size": len(blob.content), "path": path}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}
    return entry


def _folder_entry(path: str, commit: Commit) -> dict:
    inside = sorted((name, blob.git_oid) for name, blob in commit.files.items() if name.startswith(f"{path}/"))
    return {"type": "directory", "oid": hashlib.sha1(repr(inside).encode()).hexdigest(), "size": 0, "path": path}


def _entries(commit: Commit, folder: str, recursive: bool) -> list[dict]:
    prefix = f"{folder}/" if folder else ""
    found = {}
    for path, blob in commit.files.items():
        if not path.startswith(prefix):
            continue
        steps = path.removeprefix(prefix).split("/")
        for depth in range(1, len(steps) if recursive else min(2, len(steps))):
            name = prefix + "/".join(steps[:depth])
            found[name] = _folder_entry(name, commit)
        if recursive or len(steps) == 1:
            found[path] = _file_entry(path, blob)
    return [found[path] for path in sorted(found)]


def _with_commit(entry: dict, commit: Commit, expand: bool) -> dict:
    return entry | ({"lastCommit": {"id": commit.oid, "title": commit.title, "date": commit.date}} if expand else {})


def tree(hub, request, kind, repo, revision, path):
    """`HfApi.list_repo_tree`, page by page: the address of the next one is in the `Link` header."""
    commit = find_repository(hub, request, kind, repo).resolve(revision)
    entries = _entries(commit, path, request.flag("recursive"))
    if not entries and path:
        raise HubError(404, f"{path} does not exist on {revision!r}", "EntryNotFound")
    start = int(request.query.get("cursor", ["0"])[0])
    page = [_with_commit(entry, commit, request.flag("expand")) for entry in entries[start : start + hub.page_size]]
    headers = {}
    if start + hub.page_size < len(entries):
        address = f"{hub.url}/api/{kind}/{repo}/tree/{commit.oid}" + (f"/{quote(path, safe='')}" if path else "")
        flags = f"recursive={request.flag('recursive')}&expand={request.flag('expand')}"
        headers["Link"] = f'<{address}?{flags}&cursor={start + hub.page_size}>; rel="next"'
    return json_reply(page, **headers)


def paths_info(hub, request, kind, repo, revision):
    """`HfApi.get_paths_info`: a form, paths that do not exist are left out."""
    commit, form = find_repository(hub, request, kind, repo).resolve(revision), parse_qs(request.body.decode())
    entries = []
    for path in form.get("paths", []):
        if path in commit.files:
            entries.append(_file_entry(path, commit.files[path]))
        elif any(name.startswith(f"{path}/") for name in commit.files):
            entries.append(_folder_entry(path, commit))
    expand = form.get("expand", ["false"])[0].lower() == "true"
    return [_with_commit(entry, commit, expand) for entry in entries]


def resolve(hub, request, kind, repo, view, revision, path):
    """`file_download.get_hf_file_metadata` (HEAD) and `http_get`: small files from here, large ones from storage."""
    repository = find_repository(hub, request, kind or "models", repo, content=True)
    commit = repository.resolve(revision)
    headers = {"X-Repo-Commit": commit.oid}
    blob = commit.files.get(path)
    if blob is None:
        # With the commit's id: the client notes for it that the file is not there.
        value = {"error": "Entry not found"}
        return json_reply(value, 404, **headers, **{"X-Error-Code": "EntryNotFound", "X-Error-Message": value["error"]})
    if view == "raw":
        return _content(request, blob.pointer if blob.lfs else blob.content, blob.git_oid, headers)
    name = quote(path.rsplit("/", 1)[-1])
    headers["Content-Disposition"] = f"inline; filename*=UTF-8''{name}"
    if not blob.lfs:
        return _content(request, blob.content, blob.etag, headers)
    hub.stored[blob.sha256] = blob.content
    headers |= {"X-Linked-Size": str(len(blob.content)), "X-Linked-ETag": f'"{blob.sha256}"'}
    return Reply(302, b"", headers | {"Location": hub.signed_url(f"/objects/{blob.sha256}")})


def download(hub, request, oid):
    """Storage's side of `http_get`. As at a real one, a token that strays here is an error."""
    hub.check_signature(request)
    if "authorization" in request.headers:
        raise HubError(400, "Only one auth mechanism allowed")
    return _content(request, hub.stored[oid], oid, {})


def _content(request, content: bytes, etag: str, headers: dict[str, str]) -> Reply:
    """A body, or the part of it that the `Range` header asks for (`http_get` after a broken download)."""
    headers = headers | {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if not asked:
        return Reply(200, content, headers)
    first, last = asked.groups()
    start = int(first) if first else max(len(content) - int(last or 0), 0)
    stop = min(int(last) + 1, len(content)) if first and last else len(content)
    if start >= stop:
        return Reply(416, b"", headers | {"Content-Range": f"bytes */{len(content)}"})
    return Reply(206, content[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"})
