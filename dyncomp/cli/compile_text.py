"""What ``dyncomp compile`` prints: one report, or several side by side."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from dyncomp.cli.output import print_json, table


def facts(report: Any) -> dict[str, Any]:
    """A report and what the model makes of it."""
    from dyncomp.parallel.roofline import predict, shares

    model = {}
    if found := predict(report):
        parts = dataclasses.asdict(found)
        by_kind = {kind: dataclasses.asdict(share) for kind, share in shares(report).items()}
        model = {
            "overlapped": found.overlapped,
            "apart": found.apart,
            **parts,
            "binds": found.binds,
            "by_kind": by_kind,
        }
    return {**json.loads(report.to_json()), "model": model}


def show(args: argparse.Namespace, report: Any) -> None:
    """One report."""
    from rich.console import Console

    from dyncomp.parallel.roofline import ASSUMPTIONS, said

    if args.json:
        print_json(facts(report))
        return
    Console().print(report.table())
    _show_shares(report)
    if line := said(report):
        Console().print(line, style="bold", highlight=False)
        Console().print(ASSUMPTIONS, style="dim", highlight=False)


def _show_shares(report: Any) -> None:
    """Time by kind of operation, and the operations that take longest."""
    from dyncomp.parallel.roofline import KINDS_NOTE, chip_of, seconds, shares

    found, chip = shares(report), chip_of(report.topology)
    if not found or chip is None:
        return
    ms = lambda value: None if value is None else f"{1e3 * value:.3g}"
    rows = []
    for kind, share in found.items():
        work = report.work.get(kind) or report.collectives[kind]
        rows.append(
            (kind, work.sites, work.runs, ms(share.seconds), share.binds, ms(share.compiler))
        )
    head = ("kind", "places", "runs", "ms, model", "bound", "ms, compiler")
    table("Time by kind (model)", head, rows, KINDS_NOTE)
    rows = [
        (op.name, op.kind, op.work.runs, ms(seconds(op.work, chip)), op.source[-60:])
        for op in report.heaviest
    ]
    table("Operations that take longest (model)", ("name", "kind", "runs", "ms", "from"), rows)


SHORT = {"compute": "math", "memory": "HBM", "interconnect": "links"}
"""Heads of columns: the three bounds of the model."""


def compare(
    args: argparse.Namespace, reports: Sequence[tuple[str, Any]], left_out: str = ""
) -> None:
    """A row a report: what it is of, its memory, and the model's times in milliseconds."""
    from dyncomp.parallel.roofline import ASSUMPTIONS, NO_MODEL

    told = [(name, facts(report)) for name, report in reports]
    if args.json:
        if left_out:
            print(left_out, file=sys.stderr)
        print_json([{"config": name or args.configs[0], **found} for name, found in told])
        return
    head = ("mesh", "GiB", "fits", "ms", *SHORT.values(), "binds")
    rows = []
    for name, found in told:
        mesh = " x ".join(f"{axis}={n}" for axis, n in found["mesh"].items() if n > 1) or "1 device"
        held = f"{found['memory']['peak'] / 2**30:.2f}" if found["memory"] else None
        keys = ("overlapped", *SHORT)
        times = [f"{1e3 * found['model'][key]:.3g}" if found["model"] else None for key in keys]
        fits = {True: "yes", False: "no", None: ""}[found["fits"]]
        label = f"{name} {mesh}" if name and len(args.configs) > 1 else mesh
        binds = SHORT.get(found["model"].get("binds", ""))
        rows.append((label, held, fits, *times, binds))
    modelled = any(found["model"] for _, found in told)
    note = " ".join(filter(None, (left_out, ASSUMPTIONS if modelled else NO_MODEL)))
    table(f"On {args.topology}, a device and a step", head, rows, note)
