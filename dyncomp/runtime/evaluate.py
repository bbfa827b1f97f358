"""A trained network judged the way it is served: segment by segment, each on the examples that get there."""

import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.models import ExitingClassifier, SkippingClassifier
from dyncomp.models.staged import StagedClassifier
from dyncomp.runtime.host import HostExecutor
from dyncomp.runtime.segments import from_model
from dyncomp.tasks.base import Split
from dyncomp.tasks.loader import sequential
from dyncomp.training.evaluate import merge
from dyncomp.training.run import Run
from dyncomp.training.step import forward

BUCKETS = (1, 4, 16, 64)


def separate(model: Any) -> Any:
    """A classifier that can be cut into segments: its blocks have weights of their own. None for others."""
    if isinstance(model, SkippingClassifier | StagedClassifier):
        return model
    if not isinstance(model, ExitingClassifier):
        return None
    if model.layers == "unroll":
        return model
    return model.clone(backbone=functools.partial(model.backbone, layers="unroll"))


def _judged(model: Any) -> Any:
    """`separate`, or the reason why not."""
    found, name = separate(model), type(model).__name__
    if found is None and hasattr(model, "segment"):
        raise DyncompError(
            f"{name}: only classifiers are judged segment by segment here; run HostExecutor(runtime.from_model(...))"
        )
    if found is None:
        raise DyncompError(f"{name} has no segments: see runtime.whole")
    return found


def executed_split(
    run: Run, variables: Mapping[str, Any], split: Split = "test", batches: int | None = None
) -> dict[str, Any]:
    """Quality, ways and time of a split under the host executor, beside the model's own pass over the same batches.

    Args:
      run: whose model is an `ExitingClassifier`, a `SkippingClassifier` or a `StagedClassifier`.
      variables: as trained.
      split: of the run's task.
      batches: stop after so many.

    Returns:
      ``quality``, the task's metrics of what the executor emitted; ``examples``; ``other_ways``, examples that left
      elsewhere, or ran other blocks, than in the model's own pass (masked execution); ``flops_needed`` and
      ``flops_executed`` an example; ``seconds`` and ``seconds_masked`` an example, medians over batches, warm.

    Raises:
      DyncompError: another kind of model.
    """
    model = _judged(run.model)
    source = run.task.source(split)
    size = min(run.batch_size, len(source))
    sample = next(sequential(source, size))["inputs"]
    sizes = tuple(sorted({*(n for n in BUCKETS if n < size), size}))
    host = HostExecutor(
        from_model(model, variables, sample.shape), sample, capacity=size, buckets=sizes
    )
    host.warm_up()(sample)
    masked = jax.jit(forward(run, ("plan",)))
    sums: dict[str, Any] = {}
    spent, differ, examples, flops = ([], []), 0, 0, np.zeros(2, np.int64)
    for batch in sequential(source, size, batches):
        real = np.asarray(batch["mask"]) > 0
        if not examples:
            jax.block_until_ready(masked(variables, batch))
        begin = time.perf_counter()
        found = host(batch["inputs"])
        middle = time.perf_counter()
        output, aux = jax.block_until_ready(masked(variables, batch))
        spent[0].append((middle - begin) / size)
        spent[1].append((time.perf_counter() - middle) / size)
        differ += int((_ways(model, found) != _own_ways(output, aux)).any(axis=1)[real].sum())
        examples += int(real.sum())
        flops += [found.ledger.total(which) for which in ("needed", "executed")]
        sums = merge(sums, jax.device_get(run.task.metrics(jnp.asarray(found.outputs), batch)))
    padded = len(spent[0]) * size
    return {
        "executor": "host",
        "split": split,
        "examples": examples,
        "other_ways": differ,
        "quality": run.task.summarize(sums),
        "flops_needed": float(flops[0] / padded),
        "flops_executed": float(flops[1] / padded),
        "seconds": float(np.median(spent[0])),
        "seconds_masked": float(np.median(spent[1])),
    }


def _ways(model: Any, found: Any) -> np.ndarray:
    """What each example ran, [b k]."""
    if not isinstance(model, SkippingClassifier):
        return np.asarray(found.exits)[:, None]
    blocks = [index for index, place in enumerate(model.places()) if place.next]
    return found.visits[:, blocks] > 0


def _own_ways(output: Any, aux: Any) -> np.ndarray:
    if isinstance(output, Mapping):
        return np.asarray(output["exit"])[:, None]
    return np.asarray(aux.plans["opened"])
