"""Evaluation: quality and compute, from the same pass."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dyncomp.core.aux import flatten
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Ledger
from dyncomp.core.metrics import Mean
from dyncomp.parallel.mesh import batch_parts
from dyncomp.parallel.processes import lead
from dyncomp.parallel.shardings import make_global_batch, process_rows, replicated
from dyncomp.tasks.base import Source, Split
from dyncomp.tasks.loader import sequential
from dyncomp.training.run import Run
from dyncomp.training.state import paths
from dyncomp.training.step import eval_step, forward


class Evaluator:
    """Evaluates states of one run; compiles once, whatever the controls.

    Args:
      run: the run.
      mesh: where the variables live; each process reads its rows of every batch, and all get the same figures.
    """

    def __init__(self, run: Run, mesh: Mesh | None = None):
        self.run, self.mesh = run, mesh
        self.step = jax.jit(eval_step(run), out_shardings=replicated(mesh))

    def __call__(
        self, variables: Mapping[str, Any], split: Split = "validation", batches: int | None = None
    ) -> dict[str, Any]:
        """Quality and compute of a split.

        Returns:
          ``{"quality": {metric: value}, "compute": {...}, "ledger": rows}``; compute has ``flops_needed`` and
          ``flops_executed`` per element (token or image), ``elements``, and ``events_per_element``.
        """
        sums: dict[str, Mean] = {}
        ledger: Ledger | None = None
        elements = 0
        for batch in self._batches(split, batches):
            out = jax.device_get(self.step(variables, batch))
            sums = merge(sums, out["metrics"])
            if ledger is None:
                ledger = Ledger(self.run.model.cost(batch["inputs"].shape))
            ledger.record(out["events"])
            elements += int(batch["mask"].sum())
        assert ledger is not None
        return {
            "split": split,
            "quality": self.run.task.summarize(sums),
            "compute": compute(ledger, elements),
            "ledger": list(ledger.rows()),
        }

    def _batches(self, split: Split, batches: int | None) -> Iterator[Mapping[str, Any]]:
        source = self.run.task.source(split)
        size = size_of(self.run, source, self.mesh)
        for batch in sequential(source, size, batches, process_rows(size, self.mesh)):
            yield batch if self.mesh is None else make_global_batch(batch, self.mesh, size)

    def seconds(self, variables: Mapping[str, Any], split: Split, repeats: int = 3) -> float:
        """Median wall-clock seconds of one batch (compiled, warm)."""
        batch = next(self._batches(split, 1))
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            jax.block_until_ready(self.step(variables, batch))
            times.append(time.perf_counter() - start)
        return float(np.median(times[1:]))

    def pareto(
        self, variables: Mapping[str, Any], split: Split = "validation", batches: int | None = None
    ) -> list[dict[str, Any]]:
        """One point for each setting of the swept controls (and the setting as trained), nothing recompiled."""
        points = [{}, *({n: v} for n, values in self.run.sweep.items() for v in values)]
        rows = []
        for controls in points:
            changed = set_controls(variables, controls)
            found = self(changed, split, batches)
            seconds = self.seconds(changed, split)
            headline = found["quality"][self.run.task.headline]
            row = {"controls": controls, self.run.task.headline: headline, "seconds": seconds}
            rows.append({**row, **found["compute"]})
        return rows


def size_of(run: Run, source: Source, mesh: Mesh | None = None) -> int:
    """Examples of an evaluation batch: the run's, or a short split's, rounded up to what the mesh splits evenly."""
    size, parts = min(run.batch_size, len(source)), batch_parts(mesh) if mesh else 1
    return -(-size // parts) * parts


def compute(ledger: Ledger, elements: int) -> dict[str, Any]:
    """Per-element FLOPs, and how often each event was needed per element."""
    each = max(elements, 1)
    return {
        "flops_needed": ledger.total("needed") / each,
        "flops_executed": ledger.total("executed") / each,
        "elements": elements,
        "events_per_element": {path: e.needed / each for path, e in ledger.entries.items()},
    }


def merge(sums: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Mean]:
    """Adds metrics in float64 on the host."""
    out = {}
    for name, mean in new.items():
        total, count = np.float64(np.sum(mean.total)), np.float64(np.sum(mean.count))
        old = sums.get(name)
        out[name] = (
            Mean(total, count) if old is None else Mean(old.total + total, old.count + count)
        )
    return out


def set_controls(variables: Mapping[str, Any], values: Mapping[str, float]) -> dict[str, Any]:
    """Variables with controls of these names (last path component) filled with new values.

    Raises:
      DyncompError: no control has that name.
    """
    controls = variables["controls"]
    names = [path.rsplit("/", 1)[-1] for path in paths(controls)]
    unknown = [name for name in values if name not in names]
    if unknown:
        raise DyncompError(
            f"no control named {unknown[0]!r}; this model has {sorted(set(names)) or 'none'}"
        )
    leaves, treedef = jax.tree.flatten(controls)
    filled = [
        jax.numpy.full_like(leaf, values[name]) if name in values else leaf
        for name, leaf in zip(names, leaves, strict=True)
    ]
    return {**variables, "controls": jax.tree.unflatten(treedef, filled)}


def evaluate_workdir(
    workdir: Path,
    run: Run | None = None,
    *,
    loader: Callable[[str], Any] | None = None,
    split: Split = "test",
    controls: Mapping[str, float] | None = None,
    batches: int | None = None,
) -> dict[str, Any]:
    """Evaluates the newest checkpoint of a work directory; ``run`` and ``loader`` as in `restore.load`."""
    from dyncomp.training.restore import load

    loaded = load(workdir, run, loader=loader)
    variables = set_controls(loaded.variables, controls or {})
    return Evaluator(loaded.run)(variables, split, batches)


def experts_per_row(compute: Mapping[str, Any]) -> float | None:
    """Mean active experts per token and layer, or None for a model without experts."""
    events: Mapping[str, float] = compute["events_per_element"]
    rows = [value for path, value in events.items() if path.endswith("experts/rows")]
    routed = [value for path, value in events.items() if path.endswith("router/rows")]
    return sum(rows) / sum(routed) if routed and sum(routed) else None


def spent(compute: Mapping[str, Any]) -> dict[str, float]:
    """What a log line says about compute: FLOPs per element and, where there are experts, the mean active ones."""
    figures = {name: compute[name] for name in ("flops_needed", "flops_executed")}
    experts = experts_per_row(compute)
    return figures if experts is None else {**figures, "active_experts": experts}


def save_decisions(
    run: Run, variables: Mapping[str, Any], path: Path, mesh: Mesh | None = None
) -> bool:
    """Writes every plan of one validation batch, and its inputs, to an npz file; False for a model without plans.

    All processes compute, process 0 writes.

    Keys are the plans' paths (``group_0/block_0/ffn/route/weights``; under a scanned group arrays lead with the
    layer), ``kinds`` (JSON: path of a plan -> name of its class), ``inputs``, ``mask``, and ``shown/...``, what
    `Task.describe` says about the inputs.
    """
    source = run.task.source("validation")
    batch = next(sequential(source, size_of(run, source, mesh)))
    look = jax.jit(forward(run, ("plan",)), out_shardings=replicated(mesh))
    _, aux = look(variables, batch)
    leaves = jax.device_get(jax.tree.leaves(aux.plans))
    arrays = dict(zip(paths(aux.plans), leaves, strict=True))
    if arrays and lead():
        kinds = {name: type(plan).__name__ for name, plan in flatten(aux.plans).items()}
        shown = run.task.describe(batch["inputs"])
        arrays |= {f"shown/{name}": values for name, values in shown.items()}
        arrays |= {"inputs": batch["inputs"], "mask": batch["mask"]}
        np.savez_compressed(path, kinds=np.array(json.dumps(kinds)), **arrays)
    return bool(arrays)
