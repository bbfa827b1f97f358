"""The pictures of the page: transfer, where images leave under attack, designs, and attacked images."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

EPS = (4, 8, 16)
COLUMNS = {
    "clean": "clean",
    "pgd": "PGD, 8/255",
    "slow": "slowdown, 8/255",
    "early_image": "early attack\nfrom the image",
    "early_0.1": "early attack\nfrom noise",
}
GARMENTS = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip
EXITS = ("1", "2", "3", "end")


def chosen(shown: dict[str, Any], images: int = 8) -> dict[str, Any]:
    """The first images of different classes, under every attack, with exit and answer."""
    count = len(shown["early_0.1_images"])
    labels = shown["labels"][:count]
    _, first = np.unique(labels, return_index=True)
    rows = np.sort(first)[:images]
    kept = {"labels": labels[rows]}
    for name in COLUMNS:
        for key in ("images", "exit", "said"):
            kept[f"{name}_{key}"] = shown[f"{name}_{key}"][rows]
    return kept


def draw(results: dict[str, Any], outdir: Path) -> None:
    """Four files."""
    first = results["runs"][0]["seed"]
    one = dict(np.load(Path(results["workdir"]) / f"seed_{first}" / f"shown_{first}.npz"))
    transfer(results, outdir / "1_transfer.svg")
    leaving(results, outdir / "2_where_images_leave.svg")
    designs(results, outdir / "3_designs.svg")
    pictures(one, outdir / "4_images_under_attack.png")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, bbox_inches="tight", dpi=110)
    plt.close(figure)


def figures_of(results: dict[str, Any], arm: str, metric: str) -> np.ndarray:
    """An arm's figure in every seed."""
    return np.asarray([run["arms"][arm]["figures"][metric] for run in results["runs"]])


def transfer(results: dict[str, Any], path: Path) -> None:
    """Success against eps on both networks (mean and range of the seeds), noise at 8/255."""
    figure, panels = plt.subplots(1, 2, figsize=(8.4, 3.6), sharey=True)
    for axes, target in zip(panels, ("static", "dynamic"), strict=True):
        for source, color in (("static", "C0"), ("dynamic", "C1")):
            keys = ["success_4", "success", "success_16"]
            y = np.stack([figures_of(results, f"{source}_on_{target}", key) for key in keys])
            mean = y.mean(axis=1)
            span = [mean - y.min(axis=1), y.max(axis=1) - mean]
            axes.errorbar(EPS, mean, span, fmt="o-", color=color, ms=4, capsize=2,
                          label=f"made on the {source} network")  # fmt: skip
        noise = figures_of(results, f"noise_on_{target}", "success")
        axes.plot([8] * len(noise), noise, "x", color="0.4", ms=5, label="sign noise")
        axes.set(xlabel="largest change of a pixel, of 255", title=f"tried on the {target} network")
        axes.set(xticks=EPS, ylim=(-3, 103))
    panels[0].set_ylabel("answers changed, percent of images\nthat both get right")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, fontsize=8, ncol=3, loc="upper center", bbox_to_anchor=(0.5, 0.0))
    _save(figure, path)


def leaving(results: dict[str, Any], path: Path) -> None:
    """Share of the test images that leave at each exit, clean and attacked, without and with a quota."""
    arms = {
        "dynamic": "clean", "slow_noise": "sign noise", "slow_free": "slowdown, label free",
        "slow": "slowdown, label kept", "quota_slow": "slowdown, quota", "peak_slow": "slowdown, peak",
    }  # fmt: skip
    figure, axes = plt.subplots(figsize=(7.2, 3.2))
    left, shades = np.zeros(len(arms)), plt.get_cmap("viridis")(np.linspace(0.95, 0.15, len(EXITS)))
    for index, name in enumerate(EXITS):
        shares = [figures_of(results, arm, f"share_{index + 1}").mean() for arm in arms]
        axes.barh(range(len(arms)), shares, left=left, color=shades[index], label=f"exit {name}")
        left += shares
    for row, arm in enumerate(arms):
        cost, accuracy = (figures_of(results, arm, key).mean() for key in ("cost", "accuracy"))
        axes.text(1.01, row, f"cost {cost:.2f}, {accuracy:.1f}% right", va="center", fontsize=8)
    axes.set_yticks(range(len(arms)), list(arms.values()))
    axes.invert_yaxis()
    axes.set(xlabel="share of the test images", xlim=(0, 1))
    axes.legend(ncol=4, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    _save(figure, path)


def designs(results: dict[str, Any], path: Path) -> None:
    """Static-made examples at 8/255 on every design: success against the clean cost, a dot a seed."""
    names = {
        "static_on_dynamic": "four exits, joint", "static_on_six_exits": "six exits, joint",
        "static_on_heads_only": "heads on the static net", "static_on_early_exit": "first exit alone",
        "static_on_late_exit": "third exit alone", "static_on_q_0.5": "threshold 0.5",
        "static_on_q_0.9": "threshold 0.9", "static_on_q_0.99": "threshold 0.99",
    }  # fmt: skip
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    for index, (arm, label) in enumerate(names.items()):
        cost = figures_of(results, "dynamic" if arm == "static_on_dynamic" else arm,
                          "cost" if arm == "static_on_dynamic" else "clean_cost")  # fmt: skip
        success = figures_of(results, arm, "success")
        axes.plot(cost, success, ".", color=f"C{index}", ms=4, alpha=0.5)
        axes.plot(cost.mean(), success.mean(), "o", color=f"C{index}", ms=7, label=label)
    white = figures_of(results, "static_on_static", "success").mean()
    axes.axhline(white, color="0.5", lw=1, ls="--")
    axes.text(axes.get_xlim()[0], white, " the static network itself", va="bottom", fontsize=8)
    axes.set(
        xlabel="mean cost when clean (the whole network is 1)", ylabel="answers changed, percent"
    )
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _save(figure, path)


def pictures(one: dict[str, Any], path: Path) -> None:
    """A row an image, a column an attack; below each what is said and where it left, in red where wrong."""
    rows = len(one["labels"])
    figure, grid = plt.subplots(rows, len(COLUMNS), figsize=(len(COLUMNS) * 1.25, rows * 1.22))
    for row in range(rows):
        for axes, (name, title) in zip(grid[row], COLUMNS.items(), strict=True):
            said, left = one[f"{name}_said"][row], one[f"{name}_exit"][row]
            axes.imshow(one[f"{name}_images"][row, ..., 0], cmap="gray_r", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            wrong = said != one["labels"][row]
            axes.set_xlabel(f"{GARMENTS[said]}, {EXITS[left]}", fontsize=7, labelpad=1,
                            color="tab:red" if wrong else "black")  # fmt: skip
            if row == 0:
                axes.set_title(title, fontsize=8)
    figure.tight_layout(pad=0.3)
    _save(figure, path)
