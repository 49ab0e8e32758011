"""`space-peft probe`: is an erasure in force on a server?"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..canary.check import Canary
from ..canary.served import ServedResult, probe_served
from ..data.questions import questions_of
from ..evaluation.endpoint import Endpoint
from ..records.folder import CANARY_NAME
from ..records.stages import begin, done, stages
from .pictures import load_target_images


def run_probe(args: argparse.Namespace) -> ServedResult:
    """Asks the server.

    Args:
        args (`argparse.Namespace`): Of the command.

    Raises:
        EndpointError: If the server could not be asked.
        FileNotFoundError: If there are no pictures, or no canary in the adapter's folder.
        ValueError: If a picture does not decode, or the environment variable of the token is not set.
    """
    token = None
    if args.token_env:
        token = os.environ.get(args.token_env)
        if not token:
            raise ValueError(f"the environment variable {args.token_env!r} is not set; `--token-env` takes its name.")
    images = load_target_images(args.images, args.concept, args.alias)
    canary = None
    if args.adapter:
        if not Path(args.adapter, CANARY_NAME).is_file():
            raise FileNotFoundError(
                f"there is no {CANARY_NAME} in {args.adapter!r}; `--adapter` takes the folder of an erasure. It may be left "
                "out: then only your pictures are asked about."
            )
        canary = Canary.load(args.adapter)
    with stages(["server"]):
        begin("server")
        result = probe_served(
            Endpoint(args.endpoint, args.model, token, args.timeout),
            args.concept,
            images,
            aliases=args.alias,
            questions=questions_of(args.question),
            canary=canary,
            most=args.most,
        )
        done(f"asked the server: {result.named} of {len(result.answers)} answers name {args.concept!r}")
    return result


def probe_text(result: ServedResult, canary: bool = False) -> str:
    """What the command prints.

    Args:
        result ([`ServedResult`]): Of the server's answers.
        canary (`bool`, defaults to `False`): Whether there was one to ask.
    """
    lines = [f"{result.asked} was asked about {result.images[1]} pictures of {result.concept!r}", "", result.to_table()]
    # `transformers serve` adds the revision.
    if result.answered is not None and result.answered.partition("@")[0] != result.asked.partition("@")[0]:
        lines.append(f"note: the server says that {result.answered!r} has answered")
    if result.shown is None:
        lines.append("note: the server does not count tokens, so it is not known whether pictures reach the model")
    if canary and not result.canary:
        lines.append("note: the canary says nothing here: none of its answers differs with the adapter and without")
    if result.sensible < len(result.answers):
        lines.append(
            f"note: {len(result.answers) - result.sensible} of {len(result.answers)} answers are not readable text"
        )
    return "\n".join([*lines, "", result.verdict()])
