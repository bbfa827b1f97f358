"""Bi-level routing against loops over tokens in float64, and the properties of its choice."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dyncomp.attention import BiLevelRouting
from dyncomp.attention.bilevel import OPTIONS
from dyncomp.attention.depthwise import DepthwiseConv, _convolved, depthwise
from dyncomp.attention.regions import Regions, region_scores
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Ledger

D, H = 8, 2
make = functools.partial(BiLevelRouting, heads=H, regions=3, top=2)


def drawn(model, x, seed=0):
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), x))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(0.4 * rng.normal(size=s.shape), s.dtype), shapes)


def images(batch=2, rows=6, columns=6, seed=1):
    return jax.random.normal(jax.random.key(seed), (batch, rows * columns, D))


def regions_of(rows, columns, side):
    """Token numbers of every region."""
    height, width = -(-rows // side), -(-columns // side)
    cut = lambda i, size, end: range(i * size, min((i + 1) * size, end))
    return [
        [r * columns + c for r in cut(i, height, rows) for c in cut(j, width, columns)]
        for i, j in itertools.product(range(side), repeat=2)
    ]


def by_loops(params, x, rows, columns, side, top, size=5, real=None, scale=D, index=None):
    """Output and choice of one image, token by token, float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = np.asarray(x, np.float64)
    real = np.ones(len(x), bool) if real is None else real
    q, k, v = (np.einsum("td,dhp->thp", x, p[n]) + p[f"{n}_bias"] for n in "qkv")
    blocks = [[t for t in block if real[t]] for block in regions_of(rows, columns, side)]
    mean = lambda a: np.stack([a[block].reshape(len(block), -1).mean(0) for block in blocks])
    scores = mean(q) @ mean(k).T
    index = np.argsort(-scores, axis=1, kind="stable")[:, :top] if index is None else index
    mixed = np.zeros_like(q)
    for block, chosen in zip(blocks, index, strict=True):
        keys = [t for region in chosen for t in blocks[region]]
        for token, head in itertools.product(block, range(H)):
            weight = np.exp(k[keys, head] @ q[token, head] / np.sqrt(scale))
            mixed[token, head] = weight @ v[keys, head] / weight.sum()
    mixed, grid = mixed.reshape(len(x), D), v.reshape(rows, columns, D)
    for (r, c), (i, j) in itertools.product(
        np.ndindex(rows, columns), np.ndindex(size, size) if size else []
    ):
        y, z = r + i - size // 2, c + j - size // 2
        if 0 <= y < rows and 0 <= z < columns and real[y * columns + z]:
            mixed[r * columns + c] += grid[y, z] * p["local_conv"]["kernel"][i, j]
    mixed = mixed + (p["local_conv"]["bias"] if size else 0)
    return mixed @ p["out"] + p["out_bias"], index


def run(model, variables, x, **kwargs):
    return jax.jit(functools.partial(model.apply, **kwargs))(variables, x)


@pytest.mark.parametrize("dispatch", OPTIONS["dispatch"])
@pytest.mark.parametrize(("rows", "columns", "side"), [(6, 6, 3), (4, 6, 2), (5, 7, 3)])
def test_matches_loops(strict, dispatch, rows, columns, side):
    """Also where regions do not divide the grid: the rest is neither averaged nor attended to."""
    model = make(regions=side, grid=(rows, columns), dispatch=dispatch)
    x = images(2, rows, columns)
    variables = drawn(model, x)
    y, aux = run(model, variables, x, capture=("plan",))
    for n in range(2):
        expected, index = by_loops(variables["params"], x[n], rows, columns, side, 2)
        np.testing.assert_array_equal(aux.plans["regions"].index[n], index)
        np.testing.assert_allclose(y[n], expected, rtol=2e-5, atol=2e-5)


def test_both_dispatches_have_the_same_gradients():
    x = images(2, 5, 7)
    models = [make(grid=(5, 7), dispatch=name) for name in OPTIONS["dispatch"]]
    variables = drawn(models[0], x)
    loss = lambda model, variables, x: jnp.sum(jnp.sin(model.apply(variables, x)[0]))
    both = lambda model: jax.jit(jax.grad(functools.partial(loss, model), (0, 1)))(variables, x)
    grads = [both(model) for model in models]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *grads)


def test_padding_is_neither_averaged_nor_attended_to():
    model, x = make(), images()
    variables = drawn(model, x)
    mask = np.random.default_rng(2).random((2, 36)) < 0.7
    y, aux = run(model, variables, x, mask=jnp.asarray(mask))
    moved, _ = run(model, variables, jnp.where(mask[..., None], x, 9.0), mask=jnp.asarray(mask))
    for n in range(2):
        expected, index = by_loops(variables["params"], x[n], 6, 6, 3, 2, real=mask[n])
        np.testing.assert_allclose(y[n][mask[n]], expected[mask[n]], rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(y[n][mask[n]], moved[n][mask[n]], rtol=1e-6, atol=1e-6)
    blocks = [[[t for t in b if mask[n][t]] for b in regions_of(6, 6, 3)] for n in range(2)]
    _, both = by_loops(variables["params"], x[0], 6, 6, 3, 2, real=mask[0])
    _, other = by_loops(variables["params"], x[1], 6, 6, 3, 2, real=mask[1])
    pairs = sum(
        len(blocks[n][r]) * sum(len(blocks[n][y]) for y in chosen)
        for n, index in enumerate((both, other))
        for r, chosen in enumerate(index)
    )
    assert int(aux.events["pairs"].needed) == pairs
    assert int(aux.events["pairs"].executed) == 2 * 36 * 2 * 4


@pytest.mark.parametrize("dispatch", OPTIONS["dispatch"])
def test_all_regions_are_dense_attention(dispatch):
    x = images()
    dense = make(top=None)
    variables = drawn(dense, x)
    whole, _ = run(dense, variables, x)
    routed, _ = run(make(top=9, dispatch=dispatch), variables, x)
    np.testing.assert_allclose(routed, whole, rtol=1e-5, atol=1e-5)
    every = np.tile(np.arange(1), (1, 1))
    expected, _ = by_loops(variables["params"], x[0], 6, 6, 1, 1, index=every)
    np.testing.assert_allclose(whole[0], expected, rtol=2e-5, atol=2e-5)


def test_scale_of_heads_and_input_convolution():
    x = images()
    model = make(scale="head", local=0)
    variables = drawn(model, x)
    y, _ = run(model, variables, x)
    expected, _ = by_loops(variables["params"], x[0], 6, 6, 3, 2, size=0, scale=D // H)
    np.testing.assert_allclose(y[0], expected, rtol=2e-5, atol=2e-5)
    near = make(local_on="input", qkv_bias=False)
    variables = drawn(near, x)
    assert not {"q_bias", "k_bias", "v_bias"} & set(variables["params"])
    without, _ = run(make(local=0, qkv_bias=False), variables, x)
    conv = DepthwiseConv(5).apply({"params": variables["params"]["local_conv"]}, x)
    y, _ = run(near, variables, x)
    np.testing.assert_allclose(y, without + conv @ variables["params"]["out"], rtol=1e-5, atol=1e-5)


def test_what_a_query_depends_on():
    """Routing held fixed: itself, its regions' tokens, and the neighbourhood of the convolution; nothing else."""
    model, x = make(select="local"), images(1)
    variables = drawn(model, x)
    query, blocks = 0, regions_of(6, 6, 3)
    jacobian = jax.jit(jax.grad(lambda x: model.apply(variables, x)[0][0, query].sum()))(x)[0]
    chosen = Regions(6, 6, 3).nearest(2)[0]
    near = {r * 6 + c for r in range(3) for c in range(3)}
    expected = {query, *near, *(t for region in chosen for t in blocks[region])}
    assert set(np.flatnonzero(np.abs(jacobian).sum(-1) > 0).tolist()) == expected


def test_no_gradient_passes_through_the_choice():
    """Unchosen regions' values learn through the convolution only; soft routing reaches them through the softmax."""
    x = images(1)
    hard = make(local=0)
    variables = drawn(hard, x)
    _, aux = run(hard, variables, x, capture=("plan",))
    index = np.asarray(aux.plans["regions"].index[0])
    query = 0
    keys = [t for region in index[0] for t in regions_of(6, 6, 3)[region]]

    def reached(model):
        loss = lambda x: jnp.sum(jnp.square(model.apply(variables, x)[0][0, query]))
        gradient = np.asarray(jax.jit(jax.grad(loss))(x))[0]
        return set(np.flatnonzero(np.abs(gradient).sum(-1) > 0).tolist())

    assert reached(hard) == reached(make(local=0, routing="soft")) == {query, *keys}
    own = regions_of(6, 6, 3)[0]
    assert reached(make(local=0, routing="soft_learned")) == {*own, *keys}


def test_soft_routing_weighs_keys_and_values():
    x = images(1)
    model = make(local=0, routing="soft")
    variables = drawn(model, x)
    y, aux = run(model, variables, x, capture=("plan",))
    plan = aux.plans["regions"]
    chosen, scores = np.asarray(plan.index[0]), np.asarray(plan.scores[0], np.float64)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    q, k, v = (
        np.einsum("td,dhp->thp", np.asarray(x[0], float), p[n]) + p[f"{n}_bias"] for n in "qkv"
    )
    weights = np.exp(scores / np.sqrt(D))
    weights /= weights.sum(-1, keepdims=True)
    blocks, mixed = regions_of(6, 6, 3), np.zeros_like(q)
    for region, block in enumerate(blocks):
        pairs = list(zip(chosen[region], weights[region], strict=True))
        keys = np.concatenate([w * k[blocks[r]] for r, w in pairs])
        values = np.concatenate([w * v[blocks[r]] for r, w in pairs])
        for token, head in itertools.product(block, range(H)):
            share = np.exp(keys[:, head] @ q[token, head] / np.sqrt(D))
            mixed[token, head] = share @ values[:, head] / share.sum()
    expected = mixed.reshape(36, D) @ p["out"] + p["out_bias"]
    np.testing.assert_allclose(y[0], expected, rtol=2e-5, atol=2e-5)


def test_permuting_the_channels_of_queries_and_keys_changes_no_choice():
    x = images(3)
    model = make()
    variables = drawn(model, x)
    _, aux = run(model, variables, x, capture=("plan",))
    order = np.random.default_rng(3).permutation(D)
    mixed = dict(variables["params"])
    for name in ("q", "k"):
        mixed[name] = mixed[name].reshape(D, D)[:, order].reshape(D, H, -1)
        mixed[f"{name}_bias"] = mixed[f"{name}_bias"].reshape(D)[order].reshape(H, -1)
    _, other = run(model, {"params": mixed}, x, capture=("plan",))
    np.testing.assert_array_equal(aux.plans["regions"].index, other.plans["regions"].index)


def test_attention_follows_content_moved_by_whole_regions():
    x = images(1)
    model = make(local=0)
    variables = drawn(model, x)
    moved = lambda x: jnp.roll(x.reshape(1, 6, 6, D), (2, 4), (1, 2)).reshape(1, 36, D)
    y, _ = run(model, variables, x)
    shifted, _ = run(model, variables, moved(x))
    np.testing.assert_allclose(shifted, moved(y), rtol=1e-5, atol=1e-5)


def test_low_precision_chooses_alike_unless_scores_are_close():
    rng = np.random.default_rng(4)
    q, k = (jnp.asarray(rng.normal(size=(8, 9, 4, H, 4)), jnp.float32) for _ in range(2))
    real = jnp.ones((8, 9, 4), bool)
    exact = np.asarray(region_scores(q, k, real))
    low = np.asarray(region_scores(q.astype(jnp.bfloat16), k.astype(jnp.bfloat16), real))
    top = np.sort(exact, axis=-1)[..., ::-1]
    clear = (top[..., 1] - top[..., 2]) > 1e-2 * np.abs(exact).max(axis=-1)
    chosen = [np.sort(np.argsort(-s, axis=-1)[..., :2], axis=-1) for s in (exact, low)]
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(chosen[0][clear], chosen[1][clear])


@pytest.mark.parametrize(("side", "top"), [(7, 1), (7, 4), (7, 16)])
def test_counted_work_is_the_formula(side, top):
    """2 N k (N / S^2) C multiply-adds of attention and S^4 C of routing; 64 keys a query at 224 pixels."""
    tokens_side = {1: 56, 4: 28, 16: 14}[top]
    n, d = tokens_side**2, 4
    model = BiLevelRouting(heads=1, regions=side, top=top)
    shape = jax.ShapeDtypeStruct((2, n, d), jnp.float32)
    variables = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), shape))

    def events(variables, x):
        return model.apply(variables, x)[1].events

    zeros = lambda tree: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), tree)
    counted = jax.jit(events)(zeros(variables), zeros(shape))
    ledger = Ledger(model.cost(d, n)).record(counted)
    pairs = ledger.total(under="pair_blocks") + ledger.total(under="pairs")
    routing = ledger.total(under="region_pairs")
    attention = pairs - routing  # "region_pairs" holds "pairs" too
    assert attention == 2 * 2 * (2 * n * top * (n // side**2) * d)
    assert routing == 2 * 2 * side**4 * d
    assert top * (n // side**2) == 64


def test_controls():
    grid = Regions(8, 8, 4)
    nearest = grid.nearest(5)
    np.testing.assert_array_equal(nearest[5], [5, 1, 4, 6, 9])
    assert all(row[0] == region for region, row in enumerate(nearest))
    x = images(2)
    model = make(select="random", top=3)
    variables = drawn(model, x)
    index = lambda **kw: (
        model.apply(variables, x, capture=("plan",), **kw)[1].plans["regions"].index
    )
    rngs = [{"router": jax.random.key(n)} for n in range(40)]
    draws = np.stack([index(rngs=keys) for keys in rngs])
    assert all(len(set(row)) == 3 for row in draws.reshape(-1, 3))
    counts = np.bincount(draws.ravel(), minlength=9) / draws.size
    assert np.abs(counts - 1 / 9).max() < 4 * np.sqrt(1 / 9 / draws.size)
    np.testing.assert_array_equal(index(), index())
    assert "region_pairs" not in model.apply(variables, x)[1].events


@pytest.mark.parametrize("size", [3, 7])  # the CPU's forms: shifted copies, matrices of places
def test_all_forms_of_the_depthwise_convolution(size):
    rng, pad = np.random.default_rng(5), (size // 2, size // 2)
    x = jnp.asarray(rng.normal(size=(2, 4, 7, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(size, size, 3)), jnp.float32)
    wide, expected = np.pad(x, ((0, 0), pad, pad, (0, 0))), np.zeros((2, 4, 7, 3))
    for r, c, i, j in np.ndindex(4, 7, size, size):
        expected[:, r, c] += wide[:, r + i, c + j] * np.asarray(kernel)[i, j]
    np.testing.assert_allclose(_convolved(x, kernel), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(depthwise(x, kernel), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top": 10}, "use 1 to 9 regions"),
        ({"heads": 3}, "use a divisor"),
        ({"regions": 5, "top": 2}, "leave some of a grid of 6x6 tokens empty"),
        ({"grid": (5, 5)}, "36 tokens are no such grid"),
        ({"routing": "soft", "dispatch": "lists"}, "dispatch='gather' only"),
        ({"local": 4}, "use an odd number"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(DyncompError, match=message):
        jax.eval_shape(make(**fields).init, jax.random.key(0), images())


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_unknown_options_are_refused(unchecked, name):
    with pytest.raises(DyncompError, match=f"{name}='other': use"):
        jax.eval_shape(make(**{name: "other"}).init, jax.random.key(0), images())
