"""Fashion-MNIST through an ODE block and an equilibrium block: one training, many tolerances."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from dyncomp.core.rng import fold
from dyncomp.models import ContinuousClassifier, DenseStem
from dyncomp.recurrent import (
    EULER,
    RK4,
    EquilibriumBlock,
    FixedPoint,
    MLPField,
    ODEBlock,
    ODESolver,
    StepControl,
    TanhCell,
    equal_steps,
    tolerance_for,
)

TOLERANCES = ("1e-1", "1e-2", "1e-3", "1e-4", "1e-5", "1e-6")
PENALTIES = {
    "plain": {},
    "kinetic": {"kinetic": 0.1},
    "jacobian": {"jacobian": 0.1},
    "both": {"kinetic": 0.1, "jacobian": 0.1},
}
WIDTH, HIDDEN, END, POINT = 16, 64, 4.0, 64
STEPS, BATCH, TEST = {"ode": 300, "deq": 800}, 128, 2000
RATES = {"ode": 1e-2, "deq": 2e-3}


def ode_model(penalties: Any) -> ContinuousClassifier:
    """A linear stem, an ODE block of width 16 to time 4, a linear head."""
    solver = ODESolver(max_steps=1024, control=StepControl(first_step=0.0))
    core = functools.partial(
        ODEBlock, functools.partial(MLPField, HIDDEN, gain=1.0), solver, end=END,
        penalties=tuple(penalties),
    )  # fmt: skip
    return ContinuousClassifier(10, core, functools.partial(DenseStem, WIDTH))


def deq_model(how: FixedPoint) -> ContinuousClassifier:
    """A linear stem, an equilibrium block of width 64 with |W| <= 0.9, a linear head."""
    core = functools.partial(EquilibriumBlock, functools.partial(TanhCell, POINT), how)
    return ContinuousClassifier(10, core, functools.partial(DenseStem, POINT))


def train(
    model: Any, weights: dict[str, float], seed: int, data: Any, steps: int, rate: float
) -> tuple[Any, Any]:
    """Variables after so many steps, and after one more."""
    images, labels = data
    variables = nn.meta.unbox(model.init(fold(seed, 0, "params"), images[:2]))
    adam = optax.adam(optax.cosine_decay_schedule(rate, steps, 0.05))

    def loss_of(params: Any, x: Any, y: Any, key: Any) -> Any:
        rest = {"controls": variables["controls"], "params": params}
        logits, aux = model.apply(rest, x, train=True, rngs={"dropout": key})
        penalty = sum(weight * aux.losses["core"][name] for name, weight in weights.items())
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean() + penalty

    @jax.jit
    def step(params: Any, state: Any, x: Any, y: Any, n: Any) -> Any:
        grads = jax.grad(loss_of)(params, x, y, fold(seed, n, "noise"))
        update, state = adam.update(grads, state)
        return optax.apply_updates(params, update), state

    rng, params = np.random.default_rng([seed, 3]), variables["params"]
    state = adam.init(params)
    for n in range(steps + 1):
        rows = rng.integers(0, len(images), BATCH)
        before = params
        params, state = step(params, state, images[rows], labels[rows], n)
    return {**variables, "params": before}, {**variables, "params": params}


def evaluate(model: Any, variables: Any, data: Any) -> Callable[..., dict[str, Any]]:
    """A function of a tolerance: logits and stats of the test images, in batches of 500."""
    run = jax.jit(lambda v, x, **k: model.apply(v, x, capture=("plan",), **k))

    def at(
        tolerance: float, variables: Any = variables, starts: Any = None, images: Any = data[0]
    ) -> Any:
        controls = {"core": {**variables["controls"]["core"], "tolerance": jnp.float32(tolerance)}}
        variables, parts = {**variables, "controls": controls}, []
        for i in range(0, len(images), 500):
            more = {} if starts is None else {"start": starts[i : i + 500]}
            logits, aux = run(variables, images[i : i + 500], **more)
            parts.append((logits, aux.plans["core"]["solve"]))
        return jax.device_get(jax.tree.map(lambda *x: jnp.concatenate(x), *parts))

    return at


def score(logits: Any, labels: Any, needed: Any) -> dict[str, float]:
    """Accuracy and evaluations."""
    right = np.asarray(logits).argmax(-1) == labels
    return {"accuracy": 100.0 * float(right.mean()), "nfe": float(np.mean(needed))}


def distance(logits: Any, exact: Any) -> float:
    """log10 of the mean distance of logits."""
    return float(np.log10(np.linalg.norm(np.asarray(logits) - exact, axis=1).mean() + 1e-12))


def flows(seed: int, arrays: Any, quick: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """All arms of the ODE block."""
    steps, test = (4 if quick else STEPS["ode"]), arrays["test"]
    found: dict[str, Any] = {}
    kept = {}
    for name, weights in PENALTIES.items():
        model = ode_model(weights)
        variables, _ = train(model, weights, seed, arrays["train"], steps, RATES["ode"])
        at = evaluate(model, variables, test)
        logits, stats = at(1e-3)
        found[name] = score(logits, test[1], stats.needed)
        found[name]["of_plain"] = found[name]["nfe"] / found["plain"]["nfe"]
        kept[name] = model, variables, at
    model, variables, at = kept["plain"]
    sweep = {tol: at(float(tol)) for tol in TOLERANCES}
    exact = sweep["1e-6"][0]
    last = float(np.mean(sweep["1e-6"][1].needed))
    fixed = equal(model, variables, test[0])
    for tol, (logits, stats) in sweep.items():
        mine = score(logits, test[1], stats.needed)
        found[f"ode_{tol}"] = {
            **mine,
            "log_error": distance(logits, exact),
            "share": mine["nfe"] / last,
        }
        for who, price in (("rk4", 4), ("euler", 1)):
            runs = -(-int(np.ceil(mine["nfe"])) // price)
            other = fixed(runs, who)
            found[f"{who}_{tol}"] = {
                **score(other, test[1], price * runs), "log_error": distance(other, exact)
            }  # fmt: skip
    found["random_1e-2"] = at_random(seed, model, variables, test, found["ode_1e-2"]["nfe"], exact)
    found["seminorm"] = backwards(model, variables, test[0][:64])
    needed = sweep["1e-3"][1].needed
    order = np.argsort(needed, kind="stable")
    rows = np.concatenate([order[:12], order[-12:]])
    return found, {
        "images": test[0][rows],
        "image_nfe": needed[rows],
        "label": test[1][rows],
        "all_nfe": needed,
    }


def equal(model: Any, variables: Any, images: Any) -> Callable[[int, str], Any]:
    """Logits of the same network with equal steps, how many is a run-time argument."""
    field, core = field_of(model, variables)
    tables = {"rk4": RK4, "euler": EULER}
    stem = model.stem(parent=None)

    @functools.partial(jax.jit, static_argnames="who")
    def run(params: Any, x: Any, steps: Any, who: str) -> Any:
        z = core.widen(stem.apply({"params": params["stem"]}, x))
        z = equal_steps(
            lambda t, z: field(params["core"]["field"], t, z), z, END, steps, tables[who]
        )
        return model.apply({"params": params}, z, method="classify")

    return lambda steps, who: np.asarray(run(variables["params"], images, steps, who))


def field_of(model: Any, variables: Any) -> tuple[Callable, Any]:
    """(f(weights, t, z), the block) of a model."""
    core = model.core(parent=None)
    net = core.field(parent=None)
    return lambda weights, t, z: net.apply({"params": weights}, t, z), core


def at_random(
    seed: int, model: Any, variables: Any, test: Any, wanted: float, exact: Any
) -> dict[str, float]:
    """Tolerances at random over four decades, shifted until the mean NFE is the wanted one."""
    field, core = field_of(model, variables)
    draw = np.float32(10.0 ** np.random.default_rng([seed, 4]).uniform(-2, 2, len(test[0])))

    @jax.jit
    def run(params: Any, x: Any, tolerance: Any) -> Any:
        z = core.widen(model.stem(parent=None).apply({"params": params["stem"]}, x))
        f = lambda weights, _, t, state: (field(weights, t, state[0]), {})
        nothing = jnp.zeros((x.shape[0], 0))
        (z, _), stats = core.solver(
            f, params["core"]["field"], nothing, (z, {}), tolerance, 0.0, END
        )
        return model.apply({"params": params}, z, method="classify"), stats.needed

    at = lambda scale: run(variables["params"], test[0], draw * np.float32(scale))
    scale = tolerance_for(lambda scale: float(at(scale)[1].mean()), wanted, low=1e-5, high=10.0)
    logits, needed = at(scale)
    return {**score(logits, test[1], needed), "log_error": distance(logits, exact)}


def backwards(model: Any, variables: Any, images: Any) -> dict[str, float]:
    """Evaluations of the adjoint equation with the seminorm, relative to the full norm, at tolerance 1e-5.

    The adjoint equation is solved as any other: what lies in the first part of its state is in the error norm.
    """
    field, core = field_of(model, variables)
    weights = variables["params"]["core"]["field"]
    z = core.widen(model.stem(parent=None).apply({"params": variables["params"]["stem"]}, images))
    nothing, b = jnp.zeros((len(images), 0)), len(images)
    forward = lambda w, _, t, state: (field(w, t, state[0]), {})
    solver = core.solver
    (end, _), _ = jax.jit(lambda w, z: solver(forward, w, nothing, (z, {}), 1e-5, 0.0, END))(
        weights, z
    )
    classify = lambda z: model.apply(variables, z, method="classify").max(axis=-1).sum()
    a, n = jax.grad(classify)(end), end.shape[1]
    flat = sum(leaf.size for leaf in jax.tree.leaves(weights))

    def adjoint(w: Any, _: Any, t: Any, state: Any) -> Any:
        def one(t: Any, z: Any, a: Any) -> Any:
            slope, pull = jax.vjp(lambda w, z: field(w, t[None], z[None])[0], w, z)
            g, back = pull(a)
            own = jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(g)])
            return jnp.concatenate([-slope, back]), own

        moved, g = jax.vmap(one)(END - t, state[0][:, :n], state[0][:, n : 2 * n])
        whole = state[0].shape[1] > 2 * n  # the gradient counts in the norm
        return (jnp.concatenate([moved, g], axis=1), {}) if whole else (moved, {"g": g})

    zeros, start = jnp.zeros((b, flat)), jnp.concatenate([end, a], axis=1)
    run = jax.jit(lambda w, state: solver(adjoint, w, nothing, state, 1e-5, 0.0, END)[1].needed)
    norm = run(weights, (jnp.concatenate([start, zeros], axis=1), {}))
    semi = run(weights, (start, {"g": zeros}))
    return {"backward": float(semi.mean() / norm.mean()), "nfe": float(semi.mean())}


def equilibria(seed: int, arrays: Any, quick: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """All arms of the equilibrium block."""
    steps, test = (4 if quick else STEPS["deq"]), arrays["test"]
    model = deq_model(FixedPoint(max_steps=300))
    variables, after = train(model, {}, seed, arrays["train"], steps, RATES["deq"])
    at = evaluate(model, variables, test)
    found: dict[str, Any] = {}
    sweep = {tol: at(float(tol)) for tol in TOLERANCES}
    exact, last = sweep["1e-6"][0], float(np.mean(sweep["1e-6"][1].needed))
    for tol, (logits, stats) in sweep.items():
        mine = score(logits, test[1], stats.needed)
        found[f"deq_{tol}"] = {
            **mine,
            "log_error": distance(logits, exact),
            "share": mine["nfe"] / last,
        }
    k = int(np.ceil(found["deq_1e-3"]["nfe"]))
    unrolled = deq_model(FixedPoint(gradient="unroll", max_steps=k))
    own, _ = train(unrolled, {}, seed, arrays["train"], steps, RATES["deq"])
    logits, stats = evaluate(unrolled, own, test)(1e-3)
    found["unroll"] = score(logits, test[1], stats.needed)
    found |= warm(seed, model, variables, after, test[0], at)
    params = variables["params"]
    read = model.stem(parent=None).apply({"params": params["stem"]}, test[0][:32])
    return found, {"cell": params["core"]["cell"], "read": read}


def warm(seed: int, model: Any, before: Any, after: Any, images: Any, at: Any) -> dict[str, Any]:
    """Iterations to a residual of 1e-4 from zero, and from the point before an update or a move."""
    points = np.asarray(states(model, before, images))
    moved = images + np.float32(0.02) * np.float32(
        np.random.default_rng([seed, 5]).normal(size=images.shape)
    )
    runs = {
        "cold_update": at(1e-4, after),
        "warm_update": at(1e-4, after, points),
        "cold_move": at(1e-4, before, None, moved),
        "warm_move": at(1e-4, before, points, moved),
    }
    taken = {name: float(np.mean(stats.needed)) for name, (_, stats) in runs.items()}
    return {name: {"iterations": value, "nfe": value} for name, value in taken.items()}


def states(model: Any, variables: Any, images: Any) -> Any:
    """z* of images, to 1e-6."""
    core, stem = model.core(parent=None), model.stem(parent=None)
    params = variables["params"]
    given = {"params": params["core"], "controls": {"tolerance": jnp.float32(1e-6)}}
    return core.apply(given, stem.apply({"params": params["stem"]}, images))[0]
