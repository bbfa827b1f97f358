"""``dyncomp compile``: compiles train steps for a described accelerator, side by side, or searches for a mesh."""

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

from dyncomp.cli.output import command, json_flag, print_json, table
from dyncomp.core.errors import DyncompError


def add(commands: Any) -> None:
    """Adds the command."""
    about = (
        "Compile the train step for a TPU topology without a TPU (needs the extra `tpu`): bytes per chip, FLOPs, "
        "collectives, kernels, and what binds. Several configs or meshes stand side by side."
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
        "--search", action="store_true", help="try every mesh that divides, and rank them"
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
    from dyncomp.parallel.aot import compile_run

    if args.search and (args.mesh or len(args.configs) > 1):
        raise DyncompError("--search tries the meshes of one config: leave out --mesh and others")
    runs = {name: _run(name, args.overrides) for name in args.configs}
    if args.search:
        (run,) = runs.values()
        _compare(args, _searched(run, args.topology, quiet=args.json))
        return
    specs = [mesh_of(text) for text in args.mesh] or [None]
    reports = [
        (name, compile_run(run, args.topology, spec))
        for name, run in runs.items()
        for spec in specs
    ]
    if len(reports) > 1:
        _compare(args, reports)
    else:
        _show(args, reports[0][1])


def _run(name: str, overrides: Sequence[str]) -> Any:
    """The run of a config; of a suite, the selected or first one."""
    from dyncomp import config

    run = config.load(name, overrides)
    return (run.selected() or next(iter(run.runs.values()))) if hasattr(run, "runs") else run


def _searched(run: Any, topology: str, quiet: bool) -> list[tuple[str, Any]]:
    """Reports of every mesh that is worth compiling, best first."""
    from rich.progress import track

    from dyncomp.parallel.aot import compile_run
    from dyncomp.parallel.search import candidates, ranked
    from dyncomp.parallel.topology import find

    specs = candidates(run, find(topology))
    made = [compile_run(run, topology, spec) for spec in track(specs, "compiling", disable=quiet)]
    return [("", report) for report in ranked(made)]


def _facts(report: Any) -> dict[str, Any]:
    """A report and what the model makes of it."""
    from dyncomp.parallel.roofline import predict

    model = {}
    if found := predict(report):
        parts = dataclasses.asdict(found)
        model = {
            "overlapped": found.overlapped,
            "apart": found.apart,
            **parts,
            "binds": found.binds,
        }
    return {**json.loads(report.to_json()), "model": model}


def _show(args: argparse.Namespace, report: Any) -> None:
    from rich.console import Console

    from dyncomp.parallel.roofline import ASSUMPTIONS, said

    if args.json:
        print_json(_facts(report))
        return
    Console().print(report.table())
    if line := said(report):
        Console().print(line, style="bold", highlight=False)
        Console().print(ASSUMPTIONS, style="dim", highlight=False)


SHORT = {"compute": "math", "memory": "HBM", "interconnect": "links"}
"""Heads of columns: the three bounds of the model."""


def _compare(args: argparse.Namespace, reports: Sequence[tuple[str, Any]]) -> None:
    """A row a report: what it is of, its memory, and the model's times in milliseconds."""
    from dyncomp.parallel.roofline import ASSUMPTIONS, NO_MODEL

    facts = [(name, _facts(report)) for name, report in reports]
    if args.json:
        print_json([{"config": name or args.configs[0], **found} for name, found in facts])
        return
    head = ("mesh", "GiB", "fits", "ms", *SHORT.values(), "binds")
    rows = []
    for name, found in facts:
        mesh = " x ".join(f"{axis}={n}" for axis, n in found["mesh"].items() if n > 1) or "1 device"
        held = f"{found['memory']['peak'] / 2**30:.2f}" if found["memory"] else None
        keys = ("overlapped", *SHORT)
        times = [f"{1e3 * found['model'][key]:.3g}" if found["model"] else None for key in keys]
        fits = {True: "yes", False: "no", None: ""}[found["fits"]]
        label = f"{name} {mesh}" if name and len(args.configs) > 1 else mesh
        binds = SHORT.get(found["model"].get("binds", ""))
        rows.append((label, held, fits, *times, binds))
    modelled = any(found["model"] for _, found in facts)
    note = ASSUMPTIONS if modelled else NO_MODEL
    table(f"On {args.topology}, a device and a step", head, rows, note)
