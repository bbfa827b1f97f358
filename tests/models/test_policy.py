"""A policy with exits: memory moves once a step, exits follow the thresholds, gradients stop where they should."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dyncomp.attention import Attention, MediaAttention
from dyncomp.core.errors import DyncompError
from dyncomp.exits import ActionHead, ActionObjective, ConsistencyRule
from dyncomp.experts import MLP
from dyncomp.models import (
    Block,
    GatedCross,
    Group,
    ImageTokens,
    MultiExitPolicy,
    Resampler,
    SeeingBlock,
    apply,
    unstack,
)
from dyncomp.models.control import pooled
from dyncomp.runtime import HostExecutor, MaskedExecutor, from_model
from dyncomp.training import AdamW, Grouped, optimizers
from dyncomp.training.state import paths

D, X, B, T = 8, 3, 2, 4
TRAINED = "/look/|^see_|^act/|^auxiliary/"


def build(**changes):
    mlp = functools.partial(MLP, hidden=8)
    cross = functools.partial(MediaAttention, heads=2)
    look = functools.partial(GatedCross, cross=cross, ffn=mlp, gate=changes.pop("gate", 0.7))
    block = functools.partial(
        Block, mixer=functools.partial(Attention, heads=2), ffn=mlp, norm="layer"
    )
    seeing = functools.partial(SeeingBlock, block=block, look=look, media_width=D)
    head = functools.partial(ActionHead, pose=2, hidden=4, layers=1, widths=(4,), dropout=0.0)
    fields = dict(
        vocab=7, words=3, d_model=D, groups=[Group([seeing], 4)], cameras=((8, 8), (4, 4)), exits=(1, 2, 3),
        eyes=functools.partial(ImageTokens, patch=4, d_model=D), head=head, rule=ConsistencyRule(first=2),
    )  # fmt: skip
    return MultiExitPolicy(**{**fields, **changes})


def observations(n, seed=0):
    rng = np.random.default_rng(seed)
    words = np.stack(
        [rng.integers(7, size=n), rng.integers(7, size=n), rng.integers(-1, 1, size=n)], 1
    )
    return np.concatenate([rng.uniform(size=(n, 240)), words], axis=1).astype(np.float32)


ROWS = observations(B * T)
INPUTS = ROWS.reshape(B, T, -1)
MODEL = build()


def drawn(model, inputs=INPUTS):
    """Variables from numpy: compiling an initialisation takes longer than all that is tested with it."""
    like = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), inputs))
    rng = np.random.default_rng(5)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if name == "scale" or name.endswith("gate"):
            return jnp.full(leaf.shape, 1.0 if name == "scale" else 0.7, jnp.float32)
        width = 1 if name == "table" or leaf.ndim < 2 else leaf.shape[-2]
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(width), jnp.float32)

    params = jax.tree_util.tree_map_with_path(draw, like["params"])
    return {"params": params, "controls": {"thresholds": jnp.zeros((X - 1,), jnp.float32)}}


@pytest.fixture(scope="module")
def variables():
    return drawn(MODEL)


@pytest.fixture(scope="module")
def look():
    return jax.jit(lambda v, rows: MODEL.apply(v, rows, method="features"))


@pytest.fixture(scope="module")
def seen(variables, look):
    return look(variables, ROWS).reshape(X + 1, B, T, D)


@pytest.fixture(scope="module")
def walk(variables):
    run = lambda seen, bounds: MODEL.apply(variables, seen, bounds, method="walk")
    return jax.jit(run)


@pytest.fixture(scope="module")
def window(variables):
    """The shared head on whole windows [b t d]."""
    head = MODEL.head(parent=None)
    zeros = jnp.zeros((B, MODEL.state_size))
    return jax.jit(lambda x: head.apply({"params": variables["params"]["act"]}, x, zeros)[0])


def test_bounds_without_exceptions_are_static_models(seen, walk, window):
    nobody, everyone = jnp.full((X - 1,), jnp.inf), jnp.full((X - 1,), -jnp.inf)
    deepest, plan = walk(seen, nobody)
    assert (plan.exit == X - 1).all()
    np.testing.assert_allclose(deepest, window(seen[-1]), atol=1e-6)
    first, plan = walk(seen, everyone)
    assert (plan.exit == 0).all()
    np.testing.assert_allclose(first, window(seen[1]), atol=1e-6)


def test_acting_step_by_step_equals_the_window_of_the_chosen_features(seen, walk, window):
    """So the memory moves once a step, by the chosen exit, whatever the probes were."""
    scores = walk(seen, jnp.full((X - 1,), jnp.inf))[1].scores
    bounds = jnp.asarray(np.median(np.asarray(scores)[..., : X - 1], axis=(0, 1)))
    said, plan = walk(seen, bounds)
    left = np.asarray(plan.exit)
    assert left.shape == (B, T)
    assert len(set(left.ravel().tolist())) > 1
    chosen = np.take_along_axis(np.asarray(seen), left[None, ..., None] + 1, axis=0)[0]
    np.testing.assert_allclose(said, window(jnp.asarray(chosen)), atol=1e-6)
    # The first step's distances by hand: every probe starts from the same, empty memory.
    alone = [np.asarray(window(row))[:, 0, :2] for row in seen]
    gaps = [np.sqrt(((a - b) ** 2).mean(-1)) for a, b in zip(alone[:-2], alone[1:-1], strict=True)]
    np.testing.assert_allclose(-plan.scores[:, 0, :-1], np.stack(gaps, 1), atol=1e-5)


def test_options_of_acting(seen, variables):
    bounds = jnp.full((X - 1,), -jnp.inf)
    state = MODEL.start(B)
    call = lambda model, state, t, bounds: model.apply(
        variables, seen[:, :, t], state, bounds, method="decided"
    )
    plain, after, _ = call(MODEL, state, 0, bounds)
    mean, same, _ = call(build(average=True), state, 0, bounds)
    said, _ = MODEL.apply(variables, seen[:, :, 0], state.head, method="asked")
    np.testing.assert_allclose(mean[:, :2], (said[0] + said[1])[:, :2] / 2, atol=1e-6)
    np.testing.assert_array_equal(mean[:, 2], plain[:, 2])
    np.testing.assert_array_equal(same.head, after.head)
    slow = build(reuse=2)
    _, state, first = call(slow, state, 0, bounds)
    _, state, kept = call(slow, state, 1, -bounds)  # would run everything, but the decision stands
    _, _, third = call(slow, state, 2, -bounds)
    assert [p.exit.tolist() for p in (first, kept, third)] == [[0, 0], [0, 0], [2, 2]]


def test_segments_decide_as_the_masked_model_and_the_host_executor_agrees(variables):
    model, n = build(layers="unroll"), 11
    head = np.random.default_rng(1).normal(size=(n, MODEL.state_size)).astype(np.float32) / 2
    rows = observations(n, seed=2)
    state = MODEL.start(n).replace(head=jnp.asarray(head))
    control = jax.jit(lambda bounds: MODEL.apply(variables, rows, state, bounds, method="control"))
    scores = np.asarray(control(jnp.full((X - 1,), jnp.inf))[2].scores)[:, : X - 1]
    bounds = np.sort(scores, axis=0)[[6, 5], [0, 1]] - 1e-6
    action, after, plan = control(jnp.asarray(bounds))
    net = from_model(model, variables, rows.shape)
    net.thresholds[:] = bounds
    packed = np.concatenate([rows, head], axis=1)
    masked, host = (
        MaskedExecutor(net)(packed),
        HostExecutor(net, packed, capacity=n, buckets=(n,))(packed),
    )
    assert set(np.asarray(plan.exit).tolist()) == {0, 1, 2}
    np.testing.assert_array_equal(masked.exits, plan.exit)
    np.testing.assert_array_equal(host.exits, plan.exit)
    np.testing.assert_allclose(host.outputs, masked.outputs, rtol=1e-5, atol=1e-5)
    wanted = np.concatenate([action, after.head], axis=1)
    np.testing.assert_allclose(masked.outputs, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(host.needed, masked.needed)


def test_the_first_comparison_may_be_the_language_models_input(variables, seen):
    model = build(compare="input", exits=(0, 2, 3))
    found = jax.jit(lambda: model.apply(variables, ROWS, method="features"))()
    table = np.asarray(variables["params"]["word_tokens"]["table"])
    words = ROWS[:, -3:].astype(int)
    by_hand = np.stack([table[row[row >= 0]].max(0) for row in words])
    np.testing.assert_allclose(found[0], by_hand, rtol=1e-6)
    np.testing.assert_allclose(found[1], seen[0].reshape(-1, D), rtol=1e-5, atol=1e-6)  # block 0


def test_padding_and_closed_gates(variables, look):
    x = jnp.float32([[[1.0, -5.0], [9.0, -6.0]], [[-1.0, -2.0], [-3.0, 4.0]]])
    real = jnp.asarray([[True, False], [True, True]])
    assert pooled(x, real).tolist() == [[1.0, -5.0], [-1.0, 4.0]]
    # Gates at 0: the language blocks alone, whatever the pictures show.
    close = lambda path, leaf: 0 * leaf if "gate" in str(path[-1]) else leaf
    dark = {**variables, "params": jax.tree_util.tree_map_with_path(close, variables["params"])}
    other = ROWS.copy()
    other[:, :240] = 0
    np.testing.assert_array_equal(look(dark, ROWS), look(dark, other))
    assert not np.allclose(look(variables, ROWS), look(variables, other))


@pytest.fixture(scope="module")
def loss_of(variables):
    """The gradient of one term of the loss: an auxiliary head's exit (0..2), or the drawn sequences (3)."""
    batch = {"targets": np.full((B, T, 3), 0.5, np.float32), "mask": np.ones((B, T), np.float32)}

    def loss(params, weights):
        output, _ = MODEL.apply({**variables, "params": params}, INPUTS, train=True,
                                rngs={"router": jax.random.key(0)}, mutable=["controls"])[0]  # fmt: skip
        rows = output["auxiliary"]
        each = [
            ActionObjective()({"auxiliary": rows[:0], "drawn": rows[i : i + 1]}, None, batch, 0)[0]
            for i in range(X)
        ]
        return jnp.stack(each) @ weights

    return jax.jit(jax.grad(loss))


@pytest.mark.parametrize("exit", range(X))
def test_gradients_reach_the_blocks_below_an_exit_only(variables, loss_of, exit):
    grads = loss_of(variables["params"], jnp.eye(X)[exit])
    gate = np.abs(grads["group_0"]["layers"]["block_0"]["look"]["cross_gate"])[:, 0]
    assert (gate[: exit + 2] > 0).all() and (gate[exit + 2 :] == 0).all()
    heads = np.abs(grads["auxiliary"]["pose_0_kernel"]).sum((1, 2))
    assert (np.flatnonzero(heads) == [exit]).all()
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(grads["act"]))


def test_heads_and_draws_of_training(variables):
    def shapes(**changes):
        model = build(**changes)
        run = lambda: apply(
            model, variables, INPUTS, train=True, rngs={"router": jax.random.key(0)}
        )
        output = jax.eval_shape(run)[0]
        return len(output["auxiliary"]), len(output["drawn"])

    assert shapes() == (3, 2)
    assert (
        shapes(drawing="every_step")
        == shapes(drawing="two_runs")
        == shapes(drawing="last")
        == (3, 1)
    )
    bare = build(auxiliary_heads=False)
    tree = jax.eval_shape(bare.init, jax.random.key(0), INPUTS)["params"]
    assert "auxiliary" not in tree


def test_frozen_parameters_do_not_move(variables, loss_of):
    adam = functools.partial(AdamW, clip_norm=0.0, learning_rate=0.1)
    groups = {"^act/|^auxiliary/": adam(weight_decay=0.0), ".*": adam(weight_decay=0.5)}
    tx = optimizers.freeze(Grouped(groups=groups).build(4), TRAINED)
    params = variables["params"]
    grads = loss_of(params, jnp.eye(X)[X - 1])
    moved = jax.jit(lambda p, g: tx.update(g, tx.init(p), p)[0])(params, grads)
    size = lambda tree: [float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree)]
    found = dict(zip(paths(params), zip(size(grads), size(moved), strict=True), strict=True))
    frozen = {name for name in found if "/block/" in name or name.startswith("word_tokens")}
    assert len(frozen) > 10
    # They have gradients, and are left alone: no step, no decay.
    assert all(found[name][0] > 0 and found[name][1] == 0 for name in frozen)
    assert all(found[name][1] > 0 for name in found if "/look/" in name or name.startswith("see"))
    # No gradient reaches the shared head here, and the heads' group has no decay.
    assert all(found[name][1] == 0 for name in found if name.startswith("act/"))


def test_prices_by_hand():
    prices = [price.flops for price in MODEL.cost(()).values()]
    words, media = 3, 4 + 1
    cross = words * 4 * D * D + media * 4 * D * D + words * media * 4 * D
    mlp = words * 4 * D * 8
    attention = words * 2 * D * 4 * D + 6 * 4 * D  # six pairs of a causal triangle of three
    block = cross + mlp + attention + mlp
    head = MODEL.head(parent=None).cost(D).flops
    eyes = 2 * 48 * D * (4 + 1)
    assert prices == [eyes + 2 * block + 2 * head, block + head, block + head]
    assert MODEL.blocks == [2, 3, 4]


def test_a_resampler_reads_any_number_of_tokens():
    make = Resampler(
        latents=2,
        depth=1,
        cross=functools.partial(MediaAttention, heads=2),
        ffn=functools.partial(MLP, hidden=8),
    )
    tokens = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, D)), jnp.float32)
    own = {"params": drawn(make, tokens)["params"]}
    call = jax.jit(lambda tokens: make.apply(own, tokens))
    y = call(tokens)
    assert y.shape == (1, 2, D)
    # A set: the order of the tokens does not matter.
    np.testing.assert_allclose(call(tokens[:, ::-1]), y, atol=1e-5)
    model = build(resampler=lambda **more: make.copy(**more))
    assert jax.eval_shape(lambda: model.init(jax.random.key(0), INPUTS))["params"]["resample"]


def test_what_does_not_fit_is_refused(variables, unchecked):
    for changes, said in (
        ({"exits": (0, 3)}, "from 1 on"),
        ({"exits": (1, 2)}, "the last is 3"),
        ({"drawing": "some"}, "drawing='some'"),
        ({"compare": "output"}, "compare='output'"),
        ({"reuse": 0}, "reuse=0"),
    ):
        with pytest.raises(DyncompError, match=said):
            build(**changes)
    with pytest.raises(DyncompError, match="make 243"):
        MODEL.apply(variables, ROWS[:, 1:], method="features")
    assert set(MODEL.weights_of(unstack(variables["params"]), 1)) == {"act", "group_0"}
