"""The command `space-peft`."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .._version import __version__
from ..choices import DEVICES, DTYPES, did_you_mean, nearest
from ..records.stages import stages
from .erase_options import given_options
from .errors import BadInput, bad_input
from .judging import add_judging
from .options import (
    Help,
    add_config,
    add_json,
    as_notes,
    called,
    check_json,
    quietly,
    refuse_misspelt,
    refuse_unknown,
    short_usage,
    tell,
    with_config,
    without_bars,
    without_developers_warnings,
)
from .places import EMBEDDED, LOADING, check_places, import_modules, model_place, take_config
from .planned import add_plan, is_of_erase


# Commands that read data or load a model, and so import what draws bars of it.
WITH_DATA = ("demo", "erase", "anchors", "probe", *LOADING)
# Commands with so many options that one writes them down.
CONFIGURABLE = ("push", "verify", "audit", "plan", "probe", "bench", "evaluate", "attack")


def _demo(args: argparse.Namespace) -> int:
    # Imported here so that `space-peft --help` does not wait for torch.
    from ..data.names import check_concept
    from ..demo import demo_concepts
    from ..demo.pipeline import run_demo
    from ..records.folder import CARD_NAME, PICTURES_FOLDER, contents_table

    with bad_input("demo"):
        check_concept(args.concept)
    names = demo_concepts()
    if args.concept not in names:
        near = nearest(args.concept, names, most=5, cutoff=0.3) or names[:5]
        print(
            f"space-peft demo: the embedded model knows no {args.concept!r}; nearest names: {', '.join(near)}.",
            file=sys.stderr,
        )
        return 2
    try:
        report = run_demo(args.concept, args.output, seed=args.seed)
    except FileExistsError as error:  # Of the user's own; what else goes wrong here is ours.
        print(f"space-peft demo: {error}", file=sys.stderr)
        return 2
    lines = [report.to_table(), "", "In sentences:"]
    for question, before, after in report.sentences(4):
        lines.append(f"  {question}\n    before: {before}\n    after:  {after}")
    lines += [
        f"\nIn {args.output}:\n{contents_table(args.output)}",
        "Next:",
        f"  look      {args.output}/{PICTURES_FOLDER}/answers.png, {args.output}/{CARD_NAME}",
        f"  audit     {called()} audit --adapter {args.output} --concept {shlex.quote(args.concept)} --question 'what is this?'",
        f"  check     {called()} verify {args.output} --base-model {EMBEDDED}",
        f"  your own  {called()} plan MODEL says what it takes, {called()} erase --help how it is done",
    ]
    tell(args, "\n".join(lines), {"folder": args.output, **report.to_dict(), "verdict": report.verdict})
    return 0 if report.verdict == "erased" else 1


def _merge(args: argparse.Namespace) -> int:
    from ..hub_cards.merge import merge_adapter

    with bad_input("merge"), stages(["load", "merge", "save"]):
        folder = merge_adapter(args.adapter, args.output, base_model=args.base_model)
    lines = [
        f"The model with the adapter in its weights is in {folder}",
        "Next:",
        f"  serve     transformers serve, or vllm serve {folder}; requests name the model {folder}",
        "  ask it    space-peft probe --endpoint http://localhost:8000 --concept NAME --images PICTURES",
        f"  judge     space-peft evaluate --merged {folder} --base-model ORIGINAL --concept NAME --images PICTURES",
        "  keep      the original: a merge cannot be undone",
    ]
    tell(args, "\n".join(lines), {"folder": str(folder)})
    return 0


def _stats(args: argparse.Namespace) -> int:
    from .stats import run_stats

    with bad_input("stats"):
        made = run_stats(args)
    size = f"{made.num_bytes / 2**20:.1f} MiB"
    content = {"folder": args.output, "layers": len(made), "rows": made.rows, "bytes": made.num_bytes}
    tell(args, f"Statistics of {len(made)} layers over {made.rows} rows, {size}, are in {args.output}", content)
    return 0


def _card(args: argparse.Namespace) -> int:
    from ..hub_cards import write_card
    from ..hub_cards.staging import is_handwritten
    from ..records.folder import CARD_NAME

    readme = Path(args.folder, CARD_NAME)
    if is_handwritten(readme) and not args.overwrite:
        print(f"space-peft card: a person wrote {readme}; --overwrite replaces it.", file=sys.stderr)
        return 2
    with bad_input("card"):
        path = write_card(args.folder, base_model=args.base_model, license=args.license, repo_id=args.repo_id)
    tell(args, f"The card is {path}", {"card": str(path)})
    return 0


def _push(args: argparse.Namespace) -> int:
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    from ..hub_cards import push_erasure

    own = ("command", "run", "folder", "repo", "config", "json", "out")
    options = {key: value for key, value in vars(args).items() if key not in own}
    with bad_input("push"):
        try:
            with stages(["prepare", "upload"]):
                commit = push_erasure(args.folder, args.repo, **options)
        except (HfHubHTTPError, HTTPError, ConnectionError, RuntimeError) as error:
            print(f"space-peft push: {error}", file=sys.stderr)
            return 1
    url = commit.pr_url or commit.commit_url
    tell(args, url, {"url": url, "commit": commit.oid})
    return 0


def _verify(args: argparse.Namespace) -> int:
    from ..data.loading import load_rows
    from ..hub_cards import verify_erasure
    from .pictures import load_target_images

    asked = {
        "files": True, "load": True, "claims": True, "questions": not args.no_canary, "change": args.retain_data,
        "name": args.images or args.audit,
    }  # fmt: skip
    with bad_input("verify"), stages([key for key, given in asked.items() if given]):
        images = None if args.images is None else load_target_images(args.images, args.concept)
        report = verify_erasure(
            args.adapter,
            revision=args.revision,
            base_model=args.base_model,
            retain_dataset=None if args.retain_data is None else load_rows(args.retain_data),
            canary=not args.no_canary,
            audit=args.audit,
            concept=args.concept,
            images=images,
            question=args.question,
            steps=args.steps,
            dtype=args.dtype,
        )
    tell(args, report.to_text(), report.to_dict())
    return report.exit_code


def _audit(args: argparse.Namespace) -> int:
    from .audit import run_audit

    with bad_input("audit"):
        report = run_audit(args)
    tell(args, f"{report.to_table()}\n\nThe searches, step by step, are in {args.output}", report.to_dict())
    return 0


def _bench(args: argparse.Namespace) -> int:
    from .bench import bench_command, bench_table

    with bad_input("bench", ImportError):
        content = bench_command(args)
    tell(args, f"{bench_table(content)}\n\nFigures, answers and the picture are in {args.output}", content)
    return 0


def _probe(args: argparse.Namespace) -> int:
    from ..evaluation.endpoint import EndpointError
    from .probe import probe_text, run_probe

    with bad_input("probe", EndpointError):
        result = run_probe(args)
    tell(args, probe_text(result, canary=args.adapter is not None), result.to_dict())
    return 0 if result.in_force else 1


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command `space-peft`."""
    return _parsers()[0]


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and those of its commands by name."""
    parser = argparse.ArgumentParser(
        prog="space-peft",
        description="Make a multimodal LLM forget a concept without a picture of it.",
        usage="%(prog)s COMMAND [options]",
        epilog="space-peft COMMAND --help shows a command's options.",
        formatter_class=Help,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", prog=parser.prog)
    demo = commands.add_parser(
        "demo", help="erase a concept from the embedded model and show what was forgotten and what was kept"
    )
    demo.add_argument("--concept", default="fox", help="a name the embedded model knows (default: fox)")
    demo.add_argument("--output", default="outputs/demo", help="folder to write to (default: outputs/demo)")
    demo.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    demo.set_defaults(run=_demo)
    commands.add_parser("anchors", help="find and refine the images that stand in for a concept", add_help=False)
    commands.add_parser("erase", help="erase a concept from your model (--config FILE.yaml, or flags)", add_help=False)
    merge = commands.add_parser("merge", help="write the model with an adapter added to its weights")
    merge.add_argument("adapter", help="folder or Hub id of the adapter")
    merge.add_argument("output", help="folder to write; must not exist")
    merge.add_argument("--base-model", help="folder or Hub id, if not the one the adapter's config names")
    merge.set_defaults(run=_merge)
    stats = commands.add_parser(
        "stats", help="write statistics of a model, with which it is erased without retained data"
    )
    stats.add_argument("model", help="folder or Hub id of the base model; demo: the embedded one")
    stats.add_argument(
        "--data",
        required=True,
        help="retained rows in TRL's formats: a folder, a file or a Hub id",
    )
    stats.add_argument("--output", required=True, help="folder to write to")
    stats.add_argument("--device", choices=DEVICES, help="where it runs (default: a GPU if there is one)")
    stats.add_argument("--batch-size", type=int, default=32, help="rows per forward pass (default: 32)")
    stats.add_argument(
        "--tokens-per-row", type=int, default=64, help="most tokens of each kind counted per row (default: 64)"
    )
    stats.add_argument("--push", metavar="REPO", help="publish them on the Hub as well")
    stats.set_defaults(run=_stats)
    card = commands.add_parser("card", help="write the model card of an adapter folder")
    card.add_argument("folder", help="folder of the adapter")
    card.add_argument("--base-model", help="Hub id of the base model, if the folder records a path or nothing")
    card.add_argument("--license", help="licence identifier of the Hub (default: the base model's)")
    card.add_argument("--repo-id", help="where the adapter will be, for the code on the card")
    card.add_argument("--overwrite", action="store_true", help="replace a README.md that a person wrote")
    card.set_defaults(run=_card)
    push = commands.add_parser("push", help="publish an adapter folder with its card, certificate and results")
    push.add_argument("folder", help="folder of the adapter")
    push.add_argument("repo", help="repository on the Hub; created if there is none")
    push.add_argument("--base-model", help="Hub id of the base model, if the folder records a path or nothing")
    visibility = push.add_mutually_exclusive_group()
    visibility.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    visibility.add_argument("--public", action="store_false", dest="private", help="make a new repository public")
    push.add_argument("--revision", help="branch; created if there is none")
    push.add_argument("--create-pr", action="store_true", help="open a pull request")
    push.add_argument("--commit-message", metavar="TEXT")
    push.add_argument("--token", help="Hub token; `hf auth login` is safer, as others can see a command line")
    push.add_argument("--redact", action="store_true", help="publish a salted hash instead of the concept's name")
    push.add_argument("--include-images", action="store_true", help="also publish the anchors' images of the canary")
    push.add_argument("--include-answers", action="store_true", help="also publish every answer of the evaluation")
    push.add_argument("--include-null-spaces", action="store_true", help="also publish the null spaces")
    push.add_argument(
        "--retries", type=int, default=5, metavar="N", help="attempts after a temporary error (default: 5)"
    )
    push.set_defaults(run=_push)
    verify = commands.add_parser("verify", help="check that a published erasure is what it says")
    verify.add_argument("adapter", help="folder or Hub id of the adapter")
    verify.add_argument("--revision", help="branch, tag or (best) commit of the adapter")
    verify.add_argument("--base-model", help="folder or Hub id, if not the one the adapter's config names")
    verify.add_argument(
        "--retain-data",
        metavar="DATA",
        help="retained rows to measure the certificate's change on: a folder, a file, or a Hub id, optionally with :split",
    )
    verify.add_argument("--no-canary", action="store_true", help="do not ask the canary's questions")
    verify.add_argument("--audit", action="store_true", help="search for an image that makes the model say the name")
    verify.add_argument("--concept", metavar="NAME", help="the name to search for (default: the one recorded)")
    verify.add_argument("--images", metavar="DATA", help="your own pictures of the concept, none of which may be named")
    verify.add_argument("--question", help="what the model is asked about pictures (default: the library's question)")
    verify.add_argument("--steps", type=int, default=100, help="steps of the search from each start (default: 100)")
    verify.set_defaults(run=_verify)
    audit = commands.add_parser("audit", help="search for an image that makes an erased model say the name")
    audit.add_argument("--concept", required=True, help="the erased name")
    audit.add_argument("--adapter", required=True, help="folder or Hub id of the adapter")
    audit.add_argument("--base-model", help="folder or Hub id, if not the one the adapter's config names")
    audit.add_argument("--images", metavar="DATA", help="pictures to start from, besides random noise")
    audit.add_argument("--restarts", type=int, default=4, help="starts from noise (default: 4)")
    audit.add_argument("--control-name", metavar="NAME", help="also search for a name the model does not know")
    audit.add_argument("--question", help="what the model is asked (default: the library's question)")
    audit.add_argument("--steps", type=int, default=100, help="steps of search from each start (default: 100)")
    audit.add_argument("--seed", type=int, default=0, help="random seed for noise and shifts (default: 0)")
    audit.add_argument("--output", default="outputs/audit", help="folder to write to (default: outputs/audit)")
    audit.set_defaults(run=_audit)
    add_judging(commands)
    add_plan(commands)
    probe = commands.add_parser("probe", help="ask a served model whether an erasure is in force")
    probe.add_argument(
        "--endpoint", required=True, metavar="URL", help="address of a server that speaks OpenAI's chat protocol"
    )
    probe.add_argument("--concept", required=True, metavar="NAME", help="the erased name")
    probe.add_argument(
        "--alias", action="append", default=[], metavar="NAME", help="another name for it; may be repeated"
    )
    probe.add_argument("--images", required=True, metavar="DATA", help="your own pictures of the concept")
    probe.add_argument(
        "--adapter", metavar="FOLDER", help="folder of the erasure: its canary's questions are asked as well"
    )
    probe.add_argument("--model", metavar="NAME", help="the server's name for it (default: the only one it lists)")
    probe.add_argument("--question", help="question that asks for the name (default: the library's questions)")
    probe.add_argument("--most", type=float, default=0.1, help="share of answers that may name it (default: 0.1)")
    probe.add_argument("--timeout", type=float, default=120, help="seconds to wait for an answer (default: 120)")
    probe.add_argument("--token-env", metavar="VARIABLE", help="environment variable that holds the server's token")
    probe.set_defaults(run=_probe)
    bench = commands.add_parser("bench", help="unlearn the people of a suite with several methods, and compare them")
    bench.add_argument(
        "--suite",
        required=True,
        help="people (in the package), mllmu, clear, fiubench, vlm_unbench, or own (your file)",
    )
    bench.add_argument("--source", help="Hub id, file or folder of the suite, if not its own on the Hub")
    bench.add_argument("--split", help="which people are forgotten, e.g. forget_5 (default: the suite's)")
    bench.add_argument("--model", required=True, help="folder or Hub id of the model; demo: the embedded one")
    bench.add_argument("--reference", help="folder or Hub id of a model trained without the forgotten people")
    bench.add_argument(
        "--methods", nargs="+", required=True, metavar="METHOD", help="one or more of space, ga, graddiff, kl, npo"
    )
    bench.add_argument("--pool", metavar="DATA", help="public pictures for space: a folder, a file or a Hub id")
    bench.add_argument("--steps", type=int, default=60, help="training steps; for space, per person (default: 60)")
    bench.add_argument("--learning-rate", type=float, help="for all methods (default: each method's own)")
    bench.add_argument("--batch-size", type=int, default=16, help="questions or rows at once (default: 16)")
    bench.add_argument("--seed", type=int, default=0, help="random seed for training and pictures (default: 0)")
    bench.add_argument("--limit", type=int, metavar="N", help="the first N subjects of each split only")
    bench.add_argument("--output", default="outputs/bench", help="folder to write to (default: outputs/bench)")
    bench.set_defaults(run=_bench)
    for name in LOADING:
        commands.choices[name].add_argument(
            "--import",
            dest="modules",
            action="append",
            default=[],
            metavar="MODULE",
            help="a Python module of your own that registers the model's class; may be repeated",
        )
    for name in ("stats", "verify", "audit", "evaluate", "attack"):
        commands.choices[name].add_argument(
            "--dtype", choices=DTYPES, help="precision to load the model in (default: as saved; float32 on a CPU)"
        )
    for name, command in commands.choices.items():
        if name not in FROM_DATACLASSES:
            if name in CONFIGURABLE:
                add_config(command)
            add_json(command)
            command.formatter_class = Help
            short_usage(command)
    for own in commands.choices.values():
        own.allow_abbrev = False  # A flag that is cut short is one that is misspelt.
    return parser, commands.choices


def _erase(args: argparse.Namespace) -> int:
    with bad_input("erase", TypeError):
        began = time.perf_counter()
        from .erase import run_erase

        erased = run_erase(args.rest, args.config, began)
    tell(args, erased.summary(), erased.to_dict())
    # Of test pictures: without any nothing was asked, and nothing is claimed.
    return 1 if any(verdict != "erased" for verdict in erased.verdicts().values()) else 0


def _anchors(args: argparse.Namespace) -> int:
    with bad_input("anchors", TypeError):
        from .anchors import anchors_content, anchors_text, run_anchors

        made, folder = run_anchors(args.rest, args.config)
    tell(args, anchors_text(made, folder), anchors_content(made, folder))
    return 0


# Their options are the fields of dataclasses, whose modules import torch.
FROM_DATACLASSES = {"erase": _erase, "anchors": _anchors}


def _parse_first(command: str, argv: Sequence[str]) -> argparse.Namespace:
    """What all commands have, before the parser of a command whose options are in `rest`."""
    parser = argparse.ArgumentParser(prog=f"space-peft {command}", add_help=False, allow_abbrev=False)
    add_json(parser)
    with bad_input(command):
        config, argv = take_config(argv)
    args, rest = parser.parse_known_args(argv)
    args.command, args.config, args.rest, args.run = command, config, rest, FROM_DATACLASSES[command]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv (`list[str]`, *optional*): Arguments; those of the process by default.

    Returns:
        `int`: Exit code: 0 for success, 2 for bad input, 1 for a check, erasure, push or plan that failed; see docs/cli.md.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv else None
    try:
        if name in FROM_DATACLASSES:
            args = _parse_first(name, argv[1:])
            with bad_input(name):
                places = given_options(name, args.rest, args.config)
        else:
            parser, commands = _parsers()
            if name is not None and not name.startswith("-") and name not in commands:
                hint = did_you_mean(name, commands) or "space-peft --help lists them all."
                print(f"space-peft: there is no command {name!r}; {hint}", file=sys.stderr)
                return 2
            if name in commands:
                with bad_input(name):
                    refuse_misspelt(argv[1:], commands[name], name)
            if name in CONFIGURABLE:
                with bad_input(name):
                    passed_over = is_of_erase if name == "plan" else None
                    argv[1:] = with_config(commands[name], argv[1:], name, passed_over)
            args, rest = parser.parse_known_args(argv)
            with bad_input(args.command):
                refuse_unknown(rest, commands[args.command], args.command)
            places = vars(args)
        with bad_input(args.command):
            if places.get("base_model") == EMBEDDED:
                args.base_model = model_place(EMBEDDED)
            check_places(args.command, places)
            check_json(args.json)
            import_modules(getattr(args, "modules", ()))
        bars = without_bars() if args.command in WITH_DATA else contextlib.nullcontext()
        with quietly(args), without_developers_warnings(), as_notes(), bars:
            return args.run(args)
    except BadInput:
        return 2
