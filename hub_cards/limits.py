"""Running what an untrusted folder brings along, a pattern or a template, where it cannot take forever or all memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence


SECONDS, MEGABYTES = 10, 4096
_LONGEST_PATTERN, LONGEST_TEMPLATE, _LONGEST_RENDERING = 2**14, 2**16, 2**20

# Run before either job: neither memory nor, should the parent be killed, time is unlimited. Not on Windows.
_LIMIT = """
import json, sys
job = json.load(sys.stdin)
try:
    import resource
except ImportError:
    pass
else:
    resource.setrlimit(resource.RLIMIT_AS, (job["bytes"], job["bytes"]))
    resource.setrlimit(resource.RLIMIT_CPU, (job["seconds"], job["seconds"]))
"""
# As PEFT matches them.
_MATCH = """
import re
for pattern, name in ((pattern, name) for pattern in job["whole"] for name in job["names"]):
    re.fullmatch(pattern, name)
for pattern, name in ((pattern, name) for pattern in job["endings"] for name in job["names"]):
    re.match(rf"(.*\\.)?({pattern})$", name)
    re.match(rf"(.*\\.)?{pattern}$", name)
for pattern, name in ((pattern, name) for pattern in job["layers"] for name in job["names"]):
    re.match(rf"(?:^|.*?\\.){pattern}\\.(?P<idx>\\d+)\\.", name)
"""
_RENDER = """
from transformers.utils.chat_template_utils import render_jinja_template
for conversation in job["conversations"]:
    (text,), _ = render_jinja_template(
        conversations=[conversation], chat_template=job["template"], add_generation_prompt=True, **job["tokens"]
    )
    if len(text) > job["longest"]:
        sys.exit(f"it writes {len(text)} characters, more than {job['longest']}")
"""


def check_patterns(
    *,
    whole: Sequence[str] = (),
    endings: Sequence[str] = (),
    layers: Sequence[str] = (),
    names: Sequence[str],
    where: str,
) -> None:
    """Matches regular expressions against all names, in another process: here they would hang this one.

    Args:
        whole (`Sequence[str]`): Patterns of whole names: `target_modules`, `exclude_modules`.
        endings (`Sequence[str]`): Of their ends: the keys of `rank_pattern` and `alpha_pattern`.
        layers (`Sequence[str]`): Of what stands before a layer's number: `layers_pattern`.
        names (`Sequence[str]`): What they will be matched against.
        where (`str`): What holds them, for the error.

    Raises:
        ValueError: If a pattern is too long, no pattern, or not done within the limits.
    """
    for pattern in (*whole, *endings, *layers):
        if len(pattern) > _LONGEST_PATTERN:
            raise ValueError(
                f"{where} holds a pattern of {len(pattern)} characters; the longest allowed is {_LONGEST_PATTERN}."
            )
    # Letters, digits, "_" and "." match in one go; most adapters have no others, and no process is started then.
    harmless = lambda pattern: all(part.isalnum() for part in pattern.replace("_", ".").split(".") if part)  # noqa: E731
    if whole or not all(map(harmless, (*endings, *layers))):
        job = {"whole": list(whole), "endings": list(endings), "layers": list(layers), "names": list(names)}
        _run(_MATCH, job, f"the regular expressions of {where}")


def check_template(
    template: str, conversations: Sequence[Sequence[Mapping]], tokens: Mapping[str, str], *, where: str
) -> None:
    """Renders conversations by a chat template, in another process.

    Args:
        template (`str`): The Jinja template.
        conversations (`Sequence[list[dict]]`): What will be rendered.
        tokens (`Mapping[str, str]`): The tokenizer's special tokens, by name.
        where (`str`): What holds the template, for the error.

    Raises:
        ValueError: If the template is too long, fails, or is not done within the limits.
    """
    if len(template) > LONGEST_TEMPLATE:
        raise ValueError(
            f"{where} has {len(template)} characters; the longest template allowed has {LONGEST_TEMPLATE}."
        )
    job = {
        "template": template, "conversations": list(conversations), "tokens": dict(tokens), "longest": _LONGEST_RENDERING,
    }  # fmt: skip
    _run(_RENDER, job, f"the chat template of {where}")


def _run(script: str, job: dict, what: str) -> None:
    job = {**job, "seconds": SECONDS, "bytes": MEGABYTES * 2**20}
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _LIMIT + script], input=json.dumps(job), capture_output=True, text=True,
            timeout=2 * SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{what} take longer than {SECONDS} seconds; do not load this adapter.") from error
    if done.returncode < 0:
        raise ValueError(f"{what} take longer than {SECONDS} seconds or too much memory; do not load this adapter.")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"{what} cannot be used: {last[:200]}")
