"""``dyncomp compile``: compiles a config's train step for a described accelerator."""

import argparse
import os
from typing import Any

from dyncomp.cli.output import command, json_flag


def add(commands: Any) -> None:
    """Adds the command."""
    about = (
        "Compile the train step for a TPU topology without a TPU (needs the extra `tpu`): bytes per chip, FLOPs, "
        "collectives, kernels."
    )
    example = "dyncomp compile quickstart --topology v5e:2x2"
    parser = command(commands, "compile", _main, about, example)
    parser.add_argument("config", help="a shipped name or a path")
    parser.add_argument(
        "--topology", default="v5e:2x2", help="such as v5e:2x2 (default) or v5p:4x4x4"
    )
    json_flag(parser)


def _main(args: argparse.Namespace) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from rich.console import Console

    from dyncomp import config
    from dyncomp.parallel.aot import compile_run

    report = compile_run(config.load(args.config, args.overrides), args.topology)
    if args.json:
        print(report.to_json())
    else:
        Console().print(report.table())
