"""The pictures of the page: errors, evaluations by input, accuracy, gradients, and who is still running in a batch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullFormatter

from dyncomp.evidence.drawing import figures_of, save

MUS = (1, 5, 10, 20)
VDP = ("1e-3", "1e-5", "1e-7", "1e-9")
TOLERANCES = ("1e-1", "1e-2", "1e-3", "1e-4", "1e-5", "1e-6")
GARMENTS = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip


def draw(results: dict[str, Any], outdir: Path) -> None:
    """Five files."""
    root = Path(results["workdir"])
    names = [root / f"seed_{run['seed']}" / f"shown_{run['seed']}.npz" for run in results["runs"]]
    seen = [dict(np.load(name)) for name in names]
    oscillators(results, outdir / "1_error_against_evaluations.svg")
    by_input(seen[0], outdir / "2_evaluations_by_stiffness.svg")
    accuracies(results, outdir / "3_accuracy_against_evaluations.svg")
    images(seen[0], outdir / "4_images_by_evaluations.png")
    gradients(results, outdir / "5_one_step_gradient.svg")


def mean(results: Mapping[str, Any], arm: str, metric: str) -> float:
    """Over seeds."""
    return float(np.mean([figures[metric] for figures in figures_of(results, arm)]))


def oscillators(results: Mapping[str, Any], path: Path) -> None:
    """End-point error of adaptive Tsit5 and of RK4 with as many evaluations, for every mu."""
    figure, grid = plt.subplots(1, len(MUS), figsize=(11, 3.1), sharey=True)
    for axes, mu in zip(grid, MUS, strict=True):
        for who, label, style in (
            ("tsit5", "Tsit5, adaptive", "o-"),
            ("rk4", "RK4, equal steps", "s--"),
        ):
            arms = [f"{who}_mu{mu}_{tol}" for tol in VDP]
            nfe = [mean(results, arm, "nfe") for arm in arms]
            error = [10 ** mean(results, arm, "log_error") for arm in arms]
            axes.plot(nfe, error, style, ms=4, lw=1.2, label=label)
        axes.set(xscale="log", yscale="log", title=f"mu = {mu}", xlabel="evaluations of f")
        axes.axhspan(1e5, 1e7, color="0.92", zorder=0)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks([500, 1000, 2000, 4000], ["500", "1000", "2000", "4000"])
        axes.set_xlim(380, 5500)
    grid[0].set(ylabel="error at t = 20 (geometric mean)", ylim=(1e-12, 3e6))
    grid[-1].text(0.97, 0.9, "diverged", transform=grid[-1].transAxes, ha="right", fontsize=8)
    grid[0].legend(fontsize=8, loc="lower left")
    save(figure, path)


def by_input(one: Mapping[str, Any], path: Path) -> None:
    """Evaluations by stiffness, and how many rows of a mixed batch are still running."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    left.scatter(one["mu"], one["mu_nfe"], s=14, label="alone, tolerance 1e-5")
    left.scatter(one["batch_mu"], one["batch_nfe"], s=8, label="networks in a batch, 1e-4")
    left.set(xscale="log", xlabel="mu", ylabel="evaluations an example needs")
    left.legend(fontsize=8)
    needed = np.sort(one["batch_nfe"])
    total = len(needed)
    right.fill_between([0, needed[-1]], total, color="0.9", label="vmapped: all until the slowest")
    right.fill_between(
        np.r_[0, needed], np.r_[total, total - np.arange(1, total + 1)], step="post", color="C0",
        alpha=0.7, label="still on the way",
    )  # fmt: skip
    right.set(xlabel="evaluations so far", ylabel="examples of the batch", xlim=(0, needed[-1]))
    right.legend(fontsize=8, loc="center right")
    save(figure, path)


def accuracies(results: Mapping[str, Any], path: Path) -> None:
    """Accuracy of one set of weights over tolerances, with equal steps too; penalties; equilibrium."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    for who, label, style in (
        ("ode", "Tsit5, by tolerance", "o-"),
        ("rk4", "RK4, equal steps", "s--"),
        ("euler", "Euler, equal steps", "^:"),
    ):
        arms = [f"{who}_{tol}" for tol in TOLERANCES]
        pairs = [(mean(results, arm, "nfe"), mean(results, arm, "accuracy")) for arm in arms]
        left.plot(*np.transpose(pairs), style, ms=4, lw=1.2, label=label)
    for index, arm in enumerate(("kinetic", "jacobian", "both")):
        left.plot(
            mean(results, arm, "nfe"), mean(results, arm, "accuracy"), "D", color=f"C{index + 3}",
            ms=5, label=f"penalty: {arm}, at 1e-3",
        )  # fmt: skip
    arms = [f"deq_{tol}" for tol in TOLERANCES]
    pairs = [(mean(results, arm, "nfe"), mean(results, arm, "accuracy")) for arm in arms]
    right.plot(*np.transpose(pairs), "o-", ms=4, lw=1.2, label="equilibrium, by tolerance")
    right.plot(
        mean(results, "unroll", "nfe"), mean(results, "unroll", "accuracy"), "D", color="C3",
        label="weight-tied unroll",
    )  # fmt: skip
    for axes, name in ((left, "ODE block"), (right, "equilibrium block")):
        axes.set(xlabel="evaluations an image needs", ylabel="test accuracy, percent", title=name)
        axes.legend(fontsize=7)
    save(figure, path)


def images(one: Mapping[str, Any], path: Path) -> None:
    """The test images that took the fewest evaluations, and those that took the most."""
    order = np.argsort(one["image_nfe"], kind="stable")
    figure, grid = plt.subplots(2, 12, figsize=(9.6, 2.4))
    for row, (axes_row, rows) in enumerate(zip(grid, (order[:12], order[12:]), strict=True)):
        for axes, place in zip(axes_row, rows, strict=True):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            axes.imshow(one["images"][place, ..., 0], cmap="gray_r")
            name = GARMENTS[int(one["label"][place])]
            axes.set_xlabel(f"{name}\n{int(one['image_nfe'][place])}", fontsize=6, labelpad=1)
        axes_row[0].set_ylabel(
            ("fewest", "most")[row], rotation=0, ha="right", va="center", fontsize=9
        )
    low, high = one["all_nfe"].min(), one["all_nfe"].max()
    figure.suptitle(
        f"evaluations at tolerance 1e-3: {one['all_nfe'].mean():.1f} on average, {low} to {high}",
        fontsize=9,
    )
    save(figure, path)


def gradients(results: Mapping[str, Any], path: Path) -> None:
    """Cosine between the one-step and the exact v over the norm of J."""
    rhos = [round(0.1 * n, 1) for n in range(1, 10)]
    figure, axes = plt.subplots(figsize=(5.4, 3.4))
    line = np.linspace(0, 0.999, 200)
    axes.plot(line, np.sqrt(1 - line**2), color="0.6", label="bound: sqrt(1 - rho^2)")
    cosine = [mean(results, f"rho_{rho}", "cosine") for rho in rhos]
    axes.plot(rhos, cosine, "o", ms=5, label="rho times a random orthogonal J")
    gaussian = mean(results, "gaussian_0.9", "cosine")
    axes.plot([0.9], [gaussian], "s", ms=6, label="Gaussian J of norm 0.9")
    trained = mean(results, "one_step", "parameter_cosine")
    axes.plot([0.9], [trained], "D", ms=5, label="trained cell, |W| <= 0.9: parameter gradients")
    axes.set(xlabel="norm of J", ylabel="cosine with the exact gradient", ylim=(0, 1.03))
    axes.legend(fontsize=7, loc="lower left")
    save(figure, path)
