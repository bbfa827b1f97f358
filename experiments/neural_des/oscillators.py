"""Van der Pol oscillators against a solution at tolerance 1e-12, and networks of them in one batch."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import spearmanr

from dyncomp import runtime
from dyncomp.recurrent import RK4, ODESolver, equal_steps

MUS, VDP = (1, 5, 10, 20), ("1e-3", "1e-5", "1e-7", "1e-9")
END, STATES = 20.0, 16


def oscillator(_: Any, mu: Any, t: Any, state: Any) -> Any:
    """Van der Pol: x'' = mu (1 - x^2) x' - x; mu [b], state [b 2]."""
    x, y = state[0][:, 0], state[0][:, 1]
    return jnp.stack([y, mu * (1 - x * x) * y - x], axis=1), {}


@functools.partial(jax.jit, static_argnames="max_steps")
def solved(mu: Any, start: Any, tolerance: Any, max_steps: int = 2**17) -> Any:
    """(state at END, stats) of every oscillator, each with steps and a tolerance of its own."""
    solver = ODESolver(max_steps=max_steps)
    (z, _), stats = solver(oscillator, {}, mu, (start, {}), tolerance, 0.0, END)
    return z, stats


def oscillators(seed: int, quick: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Adaptive Tsit5 against as many evaluations of RK4, and who needs how many."""
    mus, tols, states = (MUS, VDP, STATES) if not quick else (MUS, VDP, 2)
    rng = np.random.default_rng([seed, 1])
    with jax.enable_x64(True):
        start = np.array([2.0, 0.0]) + rng.normal(0, 0.2, (states, 2))
        exact = {
            mu: solved(np.full(states, float(mu)), start, np.full(states, 1e-12))[0] for mu in mus
        }
        grid = [(mu, tol) for mu in mus for tol in tols]
        mu = np.repeat([float(m) for m, _ in grid], states)
        begun = np.tile(start, (len(grid), 1))
        ended, stats = solved(mu, begun, np.repeat([float(t) for _, t in grid], states))
        needed = np.asarray(stats.needed)
        field = lambda mu: lambda t, z: oscillator({}, mu, t, (z, {}))[0]
        fixed = jax.jit(lambda mu, z, steps: equal_steps(field(mu), z, END, steps, RK4))
        other = fixed(mu, begun, -(-needed // 4))
        found = {}
        for n, (m, tol) in enumerate(grid):
            rows = slice(n * states, (n + 1) * states)
            nfe = float(needed[rows].mean())
            for who, value in (("tsit5", ended), ("rk4", other)):
                error = np.linalg.norm(np.asarray(value)[rows] - np.asarray(exact[m]), axis=1)
                error = np.where(np.isfinite(error), np.minimum(error, 1e6), 1e6)
                log = float(np.log10(np.maximum(error, 1e-16)).mean())
                found[f"{who}_mu{m}_{tol}"] = {"log_error": log, "nfe": nfe}
        # log10 NFE over log10 tolerance, between 1e-5 and 1e-9
        nfe = [np.log10(found[f"tsit5_mu1_{tol}"]["nfe"]) for tol in ("1e-5", "1e-9")]
        found["tsit5_mu1_1e-7"]["exponent"] = float((nfe[1] - nfe[0]) / 4)
        mixed, shown = spread(rng, start)
    return {**found, "mixed": mixed}, shown


def spread(rng: np.random.Generator, start: Any) -> tuple[dict[str, float], dict[str, Any]]:
    """64 oscillators with mu in [0.5, 10] at tolerance 1e-5."""
    mu = np.exp(rng.uniform(np.log(0.5), np.log(10.0), 64))
    mu[:2] = 0.5, 10.0
    _, stats = solved(mu, np.tile(start, (64 // len(start), 1)), np.full(64, 1e-5))
    needed = np.asarray(stats.needed)
    figures = {
        "ratio": float(needed.max() / needed.min()),
        "rank": float(spearmanr(mu, needed)[0]),
        "nfe": float(needed.mean()),
    }
    return figures, {"mu": mu, "mu_nfe": needed}


# ---- networks of oscillators in one batch


def network(weights: Any, t: Any, z: Any) -> Any:
    """n coupled oscillators: z holds x [n], x' [n] and their mu, whose slope is zero."""
    n = weights.shape[0]
    x, y, mu = z[:, :n], z[:, n:-1], z[:, -1:]
    force = mu * (1 - x * x) * y - x + 0.1 * (x @ weights)
    return jnp.concatenate([y, force, jnp.zeros_like(mu)], axis=1)


def batches(seed: int, quick: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """One batch of mixed stiffness: under vmap, with one step size, our steps on all rows, and on those still there."""
    n, b, end, tolerance = (8, 8, 2.0, 1e-3) if quick else (128, 256, 10.0, 1e-4)
    rng = np.random.default_rng([seed, 2])
    weights = jnp.float32(np.linalg.qr(rng.normal(size=(n, n)))[0])
    mu = np.exp(rng.uniform(np.log(0.5), np.log(20.0), (b, 1)))
    start = np.concatenate([2 + 0.2 * rng.normal(size=(b, n)), np.zeros((b, n)), mu], axis=1)
    start, nothing = np.float32(start), np.zeros((b, 0), np.float32)
    field = lambda weights, _, t, state: (network(weights, t, state[0]), {})
    runs: dict[str, Callable[[], Any]] = {}
    stats = {}
    for name, shared in (("vmapped", False), ("shared", True)):
        how = ODESolver(max_steps=4096, shared=shared)
        run = jax.jit(lambda w, z, how=how: how(field, w, nothing, (z, {}), tolerance, 0.0, end))
        runs[name] = functools.partial(run, weights, start)
        stats[name] = jax.device_get(runs[name]()[1])
    parts = runtime.ode_segments(
        network, weights, (2 * n + 1,), tolerance=tolerance, t1=end, max_steps=4096, attempts=2
    )
    buckets = (b,) if quick else (16, 32, 64, 128, b)
    host = runtime.HostExecutor(parts.net, start, capacity=b, buckets=buckets).warm_up()
    lax = runtime.LaxExecutor(parts.net)
    runs["own_steps"], runs["compacted"] = lambda: lax(start), lambda: host(start)
    answer, whole = parts.read(host(start)), parts.read(lax(start))
    seconds = timed(runs, 1 if quick else 3)
    executed = {name: int(one.executed.sum()) for name, one in stats.items()}
    executed |= {"own_steps": whole.executed, "compacted": answer.executed}
    needed = {name: float(one.needed.mean()) for name, one in stats.items()}
    needed |= dict.fromkeys(("own_steps", "compacted"), float(answer.needed.mean()))
    assert answer.finished.all() and all(one.finished.all() for one in stats.values())
    found = {
        name: {
            "executed": executed[name] / executed["vmapped"],
            "time": seconds[name] / seconds["vmapped"],
            "nfe": needed[name],
        }
        for name in runs
    }
    return found, {"batch_mu": mu[:, 0], "batch_nfe": answer.needed}


def timed(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            begun = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - begun)
    return {name: float(np.median(values)) for name, values in times.items()}
