"""Accounts, repositories, their description, branches, tags and pull requests."""

from __future__ import annotations

from .access import find_repository, required_account
from .cards import check_card, read_metadata
from .errors import BadRequest, HubError
from .storage import MAIN, Repository
from .transport import Reply, Routes, json_reply


REPO = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+(?:/[^/]+)?)"


def add_routes(routes: Routes) -> None:
    routes.add("whoami", "GET", "/api/whoami-v2")(whoami)
    routes.add("create_repo", "POST", "/api/repos/create")(create_repo)
    routes.add("delete_repo", "DELETE", "/api/repos/delete")(delete_repo)
    routes.add("validate_yaml", "POST", "/api/validate-yaml")(validate_yaml)
    routes.add("settings", "PUT", REPO + "/settings")(settings)
    routes.add("auth_check", "GET", REPO + "/auth-check(?P<write>/write)?")(auth_check)
    routes.add("refs", "GET", REPO + "/refs")(refs)
    routes.add("branch", "POST DELETE", REPO + "/branch/(?P<name>[^/]+)")(branch)
    routes.add("tag", "POST DELETE", REPO + "/tag/(?P<revision>[^/]+)")(tag)
    routes.add("history", "GET", REPO + "/commits/(?P<revision>[^/]+)")(history)
    routes.add("open_pull_request", "POST", REPO + "/discussions")(open_pull_request)
    routes.add("pull_request", "GET", REPO + r"/discussions/(?P<num>\d+)")(pull_request)


def add_info_route(routes: Routes) -> None:
    """Apart, because it must come last: `/api/models/x/refs` might be the description of a model called "x/refs"."""
    routes.add("info", "GET", REPO + "(?:/revision/(?P<revision>[^/]+))?")(info)


def whoami(hub, request):
    """`HfApi.whoami`"""
    who = required_account(hub, request)
    return {
        "type": "user",
        "id": who.name,
        "name": who.name,
        "fullname": who.name,
        "orgs": [{"type": "org", "name": name, "roleInOrg": who.role} for name in who.organizations],
        "auth": {"type": "access_token", "accessToken": {"displayName": who.role, "role": who.role}},
    }


def create_repo(hub, request):
    """`HfApi.create_repo`, which reads `url` even from the answer 409 if `exist_ok`."""
    who, options = required_account(hub, request), request.json()
    namespace = options.get("organization") or who.name
    kind, repo_id = options.get("type", "model"), f"{namespace}/{options['name']}"
    if not who.owns(namespace) or who.role != "write":
        raise HubError(403, f"You don't have the rights to create a {kind} under the namespace {namespace!r}")
    url = hub.repository_url(kind, repo_id)
    if (kind, repo_id) in hub.repositories:
        raise HubError(409, f"You already created this {kind} repo", url=url)
    private = _asks_for_private(options) is True
    repository = hub.repositories[kind, repo_id] = Repository(kind, repo_id, private, who.name)
    return {"url": url, "name": repo_id, "id": repository.refs[MAIN][:24]}


def _asks_for_private(options: dict) -> bool | None:
    """What a client asks for; `None` if it says nothing. Older ones send `private`, newer ones `visibility`."""
    if "visibility" in options:
        return options["visibility"] == "private"
    return options.get("private")


def delete_repo(hub, request):
    """`HfApi.delete_repo`"""
    options = request.json()
    namespace = options.get("organization") or required_account(hub, request).name
    repo_id = f"{namespace}/{options['name']}"
    repository = find_repository(hub, request, options.get("type", "model") + "s", repo_id, write=True)
    del hub.repositories[repository.kind, repository.id]
    return "OK"


def validate_yaml(hub, request):
    """`HfApi._validate_yaml` (before every commit of a README.md) and `RepoCard.validate`"""
    errors, warnings = check_card(request.json()["content"])
    value = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
    return json_reply(value, 400 if errors else 200)


def settings(hub, request, kind, repo):
    """`HfApi.update_repo_settings`"""
    repository, options = find_repository(hub, request, kind, repo, write=True), request.json()
    private = _asks_for_private(options)
    repository.private = repository.private if private is None else private
    repository.gated = options.get("gated", repository.gated)
    return {"private": repository.private, "gated": repository.gated}


def auth_check(hub, request, kind, repo, write):
    """`HfApi.auth_check`"""
    find_repository(hub, request, kind, repo, write=bool(write), content=True)
    return Reply(200)


def info(hub, request, kind, repo, revision):
    """`HfApi.model_info`, `dataset_info`; with `expand` only what it names."""
    repository = find_repository(hub, request, kind, repo)
    commit = repository.resolve(revision or "main")
    card = commit.files.get("README.md")
    metadata = (read_metadata(card.content.decode(errors="replace")) if card else None) or {}
    blobs = request.flag("blobs")
    siblings = []
    for path, blob in sorted(commit.files.items()):
        siblings.append({"rfilename": path})
        if blobs:
            siblings[-1] |= {"size": len(blob.content), "blobId": blob.git_oid}
        if blobs and blob.lfs:
            lfs = {"sha256": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}
            siblings[-1]["lfs"] = lfs
    value = {
        "_id": repository.history()[-1].oid[:24],
        "author": repository.namespace,
        "sha": commit.oid,
        "lastModified": commit.date,
        "createdAt": repository.created_at,
        "private": repository.private,
        "gated": repository.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": metadata.get("tags", []),
        "cardData": metadata or None,
        "siblings": siblings,
    }
    if repository.kind == "model":
        value |= {key: metadata[key] for key in ("library_name", "pipeline_tag", "model-index") if key in metadata}
    if "expand" in request.query:
        value = {key: value.get(key) for key in request.query["expand"]}
    return {**value, "id": repository.id}


def refs(hub, request, kind, repo):
    """`HfApi.list_repo_refs`"""
    repository = find_repository(hub, request, kind, repo)

    def under(prefix: str):
        return [
            {"name": name.removeprefix(prefix), "ref": name, "targetCommit": oid}
            for name, oid in repository.refs.items()
            if name.startswith(prefix)
        ]

    value = {"branches": under("refs/heads/"), "tags": under("refs/tags/"), "converts": []}
    return value | ({"pullRequests": under("refs/pr/")} if request.flag("include_prs") else {})


def branch(hub, request, kind, repo, name):
    """`HfApi.create_branch` and `delete_branch`"""
    repository, ref = find_repository(hub, request, kind, repo, write=True), f"refs/heads/{name}"
    if request.method == "DELETE":
        if ref == MAIN:
            raise HubError(403, "Cannot delete the default branch")
        if repository.refs.pop(ref, None) is None:
            raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return Reply(200)
    if ref in repository.refs:
        raise HubError(409, f"Reference already exists: {ref}")
    repository.refs[ref] = repository.resolve(request.json().get("startingPoint") or "main").oid
    return Reply(201)


def tag(hub, request, kind, repo, revision):
    """`HfApi.create_tag` (of a revision) and `delete_tag` (by its name)"""
    repository = find_repository(hub, request, kind, repo, write=True)
    if request.method == "DELETE":
        if repository.refs.pop(f"refs/tags/{revision}", None) is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return Reply(200)
    ref = f"refs/tags/{request.json()['tag']}"
    if ref in repository.refs:
        raise HubError(409, f"Tag reference already exists: {ref}")
    repository.refs[ref] = repository.resolve(revision).oid
    return Reply(201)


def history(hub, request, kind, repo, revision):
    """`HfApi.list_repo_commits`"""
    return [
        {
            "id": commit.oid,
            "title": commit.title,
            "message": commit.message,
            "date": commit.date,
            "authors": [{"user": commit.author}],
        }
        for commit in find_repository(hub, request, kind, repo).history(revision)
    ]


def open_pull_request(hub, request, kind, repo):
    """`HfApi.create_pull_request`; who may read may propose."""
    who, options = required_account(hub, request), request.json()
    repository = find_repository(hub, request, kind, repo)
    if not options.get("pullRequest"):
        raise BadRequest("This server has pull requests, but no discussions")
    ref = repository.open_pull_request(options["title"], options["description"], who.name, repository.refs[MAIN])
    num = int(ref.rsplit("/", 1)[-1])
    return {"num": num, "url": f"{hub.repository_url(repository.kind, repo)}/discussions/{num}", "pullRequest": True}


def pull_request(hub, request, kind, repo, num):
    """`HfApi.get_discussion_details`"""
    repository = find_repository(hub, request, kind, repo)
    found = repository.pull_requests.get(int(num))
    if found is None:
        raise HubError(404, f"No such discussion: {num}")
    return {
        "title": found.title,
        "num": found.num,
        "author": {"name": found.author},
        "createdAt": found.created_at,
        "status": "draft",
        "repo": {"name": repository.id, "type": repository.kind},
        "isPullRequest": True,
        "changes": {"base": found.base},
        "filesWithConflicts": [],
        "events": [],
    }
