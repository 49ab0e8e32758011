"""The command `space-peft`."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence


def _demo(args: argparse.Namespace) -> int:
    # Imported here so that `space-peft --help` does not wait for torch.
    from .demo import demo_concepts
    from .demo.pipeline import run_demo
    from .names import check_concept

    try:
        check_concept(args.concept)
    except ValueError as error:
        print(f"space-peft demo: {error}", file=sys.stderr)
        return 2
    names = demo_concepts()
    if args.concept not in names:
        near = difflib.get_close_matches(args.concept.lower(), names, n=5, cutoff=0.3) or names[:5]
        print(
            f"space-peft demo: the embedded model knows no {args.concept!r}; nearest names: {', '.join(near)}.",
            file=sys.stderr,
        )
        return 2
    report = run_demo(args.concept, args.output, seed=args.seed)
    print(report.to_table())
    print(f"\nAdapter, certificate, report and pictures are in {args.output}")
    return 0


def _merge(args: argparse.Namespace) -> int:
    from .merge import merge_adapter

    try:
        folder = merge_adapter(args.adapter, args.output, base_model=args.base_model)
    except (FileExistsError, ValueError) as error:
        print(f"space-peft merge: {error}", file=sys.stderr)
        return 2
    print(f"The model with the adapter in its weights is in {folder}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command `space-peft`."""
    parser = argparse.ArgumentParser(
        prog="space-peft", description="Make a multimodal LLM forget a concept without a picture of it."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo", help="erase a concept from the embedded model and show what was forgotten and what was kept"
    )
    demo.add_argument("--concept", default="fox", help="a name the embedded model knows (default: fox)")
    demo.add_argument("--output", default="outputs/demo", help="folder to write to (default: outputs/demo)")
    demo.add_argument("--seed", type=int, default=0, help="of anchors, adapter and order of the data (default: 0)")
    demo.set_defaults(run=_demo)
    merge = commands.add_parser("merge", help="write the model with an adapter added to its weights")
    merge.add_argument("adapter", help="folder or Hub id of the adapter")
    merge.add_argument("output", help="folder to write; must not exist")
    merge.add_argument("--base-model", help="folder or Hub id, if not the one the adapter's config names")
    merge.set_defaults(run=_merge)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv (`list[str]`, *optional*): Arguments; those of the process by default.

    Returns:
        `int`: Exit code: 0 for success, 2 for bad input.
    """
    args = build_parser().parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
