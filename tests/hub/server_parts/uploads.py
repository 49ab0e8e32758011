"""Uploading: ask how (preupload), send large files to storage (LFS), name everything in one commit."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json

from .access import find_repository
from .cards import check_card
from .errors import BadRequest, HubError
from .repos import REPO
from .storage import Blob, Repository, check_path, upload_mode
from .transport import Reply, Routes


GIT = r"/(?:(?P<kind>datasets|spaces)/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs"


def add_routes(routes: Routes) -> None:
    routes.add("preupload", "POST", REPO + "/preupload/(?P<revision>[^/]+)")(preupload)
    routes.add("commit", "POST", REPO + "/commit/(?P<revision>[^/]+)")(commit)
    routes.add("lfs_batch", "POST", GIT + "/objects/batch")(lfs_batch)
    routes.add("lfs_verify", "POST", GIT + "/verify")(lfs_verify)
    routes.add("lfs_complete", "POST", GIT + "/complete/(?P<oid>[0-9a-f]{64})")(lfs_complete)


def add_storage_routes(routes: Routes) -> None:
    routes.add("upload", "PUT", r"/objects/(?P<oid>[0-9a-f]{64})")(upload)
    routes.add("upload_part", "PUT", r"/objects/(?P<oid>[0-9a-f]{64})/(?P<part>\d+)")(upload_part)


def preupload(hub, request, kind, repo, revision):
    """`_commit_api._fetch_upload_modes`; `oid` lets the client leave unchanged files out of the commit."""
    repository = find_repository(hub, request, kind, repo, write=not request.flag("create_pr"))
    files = repository.resolve(revision).files
    answers = []
    for file in request.json()["files"]:
        mode = upload_mode(file["path"], file["size"], base64.b64decode(file["sample"]))
        present = files.get(file["path"])
        answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        answers[-1]["oid"] = present.etag if present else None
    return {"files": answers}


# Large files


def lfs_batch(hub, request, kind, repo):
    """`lfs.post_lfs_batch_info`: where to put each object; no `actions` for one that is there already."""
    repository = find_repository(hub, request, kind, repo, write=True)
    base = f"{hub.url}{request.path.removesuffix('/objects/batch')}"
    objects = []
    for wanted in request.json()["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        objects.append({"oid": oid, "size": size})
        if oid in repository.objects:
            continue
        if hub.part_size is not None and size > hub.part_size:  # `lfs._upload_multi_part`
            parts = range(1, -(-size // hub.part_size) + 1)
            header = {str(part): hub.signed_url(f"/objects/{oid}/{part}") for part in parts}
            upload = {"href": f"{base}/complete/{oid}", "header": {"chunk_size": str(hub.part_size), **header}}
        else:  # `lfs._upload_single_part`
            upload = {"href": hub.signed_url(f"/objects/{oid}")}
        objects[-1]["actions"] = {"upload": upload, "verify": {"href": f"{base}/verify"}}
    return {"transfer": "basic", "objects": objects}


def upload(hub, request, oid):
    """`lfs._upload_single_part`: to storage, which knows no accounts but signed addresses."""
    hub.check_signature(request)
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise BadRequest("The content's SHA-256 is not the one that was announced")
    hub.stored[oid] = request.body
    return Reply(200)


def upload_part(hub, request, oid, part):
    """`lfs._upload_parts_iteratively`; the ETag is asked for again in the end."""
    hub.check_signature(request)
    hub.parts.setdefault(oid, {})[int(part)] = request.body
    return Reply(200, headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})


def lfs_complete(hub, request, kind, repo, oid):
    """`lfs._upload_multi_part`'s last request. It carries no token: knowing the parts' ETags is the proof."""
    parts = hub.parts.get(oid, {})
    named = [(part["partNumber"], part["etag"].strip('"')) for part in request.json()["parts"]]
    if named != [(number, hashlib.md5(parts[number]).hexdigest()) for number in sorted(parts)]:
        raise BadRequest("The parts named are not those that were uploaded")
    content = b"".join(parts[number] for number in sorted(parts))
    if hashlib.sha256(content).hexdigest() != oid:
        raise BadRequest("The content's SHA-256 is not the one that was announced")
    hub.stored[oid] = content
    del hub.parts[oid]
    return {"success": True}


def lfs_verify(hub, request, kind, repo):
    """`lfs.lfs_upload`'s last step: only now the object belongs to the repository."""
    repository, named = find_repository(hub, request, kind, repo, write=True), request.json()
    content = hub.stored.get(named["oid"])
    if content is None or len(content) != named["size"]:
        raise HubError(404, f"Object {named['oid']} was not uploaded")
    repository.objects[named["oid"]] = content
    return {"oid": named["oid"], "size": named["size"]}


# Commits


def commit(hub, request, kind, repo, revision):
    """`_commit_api._send_commit`: one line of JSON for the header and for each file; all or nothing."""
    create_pr = request.flag("create_pr")
    repository = find_repository(hub, request, kind, repo, write=not create_pr)
    who = hub.account_name(request)
    lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    if not lines or lines[0].get("key") != "header" or not lines[0]["value"].get("summary"):
        raise BadRequest("A commit starts with a header that has a summary")
    header = lines[0]["value"]
    ref = repository.ref(revision)
    if ref is None or ref.startswith("refs/tags/"):
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    parent, expected = repository.refs[ref], header.get("parentCommit")
    if expected and create_pr:
        parent = repository.resolve(expected).oid
    elif expected and not parent.startswith(expected):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    changes = _changes(repository, repository.commits[parent].files, lines[1:])
    if "README.md" in changes and changes["README.md"] is not None:
        errors, _ = check_card(changes["README.md"].content.decode(errors="replace"))
        if errors:
            raise BadRequest("Invalid metadata in README.md: " + "; ".join(errors))
    if create_pr:
        ref = repository.open_pull_request(header["summary"], header.get("description", ""), who, parent)
    made = repository.commit(ref, changes, header["summary"], header.get("description", ""), who, parent)
    url = hub.repository_url(repository.kind, repository.id)
    return {
        "success": True,
        "commitOid": made.oid,
        "commitUrl": f"{url}/commit/{made.oid}",
        "pullRequestUrl": f"{url}/discussions/{ref.rsplit('/', 1)[-1]}" if create_pr else None,
        "hookOutput": "",
    }


def _changes(repository: Repository, files: dict[str, Blob], lines: list[dict]) -> dict[str, Blob | None]:
    """What a commit's lines do to `files`; raises before anything is done."""
    changes: dict[str, Blob | None] = {}
    for line in lines:
        key, value = line["key"], line["value"]
        path = check_path(value["path"].rstrip("/") if key == "deletedFolder" else value["path"])
        if key == "file":
            try:
                changes[path] = Blob(base64.b64decode(value["content"], validate=True))
            except binascii.Error as error:
                raise BadRequest(f"{path}: not base64") from error
        elif key == "lfsFile":
            content = repository.objects.get(value["oid"])
            if content is None or value.get("size", len(content)) != len(content):
                raise BadRequest(f"{path}: LFS pointer pointed to a file that does not exist")
            changes[path] = Blob(content, lfs=True)
        elif key == "deletedFile":
            if path not in files:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            changes[path] = None
        elif key == "deletedFolder":
            inside = [name for name in files if name.startswith(f"{path}/")]
            if not inside:
                raise HubError(404, f"A folder with this name doesn't exist: {path}", "EntryNotFound")
            changes.update(dict.fromkeys(inside))
        else:
            raise BadRequest(f"Unknown operation {key!r}")
    return changes
