"""Who asks, and what they may do; answers 401, 403 and 404 as the Hub does."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import HubError
from .storage import Repository


REPO_TYPES = {"models": "model", "datasets": "dataset", "spaces": "space", "": "model"}


@dataclass(frozen=True)
class Account:
    """What a token stands for."""

    name: str
    role: str  # "write" or "read"
    organizations: tuple[str, ...] = ()

    def owns(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.organizations


def account(hub, request) -> Account | None:
    """The owner of the request's token; `None` without one."""
    header = request.headers.get("authorization")
    if header is None:
        return None
    if header.removeprefix("Bearer ") not in hub.accounts:
        raise HubError(401, "Invalid credentials in Authorization header")
    return hub.accounts[header.removeprefix("Bearer ")]


def required_account(hub, request) -> Account:
    who = account(hub, request)
    if who is None:
        raise HubError(401, "Invalid username or password.")
    return who


def find_repository(hub, request, kind: str, repo_id: str, *, write: bool = False, content: bool = False) -> Repository:
    """The repository if the request may see it.

    Args:
        kind: "models", "datasets" or "spaces", as in the API's addresses.
        write: The request changes it: the token must have the right to.
        content: The request reads files: refused where access is by request only (gated).
    """
    who = account(hub, request)
    repository = hub.repositories.get((REPO_TYPES[kind], repo_id))
    owner = repository is not None and who is not None and who.owns(repository.namespace)
    if repository is None or (repository.private and not owner):
        # Whether it exists is nobody else's business: both cases look alike.
        if who is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        raise HubError(404, "Repository not found", "RepoNotFound")
    if write:
        if who is None:
            # `hf_raise_for_status` takes any 401 of an https address for RepositoryNotFoundError, but not of an http
            # one like ours; the code makes it raise the same.
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if not owner or who.role != "write":
            raise HubError(403, f"Forbidden: you must have write access to {repo_id} to do that")
    if content and repository.gated and not owner:
        raise HubError(401 if who is None else 403, f"Access to {repository.kind} {repo_id} is restricted", "GatedRepo")
    return repository
