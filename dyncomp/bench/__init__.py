"""`dyncomp bench NAME`: speed and truth of the ledger, measured; never asserted in a test."""

import argparse
import contextlib
import difflib
import importlib
import json as jsonlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyncomp.core.environment import environment
from dyncomp.core.errors import DyncompError
from dyncomp.core.lock import measuring

BENCHES = {
    "ledger": "the ledger's FLOPs against XLA's own count",
    "overhead": "the train step against a plain JAX loop, and real data against one cached batch",
    "compile": "seconds to compile the train step of every laptop config, and of deep against shallow models",
    "memory": "XLA's figure for a train step of 1 GiB and more against what the process really takes",
    "kills": "a run killed a hundred times ends with the bits of an uninterrupted one",
    "faults": "a job of four processes that loses one ends with one line and goes on to the same bits",
    "meshes": "training on every mesh of eight devices, in one to four processes, against one device",
    "exits": "the exit executor against the full network",
    "experts": "the mixture of experts against the dense unit of equal active width",
    "generate": "decoding a language model against transformers and the memory's speed, and what skipping layers saves",
    "attention": "attention over listed blocks against dense rivals, and what prefill and decode save",
}
"""Name -> what it measures; ``rows(quick: bool) -> list[dict]`` is in the module of that name."""

COLUMNS = ("id", "ratio", "interval", "goal", "relation", "holds")


def measure(name: str, *, quick: bool = False, **options: Any) -> dict[str, Any]:
    """Runs a bench under the machine's lock (a quick one measures nothing, so it need not wait for its turn).

    Args:
      name: of `BENCHES`.
      quick: a smoke run.
      **options: of the bench's ``rows``.

    Raises:
      DyncompError: there is no such bench, or something else is being measured.
    """
    if name not in BENCHES:
        close = difflib.get_close_matches(name, BENCHES, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "`dyncomp bench list` names them"
        raise DyncompError(f"no bench {name!r}: {hint}")
    module = importlib.import_module(f"{__name__}.{name}")
    with contextlib.nullcontext() if quick else measuring(f"bench {name}"):
        rows = module.rows(quick, **options)
    return {"bench": name, "quick": quick, "environment": environment(), "rows": rows}


def show(result: dict[str, Any]) -> None:
    """Prints a table, and the rule or reference of each row below it."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"bench {result['bench']}{' (quick)' * result['quick']}")
    for column in COLUMNS:
        table.add_column(column, no_wrap=column == "id")
    for row in result["rows"]:
        table.add_row(*(_text(row.get(column)) for column in COLUMNS))
    console = Console()
    console.print(table)
    for row in result["rows"]:
        console.print(f"{row['id']}: {row['reference']}{remark(row)}", highlight=False)


def remark(row: dict[str, Any]) -> str:
    """What a row of `dyncomp bench attention` knows beyond its ratio: the bound of its saving, where its time goes."""
    if "speedup_bound" in row:
        return f"; {row['speedup']:.2f} times as fast, where bytes allow {row['speedup_bound']:.2f}"
    if "choose_ms" in row:
        choosing = f"choosing takes {row['choose_ms']:.0f} of {row['all_ms']:.0f} ms"
        return f"; of a middle layer {choosing}, {row['tiles']:.2f} of its causal tiles are read"
    return ""


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_text, value)) + "]"
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _list(json: bool) -> int:
    lines = [f"{name:9} {about}" for name, about in BENCHES.items()]
    print(jsonlib.dumps(BENCHES, indent=1) if json else "\n".join(lines))
    return 0


def main(name: str, argv: Sequence[str] = (), json: bool = False) -> int:
    """Runs bench ``name`` with ``argv`` (``--quick``) and prints a table or JSON; 0 when it ran. "list" names all."""
    if name == "list":
        return _list(json)
    parser = argparse.ArgumentParser(prog=f"dyncomp bench {name}")
    parser.add_argument("--quick", action="store_true", help="a smoke run, never evidence")
    if name == "experts":
        _add_doctor(parser)
    if name == "meshes":
        kept = "keep what is found there, and go on from what an earlier call left"
        parser.add_argument("--workdir", type=Path, metavar="DIR", help=kept)
        words: dict[str, Any] = {"nargs": "+", "choices": ("float64", "float32")}
        parser.add_argument("--dtypes", **words, help="of the runs (default: both)")
    args = parser.parse_args(list(argv))
    if name == "experts" and args.doctor:
        return _doctor(args, json)
    options = {"workdir": args.workdir} if name == "meshes" else {}
    options |= {"dtypes": args.dtypes} if getattr(args, "dtypes", None) else {}
    result = measure(name, quick=args.quick, **options)
    if json:
        jsonlib.dump(result, sys.stdout, indent=1)
        print()
    else:
        show(result)
    return 0


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--doctor", metavar="CONFIG", help="examine a config's layers of experts instead"
    )
    parser.add_argument("--chip", default="v5e", help="whose roofline to judge by (default: v5e)")
    parser.add_argument("--workdir", metavar="DIR", help="a trained run to take the load from")


def _doctor(args: argparse.Namespace, json: bool) -> int:
    from dyncomp import config
    from dyncomp.bench import doctor

    workdir = Path(args.workdir) if args.workdir else None
    found = doctor.report(doctor.examine(config.load(args.doctor), workdir), args.chip)
    print(jsonlib.dumps(found, indent=1)) if json else doctor.show(found)
    return 0
