"""The pictures of the page: success against depth, where an episode needs depth, and episodes with their depths."""

from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np

from dyncomp.evidence.drawing import bars, save
from dyncomp.tasks.pick_place import sentence

LABELS = {
    "action": "actions agree",
    "online": "actions agree, refined online",
    "cosine": "features agree",
    "time": "deeper as time goes on",
    "random": "random, same histogram",
    "peak_4": "actions agree, four blocks at most",
    "unsampled": "actions agree, head trained on the last exit",
}
PHASES = (
    "far from the block",
    "near the block",
    "takes it",
    "far from the zone",
    "near the zone",
    "lets go",
)
EPISODES, FRAMES = 4, 12


def chosen(found: Any, blocks: np.ndarray, env: Any) -> dict[str, Any]:
    """What the pictures show of one seed.

    Args:
      found: ``Rollout`` whose ``told`` is the exits.
      blocks: run at each exit.
      env: the world.
    """
    depth, alive, worlds = blocks[found.told], found.alive, found.worlds
    own = np.take_along_axis(worlds.blocks, worlds.goal[..., :1, None].repeat(2, -1), 2)[..., 0, :]
    zone = np.take_along_axis(worlds.zones, worlds.goal[..., 1:, None].repeat(2, -1), 2)[..., 0, :]
    carries = worlds.held == worlds.goal[..., 0]
    way = np.linalg.norm(np.where(carries[..., None], zone, own) - worlds.gripper, axis=-1)
    phase = np.where(way > 0.24, 0, np.where(way > 0.04, 1, 2)) + 3 * carries
    lengths = alive.sum(0)
    good = np.flatnonzero(found.success & (lengths >= 6) & (lengths <= FRAMES))[:EPISODES]
    draw = jax.jit(jax.vmap(lambda w: env.draw(w, np.full(2, 0.5, np.float32), env.side)))
    table = np.full((len(PHASES), int(blocks[-1]) + 1), 0)
    np.add.at(table, (phase[alive], depth[alive].astype(int)), 1)
    frames = [draw(jax.tree.map(lambda x, e=e: x[:FRAMES, e], worlds)) for e in good]
    return {
        "phases": table,
        "frames": np.asarray(frames, np.float32).reshape(-1, FRAMES, env.side, env.side, 3),
        "depths": depth[:FRAMES, good].T,
        "lengths": lengths[good],
        "words": worlds.words[0, good],
    }


def draw(results: dict[str, Any], outdir: Path) -> None:
    """Three files."""
    root = Path(results["workdir"])
    names = [
        root / f"seed_{run['seed']}" / f"decisions_{run['seed']}.npz" for run in results["runs"]
    ]
    seen = [dict(np.load(name)) for name in names]
    quality(results, outdir / "1_success_against_depth.svg")
    places(seen, outdir / "2_depth_by_phase.svg")
    films(seen[0], outdir / "3_episodes_by_depth.png")


def figures_of(results: dict[str, Any], arm: str, metric: str) -> np.ndarray:
    """An arm's figure in every seed."""
    return np.asarray([run["arms"][arm]["figures"][metric] for run in results["runs"]])


def quality(results: dict[str, Any], path: Path) -> None:
    """Success in closed loop and error on demonstrations, mean and range of the seeds."""
    figure, panels = plt.subplots(1, 2, figsize=(10.6, 4.4))
    pairs = (("depth", "success", "percent of rollouts that succeed"),
             ("error_depth", "error", "error of the velocity, demonstrations"))  # fmt: skip
    for axes, (x, y, label) in zip(panels, pairs, strict=True):
        static = [f"static_{k}" for k in (2, 3, 4, 5, 6)]
        points = np.asarray(
            [[figures_of(results, arm, m).mean() for m in (x, y)] for arm in static]
        )
        axes.plot(*points.T, "s--", color="0.5", ms=4, lw=1, label="always the same depth")
        for index, (arm, name) in enumerate(LABELS.items()):
            at, values = figures_of(results, arm, x), figures_of(results, arm, y)
            span = [[values.mean() - values.min()], [values.max() - values.mean()]]
            axes.errorbar(at.mean(), values.mean(), span, fmt="o", color=f"C{index}", ms=5, lw=1,
                          capsize=2, label=name)  # fmt: skip
        axes.set(xlabel="mean blocks a control step", ylabel=label)
    panels[0].legend(fontsize=7, loc="best")
    save(figure, path)


def places(seen: list[dict[str, Any]], path: Path) -> None:
    """Mean depth of each phase of an episode (bars; dots are seeds), and the share of each depth."""
    tables = np.stack([one["phases"] for one in seen]).astype(float)
    depths = np.arange(tables.shape[2])
    means = (tables * depths).sum(2) / np.maximum(tables.sum(2), 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.6, 3.4))
    bars(left, PHASES, means)
    left.set(ylabel="mean blocks a control step", ylim=(0, 6))
    left.set_xticks(range(len(PHASES)), PHASES, rotation=25, ha="right")
    each = tables.sum(0)[:, 2:]
    each = each / np.maximum(each.sum(1, keepdims=True), 1)
    right.imshow(each.T, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(each.T):
        shade = "white" if share > 0.6 else "black"
        right.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=7, color=shade)
    right.set(yticks=range(each.shape[1]), yticklabels=range(2, 2 + each.shape[1]))
    right.set(ylabel="blocks", title="share of the steps of a phase")
    right.set_xticks(range(len(PHASES)), PHASES, rotation=25, ha="right")
    save(figure, path)


def films(one: dict[str, Any], path: Path) -> None:
    """Episodes from left to right; every frame has the blocks that ran above it, and a border of that shade."""
    rows = max(1, len(one["frames"]))
    figure, grid = plt.subplots(rows, FRAMES, figsize=(FRAMES * 0.95, rows * 1.3), squeeze=False)
    shades = plt.get_cmap("viridis_r")
    for episode, row in enumerate(grid):
        for step, axes in enumerate(row):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if episode >= len(one["frames"]) or step >= one["lengths"][episode]:
                continue
            depth = int(one["depths"][episode, step])
            axes.imshow(np.clip(one["frames"][episode, step], 0, 1))
            axes.spines[:].set_visible(True)
            for spine in axes.spines.values():
                spine.set(color=shades((depth - 2) / 4), linewidth=3)
            axes.set_xlabel(str(depth), fontsize=8, labelpad=2)
        if episode < len(one["frames"]):
            row[0].set_title(sentence(one["words"][episode]), fontsize=8, loc="left")
    save(figure, path)
