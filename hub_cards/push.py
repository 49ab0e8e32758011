"""`push_erasure`: an adapter folder to the Hub, with everything that makes its claim checkable and nothing local."""

from __future__ import annotations

import logging
import os
import tempfile

from huggingface_hub import CommitInfo

from space_peft.records.stages import begin, done

from .commit import commit_folder
from .staging import stage


logger = logging.getLogger(__name__)

DEFAULT_MESSAGE = "Upload erasure with space-peft"


def push_erasure(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    base_model: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
    redact: bool = False,
    include_images: bool = False,
    include_answers: bool = False,
    include_null_spaces: bool = False,
    retries: int = 5,
) -> CommitInfo:
    """Publishes an adapter folder in one commit: weights, configurations, certificate, provenance, card, pictures.

    The repository's card is generated from the results in the folder, so a later push updates it. A README.md in the
    folder that a person wrote is published as it is. Files of a former push that are gone are deleted; what others put
    into the repository stays.

    Server errors, timeouts and dropped connections are retried. Each commit names the one it builds on: it is made once
    or not at all, and a push that fails leaves the repository's files as they were.

    Args:
        folder (`str` or `os.PathLike`): A trainer's `output_dir` after `save_model()`. It is not changed, but for the
            salt of a redaction.
        repo_id (`str`): Repository on the Hub; created if there is none.
        base_model (`str`, *optional*): Hub id of the base model; by default the one the folder records. Must be given
            if the model was loaded from a folder.
        private (`bool`, *optional*): Whether a repository that is created is private; the owner's default if `None`.
        revision (`str`, *optional*): Branch to push to; created if there is none.
        create_pr (`bool`, defaults to `False`): Open a pull request instead.
        commit_message (`str`, *optional*): First line of the commit.
        token (`str` or `bool`, *optional*): As in huggingface_hub.
        redact (`bool`, defaults to `False`): Publish a salted hash instead of the concept's name, see
            `space_peft.hub_cards.redaction`. Commits made before keep what they hold.
        include_images (`bool`, defaults to `False`): Publish the anchors' images of the canary, too. The licences of
            the pool's images must allow it.
        include_answers (`bool`, defaults to `False`): Publish every answer of the evaluation.
        include_null_spaces (`bool`, defaults to `False`): Publish the null spaces.
        retries (`int`, defaults to 5): Attempts after the first.

    Returns:
        [`~huggingface_hub.CommitInfo`]

    Raises:
        FileNotFoundError: If the folder holds no adapter.
        ValueError: If something in the folder must not be published; see [`~space_peft.hub_cards.staging.stage`].
        huggingface_hub.errors.HfHubHTTPError: If the Hub refuses; the message says what to do.
        RuntimeError: If somebody else changed the same files at the same time.
    """
    begin("prepare")
    with tempfile.TemporaryDirectory(prefix="space-peft-") as staged:
        stage(
            folder,
            staged,
            repo_id=repo_id,
            base_model=base_model,
            token=token,
            redact=redact,
            announced=[text for text in (commit_message, revision) if text],
            include_images=include_images,
            include_answers=include_answers,
            include_null_spaces=include_null_spaces,
        )
        begin("upload")
        commit = commit_folder(
            staged,
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or DEFAULT_MESSAGE,
            token=token,
            retries=retries,
        )
        done(f"uploaded to {repo_id}")
    return commit
