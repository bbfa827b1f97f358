"""One step against numpy: accumulation, clipping, averaging, freezing, turns, recompilation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import Net, Regression, make_run

from dyncomp.core.errors import DyncompError
from dyncomp.training import SGD, AdamW, Alternating, Stage
from dyncomp.training.engine import Engine
from dyncomp.training.evaluate import Evaluator, set_controls
from dyncomp.training.optimizers import freeze, schedule
from dyncomp.training.state import paths
from dyncomp.training.step import eval_step, train_step

PLAIN = SGD(learning_rate=0.1, schedule="constant", momentum=0.0)


def batch_of(size=8, mask=None):
    batch = Regression().source("train").batch(np.arange(size))
    return batch if mask is None else {**batch, "mask": np.asarray(mask, np.float32)}


def one_step(run, batch, seed=0, state=None):
    engine = Engine(run)
    state = engine.fresh() if state is None else state
    step = jax.jit(train_step(run, engine.stages[0], engine._tx(0)))
    return state, *step(state, batch, np.int32(seed))


def numpy_gradients(params, batch):
    """Gradients of the masked mean squared error in float64, by hand."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x, y, m = (np.asarray(batch[k], np.float64) for k in ("inputs", "targets", "mask"))
    h = np.tanh(x @ p["hidden"]["kernel"] + p["hidden"]["bias"])
    error = h @ p["out"]["kernel"][:, 0] + p["out"]["bias"][0] - y
    d_out = 2 * error * m / m.sum()
    d_h = d_out[:, None] * p["out"]["kernel"][:, 0] * (1 - h**2)
    return {
        "hidden": {"kernel": x.T @ d_h, "bias": d_h.sum(0)},
        "out": {"kernel": (h.T @ d_out)[:, None], "bias": d_out.sum(keepdims=True)},
    }


def close(a, b, **kw):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, **{"rtol": 1e-4, "atol": 1e-5, **kw}), a, b
    )


UNEVEN = [1, 1, 1, 1, 0, 1, 0, 0]


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_step_is_gradient_descent_on_the_whole_batch(parts):
    """Parts count different numbers of elements, so plain averaging of their gradients would be wrong."""
    batch = batch_of(mask=UNEVEN)
    old, new, out = one_step(make_run(optimizer=PLAIN, accumulate=parts), batch)
    gradients = numpy_gradients(old.params, batch)
    close(new.params, jax.tree.map(lambda p, g: p - 0.1 * g, old.params, gradients))
    norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(gradients)))
    np.testing.assert_allclose(out["grad_norm"], norm, rtol=1e-4)
    assert int(out["elements"]) == sum(UNEVEN) and int(new.step) == 1
    counted = int(np.sum(np.asarray(batch["inputs"])[:, 0] > 0))
    assert int(out["events"]["rows"].needed) == counted
    assert int(out["events"]["rows"].executed) == 8


def test_clipping_scales_to_the_norm():
    clipped = SGD(learning_rate=1.0, schedule="constant", momentum=0.0, clip_norm=0.5)
    old, new, out = one_step(make_run(optimizer=clipped), batch_of())
    assert float(out["grad_norm"]) > 0.5
    moved = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), old.params, new.params)
    norm = np.sqrt(sum(np.sum(m.astype(np.float64) ** 2) for m in jax.tree.leaves(moved)))
    np.testing.assert_allclose(norm, 0.5, rtol=1e-3)


def test_average_of_parameters():
    old, new, _ = one_step(make_run(optimizer=PLAIN, ema=0.75), batch_of())
    close(
        new.ema, jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, old.params, new.params), rtol=1e-6
    )
    close(new.variables["params"], new.ema, rtol=0, atol=0)


def test_decay_moves_matrices_only():
    tx = AdamW(learning_rate=0.1, schedule="constant", weight_decay=0.5, clip_norm=0.0).build(1)
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.05 * np.ones((2, 2)), rtol=1e-6)
    np.testing.assert_array_equal(updates["b"], np.zeros(2))


def test_schedules_at_their_ends():
    for kind, end in (("cosine", 0.1), ("linear", 0.1), ("constant", 1.0)):
        rate = schedule(kind, 1.0, 100, 10, 0.1)
        # From a tenth of the peak (one step of ten) in a straight line to the peak at step 10.
        found = [rate(t) for t in (0, 5, 10, 100)]
        np.testing.assert_allclose(found, [0.1, 0.55, 1.0, end], rtol=1e-5)


def test_frozen_groups_have_no_state_and_do_not_move():
    tx = AdamW(learning_rate=0.1)
    run = make_run(optimizer=tx, trainable="^out/")
    old, new, _ = one_step(run, batch_of())
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(old.params["hidden"][name], new.params["hidden"][name])
        assert np.any(old.params["out"][name] != new.params["out"][name])
    # Two moments of the 8 + 1 moving numbers, and counters.
    held = [leaf.size for leaf in jax.tree.leaves(old.opt_state) if leaf.ndim]
    assert sum(held) == 2 * 9
    with pytest.raises(DyncompError, match="no parameter path matches '\\^nothing/'"):
        freeze(PLAIN.build(1), "^nothing/").init(old.params)


def test_frozen_parts_are_not_differentiated():
    """Gradients of what is frozen are zero, so the norm that is logged is that of the moving part."""
    batch = batch_of()
    for trainable, moving in (("^out/", ["out"]), (".*", ["hidden", "out"])):
        old, _, out = one_step(make_run(optimizer=PLAIN, trainable=trainable), batch)
        wanted = numpy_gradients(old.params, batch)
        squares = [np.square(g).sum() for part in moving for g in wanted[part].values()]
        np.testing.assert_allclose(out["grad_norm"], np.sqrt(np.sum(squares)), rtol=1e-4)


def test_schedules_of_groups_are_as_long_as_their_turns():
    """Ten steps in cycles of five with turns of two: a a b b a | a a b b a, so six and four."""
    sgd = lambda rate: SGD(learning_rate=rate, schedule="linear", momentum=0.0)
    tx = Alternating(groups={"^hidden/": sgd(6.0), "^out/": sgd(4.0)}, period=2, cycle=5).build(10)
    params = {"hidden": jnp.zeros((1,)), "out": jnp.zeros((1,))}
    params = {name: {"w": leaf} for name, leaf in params.items()}
    opt, rates = tx.init(params), {"hidden": [], "out": []}
    for _ in range(10):
        updates, opt = tx.update(jax.tree.map(jnp.ones_like, params), opt, params)
        for name, seen in rates.items():
            if float(updates[name]["w"][0]):
                seen.append(-float(updates[name]["w"][0]))
    # Linear to zero in steps of one: the last step of each group would be 0 one step later.
    np.testing.assert_allclose(rates["hidden"], [6, 5, 4, 3, 2, 1], rtol=1e-6)
    np.testing.assert_allclose(rates["out"], [4, 3, 2, 1], rtol=1e-6)


def test_groups_take_turns_and_a_waiting_group_keeps_its_moments():
    adam = AdamW(learning_rate=0.1, schedule="constant", weight_decay=0.1)
    tx = Alternating(groups={"^hidden/": adam, "^out/": adam}, period=2).build(8)
    run = make_run()
    params = Engine(run).fresh().params
    opt, moved, held = tx.init(params), [], []
    for _ in range(6):
        gradients = jax.tree.map(jnp.ones_like, params)
        updates, opt = tx.update(gradients, opt, params)
        params = optax.apply_updates(params, updates)
        any_moved = lambda g: any(bool(jnp.any(u != 0)) for u in jax.tree.leaves(updates[g]))
        moved.append((any_moved("hidden"), any_moved("out")))
        held.append(
            {
                name: jax.device_get(opt.inner_states[name].inner_state.inner_state)
                for name in ("^hidden/", "^out/")
            }
        )
    turn_a, turn_b = (True, False), (False, True)
    assert moved == [turn_a, turn_a, turn_b, turn_b, turn_a, turn_a]
    for earlier, later, waiting in ((1, 3, "^hidden/"), (3, 5, "^out/")):
        jax.tree.map(np.testing.assert_array_equal, held[earlier][waiting], held[later][waiting])
    with pytest.raises(AssertionError):
        jax.tree.map(np.testing.assert_array_equal, held[1]["^out/"], held[3]["^out/"])


def test_seeds_and_thresholds_do_not_recompile(counting_jit):
    run = make_run()
    engine = Engine(run)
    step, traces = counting_jit(train_step(run, engine.stages[0], engine._tx(0)))
    state = engine.fresh()
    for seed, threshold in ((0, 0.0), (1, 0.0), (2, 0.7)):
        changed = set_controls({"controls": state.controls}, {"threshold": threshold})["controls"]
        step(state.replace(controls=changed), batch_of(), np.int32(seed))
    assert len(traces) == 1
    evaluator = Evaluator(make_run(sweep={"threshold": [0.0, 0.5, 1.0]}))
    evaluator.step, traces = counting_jit(eval_step(evaluator.run))
    rows = evaluator.pareto(state.variables)
    assert len(traces) == 1
    x = Regression().source("validation").batch(np.arange(64))["inputs"][:, 0]
    price = 2 * 8 * 5
    assert [r["flops_needed"] for r in rows[1:]] == [
        price * np.mean(x > t) for t in (0.0, 0.5, 1.0)
    ]
    with pytest.raises(DyncompError, match="no control named 'treshold'.*threshold"):
        set_controls(state.variables, {"treshold": 1.0})


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    a, b = Engine(make_run()).fresh(), Engine(make_run()).fresh()
    jax.tree.map(np.testing.assert_array_equal, a, b)
    other = Engine(make_run(seed=1)).fresh()
    assert np.any(a.params["hidden"]["kernel"] != other.params["hidden"]["kernel"])
    assert paths(a.params) == ["hidden/bias", "hidden/kernel", "out/bias", "out/kernel"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"steps": 0}, "Run.steps=0"),
        ({"accumulate": 3}, "multiple of accumulate=3"),
        ({"ema": 1.0}, "Run.ema=1.0"),
        ({"log_every": 0}, "Run.log_every=0"),
        ({"stages": (), "optimizer": None}, "either optimizer and steps, or stages"),
    ],
)
def test_bad_runs_are_refused_in_one_line(fields, said):
    with pytest.raises(DyncompError, match=said) as caught:
        make_run(**fields)
    assert "\n" not in str(caught.value)


def test_bad_stages_are_refused():
    with pytest.raises(DyncompError, match="use 1 or more"):
        Stage(steps=0, optimizer=PLAIN)
    with pytest.raises(DyncompError, match="trainable"):
        Stage(steps=1, optimizer=PLAIN, trainable="(")
    assert Net().hidden == 8
