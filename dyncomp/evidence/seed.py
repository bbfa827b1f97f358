"""One seed of an experiment in a fresh, pinned process: ``python -m dyncomp.evidence.seed EXPERIMENT SEED FOLDER``."""

import importlib.util
import json
import os
import resource
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from dyncomp.core.errors import DyncompError

PINNED = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "NPROC": "1",
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "PYTHONHASHSEED": "0",
}
"""Environment of a seed: one thread and the CPU, so that its figures come out the same again."""


def load_experiment(path: Path) -> ModuleType:
    """Imports an ``experiment.py`` by its path.

    Raises:
      DyncompError: there is none, or it lacks ARMS or run_seed.
    """
    if not path.is_file():
        raise DyncompError(f"{path} is missing: it defines ARMS and run_seed(seed, quick, workdir)")
    module = load_module(path)
    for name in ("ARMS", "run_seed"):
        if not hasattr(module, name):
            raise DyncompError(f"{path} defines no {name}; add it")
    return module


def load_module(path: Path) -> ModuleType:
    """Imports a file of an experiment's folder, which is no package."""
    name = f"{path.stem}_{path.parent.name}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(path: Path, seed: int, folder: Path, quick: bool) -> dict[str, Any]:
    """Runs a seed and returns its record (figures of every arm, data for pictures, seconds)."""
    module = load_experiment(path)
    start = time.perf_counter()
    figures = dict(module.run_seed(seed, quick, folder))
    shown = figures.pop("_figures", None)
    if missing := [arm for arm in module.ARMS if arm not in figures]:
        raise DyncompError(f"run_seed returned no arm {missing[0]!r}, which ARMS lists")
    plain = {a: {k: float(v) for k, v in figures[a].items()} for a in module.ARMS}
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    record = {
        **{"seed": seed, "seconds": seconds, "peak_bytes": peak, "figures": plain},
        **{"device": _device(), "platform": os.environ.get("JAX_PLATFORMS", "cpu")},
    }
    return record if shown is None else {**record, "shown": shown}


def _device() -> str:
    """Kind of the device that computed, "cpu" or what an accelerator calls itself."""
    import jax

    return jax.devices()[0].device_kind


def main(argv: list[str]) -> int:
    """Runs one seed and writes ``FOLDER/record.json``."""
    path, seed, folder = Path(argv[0]), int(argv[1]), Path(argv[2])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    try:
        record = run(path, seed, folder, "--quick" in argv)
    except DyncompError as error:
        print(error, file=sys.stderr)
        return 1
    (folder / "record.json").write_text(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
