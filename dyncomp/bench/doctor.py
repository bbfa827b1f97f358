"""`dyncomp bench experts --doctor CONFIG`: is a mixture's shape one that a chip can run fast?

A grouped product of m rows an expert reads each weight once for m multiply-adds: in bfloat16 its intensity is about m
FLOPs a byte, and below the chip's ridge (peak FLOPs / bandwidth) it waits for memory, however good the kernel is. The
load and the padding are those of one batch through the model, trained if a work directory is given; models too large
for this machine are judged by their shapes alone.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dyncomp.core.aux import flatten
from dyncomp.core.errors import DyncompError
from dyncomp.core.plans import RoutePlan
from dyncomp.models import apply
from dyncomp.parallel import roofline
from dyncomp.tasks.loader import Loader
from dyncomp.training import Run, Suite
from dyncomp.training.engine import Engine
from dyncomp.training.restore import load as load_workdir

CHIPS: Mapping[str, tuple[float, float]] = {
    **{name: (chip.flops, chip.memory) for name, chip in roofline.CHIPS.items()},
    "h100": (989e12, 3.35e12),
}
"""Vendors' peak bfloat16 FLOPs a second and memory bytes a second of a device."""

LARGEST = 200_000_000
"""Parameters of a model that is run; larger ones are judged by shapes."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of experts.

    Attributes:
      name: path of its plan; ``#i`` in a stacked group.
      experts: with a network, e.
      rows_per_expert: mean rows of an expert on the device that computes it.
      imbalance: largest load / mean load; None when not run.
      padding: rows executed / rows needed; None when not run.
      dropped: share of choices that a capacity drops; None when not run.
    """

    name: str
    experts: int
    rows_per_expert: float
    imbalance: float | None = None
    padding: float | None = None
    dropped: float | None = None


def examine(run: Run | Suite, workdir: Path | None = None) -> list[Layer]:
    """Looks at every layer of experts in a run (of a suite, the selected one, or the first that has any).

    Raises:
      DyncompError: there is no such layer.
    """
    if isinstance(run, Suite):
        run = run.selected() or run
    for one in run.runs.values() if isinstance(run, Suite) else [run]:
        plans, abstract = _plans_of(one)
        if plans:
            break
    else:
        raise DyncompError("this config has no layer of experts; --doctor looks at experts.MoE")
    size = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
    if size > LARGEST:
        return _by_shape(one, plans)
    return _by_batch(one, plans, workdir)


def _plans_of(run: Run) -> tuple[dict[str, Any], Any]:
    """(shape of the slots, shape of the loads) of every mixture by path, and the abstract state."""
    program = run.program()
    variables = {"params": program.state.params, "controls": program.state.controls}
    shapes: dict[str, Any] = {}

    def call(variables: Any, inputs: Any) -> int:
        found = flatten(apply(run.model, variables, inputs, capture=("plan",))[1].plans)
        for path, plan in found.items():
            prefix = path.removesuffix("route")
            if isinstance(plan, RoutePlan) and f"{prefix}load" in found:
                shapes[prefix.rstrip("/")] = plan.experts.shape, found[f"{prefix}load"].shape
        return 0

    jax.eval_shape(call, variables, program.batch["inputs"])
    return shapes, program.state


def _spread(run: Run) -> float:
    """Rows a device computes with one expert for each row of the global batch: the mesh's share."""
    if run.mesh is None:
        return 1.0
    axes = {n: max(getattr(run.mesh, n), 1) for n in ("data", "fsdp", "sequence", "expert")}
    travel = axes["expert"] > 1  # rows of the whole expert axis meet at an expert's owner
    ways = axes["data"] * axes["fsdp"] * axes["sequence"]
    return 1.0 / (ways * (1 if travel else axes["expert"]))


def _by_shape(run: Run, plans: dict[str, Any]) -> list[Layer]:
    found = []
    for path, (slots, loads) in plans.items():
        experts, layers = loads[-1], loads[0] if len(loads) > 1 else 1
        each = slots[-2] * slots[-1] / experts * _spread(run)
        found.append(Layer(f"{path} x {layers} (at most)", experts, each))
    return found


def _by_batch(run: Run, plans: dict[str, Any], workdir: Path | None) -> list[Layer]:
    variables = load_workdir(workdir, run).variables if workdir else Engine(run).fresh().variables
    source = run.task.source("validation" if workdir else "train")
    batch = Loader(source, seed=0, batch_size=run.batch_size).batch(0)
    call = jax.jit(lambda v, x: apply(run.model, v, x, capture=("plan",))[1])
    aux = call(variables, batch["inputs"])
    loads, events = flatten(aux.plans), flatten(aux.events)
    found = []
    for path in plans:
        rows = events[f"{path}/experts/rows"]
        needed, executed = (np.atleast_1d(v).astype(float) for v in (rows.needed, rows.executed))
        drops = events.get(f"{path}/dropped/rows")
        lost = np.zeros_like(needed) if drops is None else np.atleast_1d(drops.needed).astype(float)
        for index, load in enumerate(np.atleast_2d(loads[f"{path}/load"]).astype(float)):
            each = load.mean() * _spread(run)
            found.append(
                Layer(
                    f"{path} #{index}",
                    len(load),
                    float(each),
                    float(load.max() / max(load.mean(), 1e-9)),
                    float(executed[index] / max(needed[index], 1.0)),
                    float(lost[index] / max(load.sum(), 1.0)),
                )
            )
    return found


def report(layers: list[Layer], chip: str) -> dict[str, Any]:
    """Figures and advice, JSON-ready.

    Raises:
      DyncompError: an unknown chip.
    """
    if chip not in CHIPS:
        raise DyncompError(f"no figures of chip {chip!r}; known: {', '.join(CHIPS)}")
    peak, bandwidth = CHIPS[chip]
    ridge = peak / bandwidth
    worst = min(layers, key=lambda layer: layer.rows_per_expert)
    advice = []
    if worst.rows_per_expert < ridge:
        factor = ridge / worst.rows_per_expert
        advice.append(
            f"waits for memory: {worst.rows_per_expert:.0f} rows an expert against a ridge of {ridge:.0f}; give a"
            f" device {factor:.1f}x as many tokens, fewer or wider experts, or more devices on the expert axis"
        )
    else:
        advice.append(
            f"reaches the ridge: {worst.rows_per_expert:.0f} rows an expert, {ridge:.0f} needed"
        )
    for what, limit, fix in (
        ("padding", 1.3, "blocks are mostly padding: more rows an expert, or fewer experts"),
        ("imbalance", 2.0, "one expert holds the others up: a balance loss, a bias, or a capacity"),
        ("dropped", 0.01, "choices are dropped: a larger capacity_factor, or dispatch='dropless'"),
    ):
        values = [getattr(layer, what) for layer in layers if getattr(layer, what) is not None]
        if values and max(values) > limit:
            advice.append(f"{what} {max(values):.2f}: {fix}")
    rows = [dataclasses.asdict(layer) for layer in layers]
    return {"chip": chip, "ridge": ridge, "layers": rows, "advice": advice}


def show(found: dict[str, Any]) -> None:
    """Prints a table and the advice."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"experts on {found['chip']}, ridge {found['ridge']:.0f} rows an expert")
    columns = ("name", "experts", "rows_per_expert", "imbalance", "padding", "dropped")
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold")
    for layer in found["layers"]:
        texts = ("-" if layer[c] is None else f"{layer[c]:.2f}" if isinstance(layer[c], float) else str(layer[c])
                 for c in columns)  # fmt: skip
        table.add_row(*texts)
    console = Console()
    console.print(table)
    for line in found["advice"]:
        console.print(line, highlight=False)
