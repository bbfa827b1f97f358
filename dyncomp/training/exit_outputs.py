"""What every exit of a trained classifier says on held-out examples, kept for the report's calibration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dyncomp.parallel.processes import lead
from dyncomp.parallel.shardings import replicated
from dyncomp.tasks.loader import sequential
from dyncomp.training.evaluate import size_of
from dyncomp.training.run import Run
from dyncomp.training.step import forward

EXAMPLES = 2000
"""At most so many of the validation split, in its order."""


def save_exit_outputs(
    run: Run, variables: Mapping[str, Any], path: Path, mesh: Mesh | None = None
) -> bool:
    """Writes ``logits`` [x n c], ``targets`` [n] and ``exit`` [n] of validation examples to an npz file.

    All processes compute, process 0 writes.

    Returns:
      False, and no file, for a model whose output has no ``logits`` of several exits with an ``exit`` of each example.
    """
    source = run.task.source("validation")
    size = size_of(run, source, mesh)
    batches = list(sequential(source, size, max(1, EXAMPLES // size)))
    run_forward = jax.jit(forward(run), out_shardings=replicated(mesh))
    shape = jax.eval_shape(run_forward, variables, batches[0])[0]
    if not (isinstance(shape, Mapping) and {"logits", "exit"} <= set(shape)):
        return False
    if len(shape["logits"].shape) != 3 or batches[0]["targets"].ndim != 1:
        return False
    parts = []
    for batch in batches:
        output, _ = run_forward(variables, batch)
        real = np.asarray(batch["mask"]).astype(bool)
        logits, exits = jax.device_get((output["logits"], output["exit"]))
        parts.append((logits[:, real].astype(np.float32), batch["targets"][real], exits[real]))
    if not lead():
        return True
    logits, targets, exits = zip(*parts, strict=True)
    np.savez_compressed(
        path,
        logits=np.concatenate(logits, axis=1),
        targets=np.concatenate(targets),
        exit=np.concatenate(exits),
    )
    return True
