"""``dyncomp compile``: compiles train steps for a described accelerator, side by side, or searches for a mesh."""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dyncomp.cli.compile_text import compare, show
from dyncomp.cli.output import command, json_flag
from dyncomp.core.errors import DyncompError


def add(commands: Any) -> None:
    """Adds the command."""
    about = (
        "Compile a train step, or a language model's prefill or decode step, for a TPU topology without a TPU (needs "
        "the extra `tpu`): bytes per chip, FLOPs, collectives, kernels, and what binds. Several configs or meshes "
        "stand side by side."
    )
    example = "dyncomp compile quickstart --topology v5e:2x2"
    parser = command(commands, "compile", _main, about, example)
    parser.add_argument("configs", nargs="+", help="shipped names or paths")
    parser.add_argument(
        "--topology", default="v5e:2x2", help="such as v5e:2x2 (default) or v5p:4x4x4"
    )
    parser.add_argument(
        "--mesh",
        action="append",
        default=[],
        metavar="AXIS=N,..",
        help="instead of the config's, as in fsdp=4,tensor=2; may be given more than once",
    )
    parser.add_argument(
        "--what",
        choices=("train", "prefill", "decode"),
        default="train",
        help="the train step (default), reading prompts, or one token for each sequence",
    )
    parser.add_argument("--batch", type=int, help="sequences to serve (default: the run's batch)")
    parser.add_argument(
        "--length", type=int, help="tokens of a prompt, slots of a cache (default: the task's)"
    )
    parser.add_argument(
        "--no-code",
        action="store_true",
        help="stop before machine code is written: many times faster, and all but kernels are known (TPU)",
    )
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="say what the compiler makes of kernels: schedules (TPU), registers and spills (GPU)",
    )
    parser.add_argument(
        "--search", action="store_true", help="try every mesh that divides, and rank them"
    )
    parser.add_argument(
        "--minutes", type=float, help="with --search: start no mesh after so many minutes"
    )
    parser.add_argument(
        "--most", type=int, help="with --search: compile so many meshes, the likeliest first"
    )
    json_flag(parser)


def mesh_of(text: str) -> Any:
    """The `MeshSpec` of ``fsdp=4,tensor=2``; ``data`` gets the rest if it is not named.

    Raises:
      DyncompError: an unknown axis, no number, or an axis twice.
    """
    from dyncomp.parallel.mesh import AXES, MeshSpec

    pairs = [part.partition("=")[::2] for part in text.split(",")]
    axes = [axis for axis, _ in pairs]
    if len(set(axes)) < len(axes) or not all(a in AXES and n.isdecimal() for a, n in pairs):
        raise DyncompError(f"--mesh {text!r}: write AXIS=N,.. with axes out of {', '.join(AXES)}")
    sizes: dict[str, Any] = {axis: int(size) for axis, size in pairs}
    return MeshSpec(**sizes)


def _main(args: argparse.Namespace) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    one = len(args.configs) == 1 and len(args.mesh) < 2 and not args.search
    if (args.no_code or args.kernels) and not one or (args.no_code and args.kernels):
        raise DyncompError(
            "--no-code and --kernels compile one config for one mesh, and not together: leave out the others"
        )
    folder = _dumped(args)
    from dyncomp.parallel.aot import Ask, compile_job, optimise_job, prepare, with_kernels

    if args.search and (args.mesh or len(args.configs) > 1 or args.what != "train"):
        raise DyncompError(
            "--search tries the meshes of one config's train step: leave out --mesh, --what and others"
        )
    if not args.search and (args.minutes or args.most):
        raise DyncompError("--minutes and --most limit a search: add --search")
    runs = {name: _run(name, args.overrides) for name in args.configs}
    if args.search:
        (run,) = runs.values()
        compare(args, *_searched(args, run))
        return
    specs = [mesh_of(text) for text in args.mesh] or [None]
    asked = {"what": args.what, "batch": args.batch, "length": args.length}
    # All are checked before the first is compiled, which takes minutes.
    jobs = [
        (name, prepare(run, Ask(args.topology, spec, **asked)))
        for name, run in runs.items()
        for spec in specs
    ]
    if args.no_code and folder:
        show(args, optimise_job(jobs[0][1], folder))
        _leave(folder)
    reports = [(name, compile_job(job)) for name, job in jobs]
    if folder:
        reports = [(name, with_kernels(report, folder)) for name, report in reports]
        shutil.rmtree(folder, ignore_errors=True)
    if len(reports) > 1:
        compare(args, reports)
    else:
        show(args, reports[0][1])


def _dumped(args: argparse.Namespace) -> Path | None:
    """Where compilers are told to write, before any is loaded."""
    from dyncomp.parallel.early import dump_here
    from dyncomp.parallel.schedule import told_to_dump

    if args.kernels and not args.topology.startswith("h100"):
        return told_to_dump()
    return dump_here() if args.no_code or args.kernels else None


def _leave(folder: Path) -> NoReturn:
    """Ends the process beside a compile that goes on."""
    shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.flush()
    os._exit(0)


def _run(name: str, overrides: Sequence[str]) -> Any:
    """The run of a config; of a suite, the selected or first one."""
    from dyncomp import config

    run = config.load(name, overrides)
    return (run.selected() or next(iter(run.runs.values()))) if hasattr(run, "runs") else run


def _searched(args: argparse.Namespace, run: Any) -> tuple[list[tuple[str, Any]], str]:
    """Reports of meshes that are worth compiling, best first, and what was left out."""
    from rich.progress import track

    from dyncomp.parallel.search import candidates, ranked, within
    from dyncomp.parallel.topology import find

    specs = candidates(run, find(args.topology))
    shown = track(specs[: args.most], "compiling", disable=args.json)
    made, left = within(run, args.topology, shown, args.minutes)
    left += len(specs[args.most :]) if args.most else 0
    said = f"{left} of {len(specs)} meshes were left out (--minutes, --most)." if left else ""
    return [("", report) for report in ranked(made)], said
