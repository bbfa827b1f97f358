"""Leaving where two exits want the same action (arXiv 2411.02359), in closed loop in a small world.

The shipped config ``deer_vla`` gives the policy, its demonstrations and the ablation. Every other arm is another way
to choose the exit on the very same policy, from the same 200 start states; thresholds come from calibration
demonstrations and are applied as run-time arguments, so that all rollouts are one compiled program.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dyncomp import config
from dyncomp.core.budget import geometric_shares
from dyncomp.core.rng import fold
from dyncomp.evidence.seed import load_module
from dyncomp.exits import (
    ConsistencyRule,
    decide,
    middle_steps,
    ratio_for_mean,
    refine_thresholds,
    solve_thresholds,
)
from dyncomp.exits.budgets import leaves_at
from dyncomp.models import apply
from dyncomp.tasks import rollout
from dyncomp.training import Run, optimizers
from dyncomp.training.state import init_variables, new_state
from dyncomp.training.step import train_step

TITLE = "A robot policy that leaves where two exits want the same action"
COMPUTE = "depth"
METRICS = {
    "success": {"text": "percent of 200 rollouts"},
    "depth": {"text": "mean blocks a control step, in closed loop (six are all)", "minimize": True},
    "error": {
        "text": "mean absolute error of the velocity, held-out demonstrations",
        "minimize": True,
    },
    "error_depth": {"text": "mean blocks a control step on these demonstrations"},
    "kflops": {
        "text": "thousand FLOPs a control step, cameras and all asked heads",
        "minimize": True,
    },
    "share_gap": {"text": "largest distance of a calibration share from floor(S q) / S"},
    "drift": {"text": "half the sum of |closed-loop share - wanted share| over exits"},
}
PICTURES = Path(__file__).with_name("pictures.py")
STATIC = [f"static_{k}" for k in (2, 3, 4, 5, 6)]
ARMS = [
    *STATIC,
    "action",
    "cosine",
    "time",
    "random",
    "peak_4",
    "online",
    "unsampled",
    "unsampled_6",
]
TRIALS = dict.fromkeys(ARMS, 1)

MEAN = 2.75
"""Wanted blocks a control step, of 2 to 6: below half of six, for closed loop drifts from the demonstrations."""
PEAK = 4.0
ROLLOUTS, STEPS = 200, 32
HOW = {"action": 0, "cosine": 1, "time": 2, "random": 3}
COSINE = ConsistencyRule(kind="cosine")


# ---- training


def fit(run: Run, seed: int, quick: bool) -> Any:
    """Trains all stages of a run on windows in a fresh order; returns the variables, stacked."""
    source, rng = run.task.source("train"), np.random.default_rng([seed, 1])
    example = source.batch(np.zeros(1, np.int64))["inputs"]
    init = jax.jit(functools.partial(init_variables, run.model, seed=seed))
    variables, state = nn.meta.unbox(init(example)), None
    for stage in run.plan():
        tx = optimizers.freeze(stage.optimizer.build(stage.steps), stage.trainable)
        fresh = new_state(variables, tx, ema=False)
        step = jax.jit(train_step(run, stage, tx), donate_argnums=0)
        state = fresh if state is None else fresh.replace(step=state.step)
        for _ in range(3 if quick else stage.steps):
            rows = rng.integers(len(source), size=run.batch_size)
            state, _ = step(state, source.batch(rows), np.int32(seed))
        variables = state.variables
    return variables


# ---- choosing exits


@dataclasses.dataclass(frozen=True)
class Way:
    """How exits are chosen: run-time arguments of one program.

    Attributes:
      how: a key of `HOW`.
      bounds: thresholds [y] of scores, or of time.
      shares: [x], of random exits.
    """

    how: str
    bounds: Any
    shares: Any = dataclasses.field(default_factory=lambda: np.full(5, 0.2, np.float32))

    @property
    def arguments(self) -> tuple[Any, ...]:
        numbers = (np.asarray(v, np.float32) for v in (self.bounds, self.shares))
        return (np.int32(HOW[self.how]), *numbers)


def always(exit: int, exits: int) -> Way:
    """Everyone leaves at one exit."""
    bounds = np.full(exits - 1, np.inf)
    bounds[exit:] = -np.inf
    return Way("action", bounds)


@dataclasses.dataclass(frozen=True, eq=False)
class Player:
    """A model, ready to act in its world: compiled once, for any parameters and any way to choose exits."""

    run: Run

    @functools.cached_property
    def call(self) -> Any:
        """``(params, *args, method=...)``."""
        return lambda params, *args, method: apply(
            self.run.model, {"params": params}, *args, method=method
        )

    def act(self, params: Any, way: Any, seen: Any, head: Any, t: Any, key: Any) -> Any:
        """(actions, memories, exits) of a control step from features [p b d]."""
        how, bounds, shares = way
        said, after = self.call(params, seen, head, method="asked")
        b = head.shape[0]
        chance, drawn = jax.random.split(jax.random.fold_in(key, t))
        late = t + jax.random.uniform(chance, (b, 1)) >= bounds[None]
        options = [
            decide(self.run.model.rule, said[1:-1], None, bounds, said[0]).exit,
            decide(COSINE, seen[1:-1], None, bounds, seen[0]).exit,
            jnp.sum(late, axis=1, dtype=jnp.int32),
            jax.random.categorical(drawn, jnp.log(shares), shape=(b,)).astype(jnp.int32),
        ]
        left = jnp.stack(options)[how]
        pick = lambda leaf: jnp.take_along_axis(leaf, left[None, :, None] + 1, axis=0)[0]
        return pick(said), pick(after), left

    @functools.cached_property
    def play(self) -> Any:
        """(params, way, worlds, key) -> `Rollout` whose ``told`` is the exits [t b]."""
        env = self.run.task.env

        @jax.jit
        def play(params, way, worlds, key):
            def policy(head, worlds, t):
                rows = jax.vmap(env.observe)(worlds)
                seen = self.call(params, rows, method="features")
                action, head, left = self.act(params, way, seen, head, t, key)
                return head, action, left

            head = self.run.model.start(worlds.done.shape[0]).head
            return rollout(env, worlds, policy, head, STEPS)

        return play

    @functools.cached_property
    def follow(self) -> Any:
        """(params, way, seen [p b t d], key) -> actions [t b a] and exits [t b] along demonstrations."""

        @jax.jit
        def follow(params, way, seen, key):
            def step(head, xs):
                now, t = xs
                action, head, left = self.act(params, way, now, head, t, key)
                return head, (action, left)

            steps = jnp.arange(seen.shape[2])
            head = self.run.model.start(seen.shape[1]).head
            return jax.lax.scan(step, head, (jnp.moveaxis(seen, 2, 0), steps))[1]

        return follow

    @functools.cached_property
    def look(self) -> Any:
        """(params, inputs [b t m]) -> features [p b t d]."""

        @jax.jit
        def look(params, inputs):
            b, t, m = inputs.shape
            seen = self.call(params, inputs.reshape(b * t, m), method="features")
            return seen.reshape(-1, b, t, seen.shape[-1])

        return look

    @functools.cached_property
    def scores(self) -> Any:
        """(params, seen, key) -> scores [b t y] of actions and of features, behind drawn exits."""

        @jax.jit
        def scores(params, seen, key):
            own = self.call(params, seen, key, method="deltas")
            return own, jnp.moveaxis(COSINE.score(seen[:-2], seen[1:-1]), 0, -1)

        return scores


# ---- figures


def episodes(source: Any, steps: int) -> dict[str, np.ndarray]:
    """Whole episodes, padded."""
    first = np.r_[0, np.unique(source.ends)[:-1]]
    return dataclasses.replace(source, window=steps).batch(first)


def prices(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """kFLOPs of leaving at each exit, with all heads that the rule asks, and with one head alone."""
    flops = np.cumsum([price.flops for price in model.cost(()).values()]) / 1e3
    head = model.head(parent=None).cost(model.d_model).flops / 1e3
    return flops, flops - head * (np.arange(len(flops)) + 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
    """What one trained policy is measured on."""

    player: Player
    params: Any
    worlds: Any
    seen: Any
    test: dict[str, np.ndarray]
    seed: int

    def figures(self, way: Way, asks: bool) -> tuple[dict[str, float], Any]:
        """All figures of one way, and its rollout. ``asks``: whether it needs the head at every exit on the way."""
        key, blocks = fold(self.seed, 0, "exits"), np.asarray(self.player.run.model.blocks)
        found = jax.device_get(self.player.play(self.params, way.arguments, self.worlds, key))
        exits = found.told[found.alive]
        said, left = map(np.asarray, self.player.follow(self.params, way.arguments, self.seen, key))
        real = self.test["mask"].T > 0
        wanted = self.test["targets"].swapaxes(0, 1)
        error = np.abs(said - wanted)[..., :-1].mean(-1)[real].mean()
        price = prices(self.player.run.model)[0 if asks else 1]
        figures = {
            "success": 100.0 * float(found.success.mean()),
            "depth": float(blocks[exits].mean()),
            "error": float(error),
            "error_depth": float(blocks[left[real]].mean()),
            "kflops": float(price[exits].mean()),
        }
        return figures, found

    def shares(self, found: Any) -> np.ndarray:
        """Of each exit, over the steps of a rollout."""
        exits = found.told[found.alive]
        return np.bincount(exits, minlength=self.player.run.model.depth) / len(exits)


def calibrated(player: Player, params: Any, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores [n y] of actions and of features at the calibration windows' middle steps."""
    source = player.run.task.source("calibration")
    data = source.batch(np.arange(len(source)))
    both = player.scores(params, player.look(params, data["inputs"]), fold(seed, 0, "history"))
    return tuple(middle_steps(scores, data["mask"]).astype(np.float64) for scores in both)


def share_gap(scores: np.ndarray, bounds: np.ndarray, shares: np.ndarray) -> float:
    """Largest distance of a share from floor(S q) / S; the last exit's from the rest."""
    count = len(scores)
    wanted = np.floor(count * shares)
    wanted[-1] = count - wanted[:-1].sum()
    found = np.bincount(leaves_at(scores, bounds), minlength=len(shares))
    return float(np.abs(found - wanted).max() / count)


def timed(source: Any, shares: np.ndarray) -> np.ndarray:
    """Steps [y] from which each deeper exit is taken, so that demonstrations have these shares."""
    first = np.r_[0, np.unique(source.ends)[:-1]]
    lengths = np.diff(np.r_[first, source.ends[-1]])
    steps = np.concatenate([np.arange(n) for n in lengths])
    fine = (steps[:, None] + (np.arange(64) + 0.5) / 64).reshape(
        -1
    )  # a step is spread over its length
    return np.quantile(fine, np.cumsum(shares)[:-1])


def refined(bench: Bench, start: np.ndarray, quick: bool) -> np.ndarray:
    """Thresholds after 20 calls of Bayesian optimisation on rollouts from other start states."""
    worlds = bench.player.run.task.worlds("validation", len(bench.worlds.done))
    key = fold(bench.seed, 0, "exits")

    def worth(bounds: np.ndarray) -> float:
        way = Way("action", bounds).arguments
        found = jax.device_get(bench.player.play(bench.params, way, worlds, key))
        blocks = np.asarray(bench.player.run.model.blocks)[found.told[found.alive]]
        return float(found.success.mean()) - max(0.0, float(blocks.mean()) - MEAN)

    spans = np.where(np.abs(start) < 1e6, 0.5 * np.abs(start), 0.0)
    calls = 3 if quick else 20
    return refine_thresholds(start, spans, worth, calls=calls, first=min(5, calls), seed=bench.seed)


def arms_of(bench: Bench, quick: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every way to choose exits on the sampled policy; and what the pictures show."""
    player, model = bench.player, bench.player.run.model
    blocks = np.asarray(model.blocks, np.float64)
    shares = geometric_shares(ratio_for_mean(blocks, MEAN), len(blocks))
    own, cosine = calibrated(player, bench.params, bench.seed)
    solve = functools.partial(solve_thresholds, costs=blocks, mean=MEAN, shape="official")
    bounds = solve(own)
    arms = {f"static_{k}": bench.figures(always(k - 2, len(blocks)), False)[0] for k in range(2, 7)}
    arms["action"], found = bench.figures(Way("action", bounds), True)
    taken = bench.shares(found)
    arms["action"]["share_gap"] = share_gap(own, bounds, shares)
    arms["action"]["drift"] = float(np.abs(taken - shares).sum() / 2)
    arms["cosine"] = bench.figures(Way("cosine", solve(cosine)), False)[0]
    arms["time"] = bench.figures(
        Way("time", timed(player.run.task.source("calibration"), shares)), False
    )[0]
    arms["random"] = bench.figures(Way("random", bounds, taken), False)[0]
    arms["peak_4"] = bench.figures(Way("action", solve(own, peak=PEAK)), True)[0]
    arms["online"] = bench.figures(Way("action", refined(bench, bounds, quick)), True)[0]
    return arms, load_module(PICTURES).chosen(found, blocks, player.run.task.env)


def bench_of(run: Run, seed: int, quick: bool) -> Bench:
    """A trained policy and what it is measured on."""
    player, params = Player(run), fit(run, seed, quick)["params"]
    test = episodes(run.task.source("test"), run.task.steps)
    worlds = run.task.worlds("test", 20 if quick else ROLLOUTS)
    return Bench(player, params, worlds, player.look(params, test["inputs"]), test, seed)


def run_seed(seed: int, quick: bool, workdir: Path) -> dict[str, dict[str, float]]:
    """All arms of one seed; decisions_SEED.npz in ``workdir`` is for the pictures."""
    runs = config.load("deer_vla").runs
    change: dict[str, Any] = {"seed": seed, "stages": runs["deer"].stages[:1]}
    if quick:
        small = {"episodes": 20, "held_out": 10}
        change["task"] = dataclasses.replace(runs["deer"].task, **small)
    bench = bench_of(runs["deer"].replace(**change), seed, quick)
    results, shown = arms_of(bench, quick)
    params = fit(runs["unsampled"].replace(**change), seed, quick)["params"]
    seen = bench.player.look(params, bench.test["inputs"])
    other = dataclasses.replace(bench, params=params, seen=seen)
    blocks = np.asarray(bench.player.run.model.blocks, np.float64)
    own, _ = calibrated(bench.player, params, seed)
    bounds = solve_thresholds(own, blocks, MEAN, shape="official")
    results["unsampled"] = other.figures(Way("action", bounds), True)[0]
    results["unsampled_6"] = other.figures(always(4, 5), False)[0]
    workdir.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(workdir / f"decisions_{seed}.npz", **shown)
    return results


def figures(results: dict[str, Any], outdir: Path) -> None:
    """Writes the pictures of the page."""
    load_module(PICTURES).draw(results, outdir)
