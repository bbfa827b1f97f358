"""`dyncomp bench meshes`: training on every mesh of eight devices gives what one device gives.

Eight simulated devices in one process, and in two and four processes over loopback; the models, data and optimizers of
`dyncomp.bench.mesh_runs`. In float64 the losses of 50 steps are those of one device. In float32 the first step's loss
and gradients are (experts chosen as on one device), and later losses stay within what another seed changes. Every
example is read once an epoch. Runs saved on some devices go on on others.
"""

import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dyncomp.bench import fresh, timing
from dyncomp.bench.mesh_job import once_an_epoch
from dyncomp.bench.mesh_runs import DEVICES, KINDS, QUICK_KINDS, STEPS

LAYOUTS = (1, 2, 4)
"""Processes that share the devices; several take one mesh a model in float32, where float64 says more."""
RESUMED = {
    "devices_8_4_2": ((1, 8), (1, 4), (1, 2)),
    "processes_4_2_4": ((4, 2), (2, 2), (4, 2)),
}
"""(processes, devices of each) of each part of a run; the second in float64 alone."""
DTYPES = ("float64", "float32")
ENDS = (17, 34, STEPS)
EASY = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
)
"""What is compared is mathematics, so the compiler need not work hard."""
if jax.__version_info__ < (0, 11):  # later ones end the process for a flag that they no longer know
    EASY += " --xla_cpu_use_fusion_emitters=false"
EXACT, CLOSE = 1e-8, 1e-5
SAID = {
    "float64": "largest difference of a loss from one device's over 50 steps, all meshes, float64",
    "loss": "difference of the first step's loss from one device's, as a share of it, worst mesh, float32",
    "gradients": "largest difference of a first gradient from one device's, as a share of its parameter's largest, "
    "worst mesh, float32; the experts chosen are those of one device",
    "float32": "largest ratio over 50 steps of |loss - one device's| to the spread of one device's three seeds, all "
    "meshes, float32",
    "epochs": "share of meshes and models where each example is read once an epoch",
}
Losses = Sequence[float]


def rows(
    quick: bool, workdir: Path | None = None, dtypes: Sequence[str] = DTYPES
) -> list[dict[str, Any]]:
    """A row a model, layout and rule, the worst of its meshes; ``quick``: float64, one process, experts on one mesh.

    Args:
      workdir: keeps what each job found; jobs that are found there are not run again (the whole takes an hour).
      dtypes: of `DTYPES`.
    """
    with contextlib.ExitStack() as stack:
        folder = workdir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        made = []
        for dtype in DTYPES[:1] if quick else dtypes:
            jobs, kinds = {}, QUICK_KINDS if quick else KINDS
            for count in LAYOUTS[:1] if quick else LAYOUTS:
                words: dict[str, Any] = {"folder": str(folder), "dtype": dtype, "kinds": kinds}
                words["quick"] = quick or (count > 1 and dtype == "float32")
                jobs[count] = _job("curves", words, folder, count, DEVICES // count)
            alone = {kind: list(jobs[1][kind]["alone"].values()) for kind in kinds}
            for count, job in jobs.items():
                made += _curve_rows(dtype, count, job, alone)
            for name in [] if quick else list(RESUMED)[: 2 if dtype == "float64" else 1]:
                made += _resumed(folder / f"{name}_{dtype}", name, dtype, alone)
        return made


def _job(name: str, words: Mapping[str, Any], folder: Path, processes: int, devices: int) -> Any:
    """What a job returns, or has returned before."""
    dtype, part = words["dtype"], f"-{words['stop']}" if "stop" in words else ""
    kept = folder / f"{name}-{dtype}-{processes}x{devices}{part}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    print(f"{name}: {dtype}, {processes} x {devices} devices", file=sys.stderr)
    environment = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {EASY}",
        "JAX_PLATFORMS": "cpu",
        "JAX_SHARE_BINARY_BETWEEN_HOSTS": "1",
        "JAX_ENABLE_X64": str(int(dtype == "float64")),
    }
    target = f"dyncomp.bench.mesh_job:{name}"
    found = fresh.together(target, words, processes=processes, environment=environment)
    kept.write_text(json.dumps(found))
    return found


def apart(losses: Losses, one: Losses) -> float:
    """Largest difference of two curves; infinite where their lengths differ."""
    if len(losses) != len(one):
        return float("inf")
    return float(np.max(np.abs(np.subtract(losses, one))))


def of_spread(losses: Losses, seeds: Sequence[Losses]) -> float:
    """Largest ratio of the distance from the first seed's curve to the spread of all seeds at that step."""
    if len(losses) != len(seeds[0]):
        return float("inf")
    spread = np.max(seeds, axis=0) - np.min(seeds, axis=0)
    return float(np.max(np.abs(np.subtract(losses, seeds[0])) / spread))


def _curve_rows(dtype: str, count: int, job: Any, alone: Any) -> list[dict[str, Any]]:
    made = []
    where = f"{count}x{DEVICES // count}"
    for kind in job:
        meshes, seeds = job[kind]["meshes"], alone[kind]
        losses = {name: mesh["losses"] for name, mesh in meshes.items()}
        if dtype == "float64":
            each = {name: apart(curve, seeds[0]) for name, curve in losses.items()}
            made.append(_row(f"{kind}/float64/{where}", each, EXACT, SAID["float64"]))
            continue
        first = {n: abs(curve[0] - seeds[0][0]) / seeds[0][0] for n, curve in losses.items()}
        made.append(_row(f"{kind}/loss/{where}", first, CLOSE, SAID["loss"]))
        gradients = {name: mesh["gradients"] for name, mesh in meshes.items()}
        made.append(_row(f"{kind}/gradients/{where}", gradients, CLOSE, SAID["gradients"]))
        each = {name: of_spread(curve, seeds) for name, curve in losses.items()}
        made.append(_row(f"{kind}/float32/{where}", each, 1.0, SAID["float32"]))
    once = [mesh["epochs"] for found in job.values() for mesh in found["meshes"].values()]
    return [*made, _share(f"epochs/{dtype}/{where}", once)]


def _resumed(folder: Path, name: str, dtype: str, alone: Any) -> list[dict[str, Any]]:
    """A run in parts, each on what `RESUMED` says; begun anew where it was left half way."""
    parts, start = [], 0
    if len(list(folder.glob("part-*.json"))) < len(ENDS):
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    for (processes, devices), stop in zip(RESUMED[name], ENDS, strict=True):
        words = {"folder": str(folder), "dtype": dtype, "start": start, "stop": stop}
        parts.append(_job("part", words, folder, processes, devices))
        start = stop
    losses = {kind: parts[-1][kind]["losses"] for kind in KINDS}
    if dtype == "float64":
        each = {kind: apart(losses[kind], alone[kind][0]) for kind in KINDS}
        row = _row(f"resumed/float64/{name}", each, EXACT, f"{SAID['float64']}, resumed twice")
    else:
        each = {kind: of_spread(losses[kind], alone[kind]) for kind in KINDS}
        row = _row(f"resumed/float32/{name}", each, 1.0, f"{SAID['float32']}, resumed twice")
    read = [np.concatenate([part[kind]["examples"] for part in parts]) for kind in KINDS]
    return [row, _share(f"resumed/epochs/{dtype}/{name}", [once_an_epoch(r) for r in read])]


def _row(name: str, each: Mapping[str, float], goal: float, said: str) -> dict[str, Any]:
    worst = max(each.values())
    words: dict[str, Any] = {"goal": goal, "relation": "<=", "runs": len(each), "each": dict(each)}
    return timing.row(f"meshes/{name}", worst, (worst, worst), reference=said, **words)


def _share(name: str, holds: Sequence[bool]) -> dict[str, Any]:
    share = sum(holds) / len(holds)
    words: dict[str, Any] = {"goal": 1.0, "relation": ">=", "runs": len(holds)}
    return timing.row(f"meshes/{name}", share, (share, share), reference=SAID["epochs"], **words)
