"""Adaptive solvers and equilibrium blocks (arXiv 2202.02435): oscillators, Fashion-MNIST, batches of mixed stiffness.

Oscillators measure steps against a solution at tolerance 1e-12, in float64. On Fashion-MNIST an ODE block (with and
without penalties) and an equilibrium block are trained once a seed; every tolerance is an evaluation of the same
weights. Networks of oscillators of mixed stiffness measure what a batch executes.
"""

from pathlib import Path
from typing import Any

import numpy as np

from dyncomp.evidence.seed import load_module
from dyncomp.tasks import FashionMNIST

HERE = Path(__file__).parent
oscillators, garments, gradients = (
    load_module(HERE / f"{name}.py") for name in ("oscillators", "garments", "gradients")
)

TITLE = "Adaptive solvers and equilibrium blocks"
COMPUTE = "nfe"
METRICS = {
    "accuracy": {"text": "percent of the test images"},
    "nfe": {"text": "evaluations of f an example needs", "minimize": True},
    "log_error": {"text": "log10 of the distance to a solve at 1e-12 (garments: of the logits, to 1e-6)",
                  "minimize": True},
    "share": {"text": "nfe relative to tolerance 1e-6", "minimize": True},
    "of_plain": {"text": "nfe relative to the network without a penalty", "minimize": True},
    "iterations": {"text": "evaluations of f until the residual is within 1e-4", "minimize": True},
    "cosine": {"text": "between the one-step v and the exact one"},
    "executed": {"text": "evaluations the device ran, relative to the vmapped solve", "minimize": True},
    "time": {"text": "of a batch, relative to the vmapped solve", "minimize": True},
}  # fmt: skip
PICTURES = HERE / "pictures.py"
ARMS = [
    *(f"{who}_mu{mu}_{tol}" for who in ("tsit5", "rk4")
      for mu in oscillators.MUS for tol in oscillators.VDP),
    "mixed",
    *(f"{who}_{tol}" for who in ("ode", "rk4", "euler", "deq") for tol in garments.TOLERANCES),
    "random_1e-2", *garments.PENALTIES, "unroll", "implicit", "one_step",
    *(f"rho_{rho}" for rho in gradients.RHOS), "gaussian_0.9",
    "cold_update", "warm_update", "cold_move", "warm_move", "seminorm",
    "vmapped", "shared", "own_steps", "compacted",
]  # fmt: skip
# The ODE block's width, end time, rate and gain were tried four times without a penalty; all its arms share them.
TRIALS = {arm: 4 if arm.split("_")[0] in ("ode", *garments.PENALTIES) else 1 for arm in ARMS}


def load(quick: bool) -> dict[str, Any]:
    """Training images and the first test images, with labels."""
    task, arrays = FashionMNIST(), {}
    for split, most in (
        ("train", 600 if quick else 50000),
        ("test", 64 if quick else garments.TEST),
    ):
        batch = task.source(split).batch(np.arange(most))
        arrays[split] = np.asarray(batch["inputs"]), np.asarray(batch["targets"])
    return arrays


def run_seed(seed: int, quick: bool, workdir: Path) -> dict[str, dict[str, float]]:
    """All arms of one seed; shown_SEED.npz in ``workdir`` is for the pictures."""
    arrays, found, shown = load(quick), {}, {}
    parts = (
        lambda: oscillators.oscillators(seed, quick),
        lambda: oscillators.batches(seed, quick),
        lambda: garments.flows(seed, arrays, quick),
        lambda: garments.equilibria(seed, arrays, quick),
    )
    for part in parts:
        own, seen = part()
        found, shown = {**found, **own}, {**shown, **seen}
    found |= gradients.gradients(shown.pop("cell"), shown.pop("read"), quick)
    found |= gradients.cosines(seed)
    workdir.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(workdir / f"shown_{seed}.npz", **shown)
    return found


def figures(results: dict[str, Any], outdir: Path) -> None:
    """Writes the pictures of the page."""
    load_module(PICTURES).draw(results, outdir)
