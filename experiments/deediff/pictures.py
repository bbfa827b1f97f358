"""The pictures of the page: quality against cost, errors by layer, where steps stop, samples, decisions on images."""

from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np

from dyncomp.evidence.drawing import plane, save

LABELS = {
    "full": "all layers, three losses",
    "plain": "all layers, without L_UAL",
    "steps_10": "all layers, half the steps",
    "small": "network of 3 blocks",
    "static_2": "layer 2 always",
    "static_4": "layer 4 always",
    "exit_0.75": "certainty > 0.75",
    "exit_0.85": "certainty > 0.85",
    "exit_0.92": "certainty > 0.92",
    "patience_0.75": "certainty > 0.75, patience",
    "random_0.75": "random, as 0.75",
    "within_0.75": "random within steps, as 0.75",
    "schedule_0.75": "schedule, as 0.75",
}
ROWS = {
    "full": "all layers",
    "exit_0.75": "certainty > 0.75",
    "schedule_0.75": "schedule",
    "random_0.75": "random exits",
    "no_ual_0.75": "exits, no L_UAL",
    "small": "3 blocks",
}
TAUS = (0.75, 0.85, 0.92)
TIMES = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
BUCKETS = {"t < 100": (0.0, 0.1), "300 to 700": (0.3, 0.7), "t >= 700": (0.7, 1.0)}


def chosen(net, params, test, found, plain, drawn, small, columns: int = 10) -> dict[str, Any]:
    """What the pictures show of one seed.

    Args:
      net, params: the fine-tuned network.
      test: images.
      found, plain: ``Errors`` of both networks.
      drawn: ``Drawn`` of every arm; ``small``: of the small network.
    """
    shown: dict[str, Any] = {}
    for name in ROWS:
        one = small if name == "small" else drawn[name]
        shown[f"images/{name}"] = one.images[:columns, ..., 0]
    for tau in TAUS:
        shown[f"exits/{tau:g}"] = drawn[f"exit_{tau:g}"].exits
    for name, errors in (("full", found), ("plain", plain)):
        for bucket, (low, high) in BUCKETS.items():
            at = (errors.times >= low) & (errors.times < high)
            shown[f"errors/{name}/{bucket}"] = errors.squared[:, at].mean(axis=1)
    return shown | _decisions(net, params, test[:4])


def _decisions(net: Any, params: Any, images: np.ndarray) -> dict[str, np.ndarray]:
    """Images at several times: x_t, the first layer's map, and every layer's mean certainty."""
    times = np.tile(np.asarray(TIMES, np.float32), len(images))
    clean = images.repeat(len(TIMES), axis=0)
    noise = np.random.default_rng(0).normal(size=clean.shape).astype(np.float32)
    noised = net.schedule.noised(clean, noise, times)
    run = jax.jit(lambda *args: net.apply({"params": params}, *args, method="denoise"))
    _, certainty = run(noised, times)
    return {
        "noised": np.asarray(noised)[..., 0],
        "maps": np.asarray(certainty)[0, ..., 0],
        "certainty": np.asarray(certainty).mean(axis=(2, 3, 4)),
    }


def draw(results: dict[str, Any], outdir: Path) -> None:
    """Five files."""
    root = Path(results["workdir"])
    names = [root / f"seed_{run['seed']}" / f"shown_{run['seed']}.npz" for run in results["runs"]]
    seen = [dict(np.load(name)) for name in names]
    plane(
        results, LABELS, outdir / "1_frechet_against_cost.svg",
        x=("cost", "FLOPs of an image (all layers at all steps are 1)"),
        y=("frechet", "Frechet distance"), sweep=["full", *(f"exit_{tau:g}" for tau in TAUS[::-1])],
    )  # fmt: skip
    layers(seen, outdir / "2_error_of_every_layer.svg")
    stops(seen, outdir / "3_where_steps_stop.svg")
    samples(seen[0], outdir / "4_samples.png")
    decisions(seen[0], outdir / "5_decisions_on_images.png")


def layers(seen: list[dict[str, Any]], path: Path) -> None:
    """Squared error after every layer in three ranges of time; dots are seeds."""
    figure, axes = plt.subplots(1, len(BUCKETS), figsize=(9.6, 3.2), sharey=True)
    for place, bucket in zip(axes, BUCKETS, strict=True):
        for color, name in enumerate(("full", "plain")):
            values = np.stack([one[f"errors/{name}/{bucket}"] for one in seen])
            x = np.arange(1, values.shape[1] + 1)
            label = "three losses" if name == "full" else "without L_UAL"
            place.plot(x, values.mean(axis=0), "o-", ms=3, color=f"C{color}", label=label)
            for row in values:
                place.plot(x, row, ".", ms=3, alpha=0.4, color=f"C{color}")
        place.set(title=bucket, xlabel="layer", yscale="log")
    axes[0].set(ylabel="mean squared error of the noise")
    axes[0].legend(fontsize=8)
    save(figure, path)


def stops(seen: list[dict[str, Any]], path: Path) -> None:
    """Mean layers run at every step of sampling, and the band that holds 80% of the samples."""
    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    for color, tau in enumerate(TAUS):
        depth = np.concatenate([one[f"exits/{tau:g}"] for one in seen], axis=1) + 1
        steps = np.arange(1, len(depth) + 1)
        low, high = np.quantile(depth, (0.1, 0.9), axis=1)
        axes.fill_between(steps, low, high, color=f"C{color}", alpha=0.15, lw=0)
        axes.plot(steps, depth.mean(axis=1), "o-", ms=3, color=f"C{color}", label=f"> {tau:g}")
    axes.set(xlabel="step of sampling (the first is the noisiest)", ylabel="layers run")
    axes.legend(title="certainty", fontsize=8)
    save(figure, path)


def samples(one: dict[str, Any], path: Path) -> None:
    """The same noise, sampled in several ways."""
    columns = len(one["images/full"])
    figure, grid = plt.subplots(len(ROWS), columns, figsize=(columns * 0.62, len(ROWS) * 0.66))
    for row, (name, label) in zip(grid, ROWS.items(), strict=True):
        for axes, image in zip(row, one[f"images/{name}"], strict=True):
            axes.imshow(image, cmap="gray", vmin=-1, vmax=1)
            _bare(axes)
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    save(figure, path)


def decisions(one: dict[str, Any], path: Path, tau: float = 0.75) -> None:
    """Test images at several times; below each the first layer's certainty, and where the step would stop."""
    count, columns = len(one["noised"]) // len(TIMES), len(TIMES)
    figure, grid = plt.subplots(2 * count, columns, figsize=(columns * 0.85, count * 1.85))
    for place in range(len(one["noised"])):
        row, column = divmod(place, columns)
        above, below = grid[2 * row, column], grid[2 * row + 1, column]
        above.imshow(one["noised"][place], cmap="gray", vmin=-2, vmax=2)
        below.imshow(one["maps"][place], cmap="viridis", vmin=0.3, vmax=1)
        means = one["certainty"][:-1, place]
        layer = int(np.argmax(means > tau)) + 1 if (means > tau).any() else len(means) + 1
        below.set_xlabel(f"layer {layer} ({means[0]:.2f})", fontsize=6, labelpad=1)
        if row == 0:
            above.set_title(f"t = {1000 * TIMES[column]:.0f}", fontsize=8)
        for axes in (above, below):
            _bare(axes)
    figure.suptitle(
        f"x_t; the first layer's certainty (dark 0.3, bright 1); stops at layer for > {tau:g}",
        fontsize=8, y=0.94,
    )  # fmt: skip
    save(figure, path)


def _bare(axes: Any) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
