"""``dyncomp reproduce``: the evidence of one system."""

import argparse
from pathlib import Path
from typing import Any

from dyncomp.cli.output import command, json_flag, print_json, table
from dyncomp.core.errors import DyncompError


def add(commands: Any) -> None:
    """Adds the command."""
    about = (
        "Run a system's method, baselines and ablation over seeds; write results.json, the page and the figures "
        "of experiments/SLUG. Needs the repository: claims.toml is committed before the first run."
    )
    parser = command(commands, "reproduce", _main, about, "dyncomp reproduce jei_dnn --seeds 0,1,2")
    parser.add_argument("slug", help="a folder of experiments/")
    parser.add_argument(
        "--seeds", help="comma-separated (default: the experiment's own, most often 0,1,2,3,4)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run of under a minute; never evidence"
    )
    parser.add_argument(
        "--platform",
        default="cpu",
        choices=("cpu", "cuda", "tpu"),
        help="what seeds run on (default: one pinned CPU thread)",
    )
    parser.add_argument(
        "--root", metavar="DIR", help="folder of the evidence (default: experiments/)"
    )
    json_flag(parser)


def seeds(text: str) -> tuple[int, ...]:
    """Seeds out of a comma-separated text.

    Raises:
      DyncompError: something that is no number, or one twice.
    """
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise DyncompError(f"--seeds {text!r}: write whole numbers, as in --seeds 0,1,2") from None
    if len(set(found)) < len(found):
        raise DyncompError(f"--seeds {text!r}: a seed stands twice, name each once")
    return found


def _main(args: argparse.Namespace) -> None:
    from dyncomp import config
    from dyncomp.evidence.reproduce import reproduce

    root = Path(args.root) if args.root else config.shipped().parent / "experiments"
    chosen = None if args.seeds is None else seeds(args.seeds)
    result = reproduce(args.slug, seeds=chosen, quick=args.quick, root=root, platform=args.platform)
    if args.json:
        print_json(result)
        return
    rows = [(c["id"], c["text"], c["holds"]) for c in result["claims"]]
    table(f"Claims of {args.slug}", ("claim", "text", "holds"), rows)
