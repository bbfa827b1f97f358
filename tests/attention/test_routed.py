"""Routing attention as a layer: centroids, causality, caches, the ledger; and heads of several kinds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dyncomp.attention import (
    AngularHash,
    AShape,
    Attention,
    KMeans,
    MixedHeads,
    RandomClusters,
    RoutedAttention,
)
from dyncomp.attention.kmeans import standardised
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Ledger
from dyncomp.experts import SwiGLU
from dyncomp.models import Block, DecoderLM, Group, apply

B, T, D, H, P, C, W = 2, 26, 12, 2, 6, 4, 5


def layer(**changes):
    options = {"heads": H, "head_dim": P, "clusters": C, "members": W, "relative": 3, **changes}
    module = RoutedAttention(**options)
    x = jax.random.normal(jax.random.key(0), (B, T, D))
    keys = {"params": jax.random.key(1), "router": jax.random.key(2)}
    return module, nn.unbox(jax.jit(module.init)(keys, x)), x


ASSIGNERS = {
    "kmeans": KMeans,
    "balanced": functools.partial(KMeans, balance=0.1),
    "random": RandomClusters,
    "hash": AngularHash,
}


def test_standardised_vectors_have_length_sqrt_p():
    """So a token's content logit with itself is p."""
    x = standardised(jax.random.normal(jax.random.key(0), (5, 64)) * 3 + 1)
    np.testing.assert_allclose(jnp.sum(x * x, -1), 64, rtol=1e-4)
    np.testing.assert_allclose(jnp.mean(x, -1), 0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 3])
def test_centroids_are_smoothed_moving_averages(steps):
    """Float64 replay of the released rule; padding counts nowhere; evaluation leaves every bit."""
    module = KMeans(heads=H, clusters=C, decay=0.9)
    place, real = jnp.arange(T), jnp.arange(T)[None] < jnp.asarray([T, 9])[:, None]
    draw = lambda i: standardised(jax.random.normal(jax.random.key(i), (B, H, T, P)))
    state = jax.jit(module.init)(jax.random.key(7), draw(0), place)
    sums, counts = (np.float64(state["controls"][name]) for name in ("sums", "counts"))
    mu = sums.copy()
    for i in range(steps):
        x = draw(i)
        (_, losses), state = module.apply(state, x, place, real, True, mutable=["controls"])
        x = np.float64(x)
        near = np.einsum("bhtp,hcp->bhtc", x, mu).argmax(-1)
        fresh, load, gaps = np.zeros_like(sums), np.zeros_like(counts), []
        for b, h, t in np.ndindex(B, H, T):
            if real[b, t]:
                fresh[h, near[b, h, t]] += x[b, h, t]
                load[h, near[b, h, t]] += 1
                gaps.append(np.mean((x[b, h, t] - mu[h, near[b, h, t]]) ** 2))
        np.testing.assert_allclose(losses["commitment"], 2 * np.mean(gaps), rtol=1e-5)
        sums, counts = 0.9 * sums + 0.1 * fresh, 0.9 * counts + 0.1 * load
        total = counts.sum(-1, keepdims=True)
        mu = sums / ((counts + 1e-5) / (total + C * 1e-5) * total)[..., None]
    np.testing.assert_allclose(state["controls"]["sums"], sums, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state["controls"]["counts"], counts, rtol=1e-5)
    scores, _ = module.apply(state, draw(9), place)
    np.testing.assert_allclose(
        scores, np.einsum("bhtp,hcp->bhtc", np.float64(draw(9)), mu), rtol=1e-4, atol=1e-4
    )
    _, after = module.apply(state, draw(9), place, None, False, mutable=["controls"])
    assert all(map(np.array_equal, jax.tree.leaves(after), jax.tree.leaves(state)))


def test_balance_lowers_full_clusters():
    module = KMeans(heads=1, clusters=3, balance=0.25)
    x, place = standardised(jax.random.normal(jax.random.key(0), (1, 1, 9, P))), jnp.arange(9)
    state = jax.jit(module.init)(jax.random.key(1), x, place)
    scores, _ = module.apply(state, x, place)
    load = np.bincount(np.asarray(scores[0, 0].argmax(-1)), minlength=3)
    _, after = module.apply(state, x, place, None, True, mutable=["controls"])
    want = [[-0.25 * np.sign(n - 3) for n in load]]
    np.testing.assert_allclose(after["controls"]["shift"], want)


@pytest.mark.parametrize("membership", ["nearest", "best"])
def test_no_gradient_reaches_centroids(membership):
    module, variables, x = layer(membership=membership)

    def loss(controls, params):
        y, aux = module.apply({"params": params, "controls": controls}, x)
        return jnp.sum(y * y) + aux.losses["commitment"]

    found = jax.jit(jax.grad(loss, (0, 1)))(variables["controls"], variables["params"])
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(found[0]))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(found[1]))


@pytest.mark.parametrize("name", ASSIGNERS)
def test_later_tokens_change_nothing_earlier(name):
    """Bit for bit, at every cut, for every assigner; the published membership fails this."""
    module, variables, x = layer(assign=ASSIGNERS[name])
    call = jax.jit(lambda x: module.apply(variables, x)[0])
    base = call(x)
    for cut in range(1, T, 4):
        moved = call(x.at[:, cut:].set(jax.random.normal(jax.random.key(cut), (B, T - cut, D))))
        np.testing.assert_allclose(moved[:, :cut], base[:, :cut], atol=1e-6)
        assert not np.allclose(moved[:, cut:], base[:, cut:])


def test_the_published_membership_leaks():
    module, variables, x = layer(membership="best")
    moved = x.at[:, 16:].set(jax.random.normal(jax.random.key(5), (B, T - 16, D)))
    gap = module.apply(variables, x)[0] - module.apply(variables, moved)[0]
    assert np.mean(np.abs(gap[:, :16]).max(-1) > 1e-4) > 0.1


@pytest.mark.parametrize("name", ["kmeans", "random", "hash"])
@pytest.mark.parametrize("first", [1, 11])
def test_decoding_is_the_whole_pass(name, first):
    """Prefill of some tokens, then single ones, behind a cache with spare slots and a padded row."""
    module, variables, x = layer(assign=ASSIGNERS[name])
    mask = jnp.ones((B, T)).at[1, :3].set(0)
    want, _ = module.apply(variables, x, None, mask)
    cache = module.init_cache(D, B, T + 3)
    step = jax.jit(lambda x, m, cache: module.apply(variables, x, None, m, cache))
    parts, at = [], 0
    for size in [first] + [1] * (T - first):
        y, aux = step(x[:, at : at + size], mask[:, at : at + size], cache)
        cache, at = aux.cache, at + size
        parts.append(y)
    got, real = jnp.concatenate(parts, axis=1), np.asarray(mask, bool)
    np.testing.assert_allclose(got[real], want[real], atol=2e-5)


def test_the_ledger_by_hand():
    """Two clusters of known members: 1 + 2 + 2 ... pairs of each head, squares of chunks executed."""
    module, variables, x = layer(clusters=1, members=4)
    _, aux = module.apply(variables, x)
    ledger = Ledger(module.cost(D, T)).record(aux.events)
    each = 1 + 2 + 3 + 4 * (T - 3)
    assert ledger.entries["pairs"].needed == B * H * each
    assert ledger.entries["pairs"].executed == B * H * 7 * 4 * 8
    assert ledger.entries["pairs"].cost.flops == 4 * P
    assert ledger.entries["projections"].cost.flops == 2 * D * 3 * H * P
    assert ledger.entries["assigned"].cost.flops == 2 * H * 1 * P
    assert ledger.entries["relative"].needed == B * H * T
    assert float(aux.losses["coverage"]) == 1.0 and float(aux.losses["largest"]) == 1.0


def test_random_assignments_are_fresh_in_training_only():
    module, variables, x = layer(assign=RandomClusters)
    call = lambda seed, train: (
        module.apply(
            variables, x, train=train, capture=("plan",), rngs={"router": jax.random.key(seed)}
        )[1]
        .plans["clusters"]
        .nearest
    )
    assert np.array_equal(call(0, False), call(1, False))
    assert not np.array_equal(call(0, True), call(1, True))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"membership": "first"}, "'nearest' or 'best'"),
        ({"causal": False}, "use 'best'"),
        ({"causal": False, "membership": "best"}, "relative=0"),
        ({"clusters": 0}, "at least 1"),
        ({"assign": AngularHash, "clusters": 3}, "even number"),
        ({"head_dim": None, "heads": 5}, "not a multiple"),
    ],
)
def test_bad_options_are_refused(changes, words, unchecked):
    with pytest.raises(DyncompError, match=words):
        layer(**changes)


def test_the_published_membership_refuses_to_decode():
    with pytest.raises(DyncompError, match="cannot decode"):
        layer(membership="best")[0].init_cache(D, B, T)
    with pytest.raises(DyncompError, match="visible"):
        module, variables, x = layer()
        module.apply(variables, x, visible=jnp.ones((1, T, T), bool))


def test_mixed_heads_are_one_layer():
    """Two halves of a dense layer's heads, side by side, are that layer; caches too."""
    whole = Attention(heads=4, head_dim=P)
    half = functools.partial(Attention, heads=2, head_dim=P)
    mixed = MixedHeads({"one": half, "two": half})
    x = jax.random.normal(jax.random.key(0), (B, T, D))
    params = nn.unbox(jax.jit(whole.init)(jax.random.key(1), x))["params"]
    cut = lambda i: {
        name: leaf[i : i + 2] if name == "out" else leaf[:, i : i + 2]
        for name, leaf in params.items()
    }
    variables = {"params": {"one": cut(0), "two": cut(2)}}
    want, _ = whole.apply({"params": params}, x)
    got, aux = mixed.apply(variables, x)
    np.testing.assert_allclose(got, want, atol=1e-5)
    ledger = Ledger(mixed.cost(D, T)).record(aux.events)
    assert (
        ledger.total()
        == Ledger(whole.cost(D, T)).record(whole.apply({"params": params}, x)[1].events).total()
    )
    cache, parts = mixed.init_cache(D, B, T), []
    step = jax.jit(lambda x, cache: mixed.apply(variables, x, None, None, cache))
    for i in range(T):
        y, aux = step(x[:, i : i + 1], cache)
        cache = aux.cache
        parts.append(y)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), want, atol=1e-5)
    assert mixed.window is None and MixedHeads({"a": functools.partial(half, window=3)}).window == 3
    with pytest.raises(DyncompError, match="empty"):
        MixedHeads({})


def language_model(layers="scan", remat="none", near=None):
    near = near or functools.partial(Attention, heads=1, head_dim=P, window=4)
    far = functools.partial(
        RoutedAttention, heads=1, head_dim=P, clusters=C, members=W,
        assign=functools.partial(KMeans, decay=0.9),
    )  # fmt: skip
    mixer = functools.partial(MixedHeads, {"near": near, "far": far})
    block = functools.partial(Block, mixer=mixer, ffn=functools.partial(SwiGLU, hidden=16))
    return DecoderLM(
        vocab_size=17, d_model=D, groups=[Group([block], 2)], layers=layers, remat=remat
    )


def test_a_whole_model_trains_and_decodes():
    """Centroids move once a step, alike under scan, separate layers and recomputation; decoding is the whole pass."""
    tokens = jax.random.randint(jax.random.key(0), (B, T), 0, 17)
    variables = nn.unbox(jax.jit(language_model().init)(jax.random.key(1), tokens))

    def moved(model):
        def loss(params):
            own = {**variables, "params": params}
            (y, aux), new = apply(model, own, tokens, train=True, mutable=["controls"])
            return jnp.mean(y * y), new["controls"]

        return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

    grads, controls = moved(language_model())
    for other in (language_model("unroll"), language_model(remat="full")):
        again, state = moved(other)
        close = functools.partial(np.testing.assert_allclose, atol=1e-5)
        jax.tree.map(close, again, grads)
        jax.tree.map(close, state, controls)
    counts = controls["group_0"]["layers"]["block_0"]["mixer"]["far"]["assign"]["counts"]
    np.testing.assert_allclose(jnp.sum(counts, -1), 0.1 * B * T * np.ones((2, 1)), rtol=1e-5)

    model = language_model()
    want, _ = apply(model, variables, tokens)
    cache, parts = model.init_cache(B, T), []
    step = jax.jit(lambda t, cache: apply(model, variables, t, cache=cache))
    for begin, end in [(0, 9), *((i, i + 1) for i in range(9, T))]:
        y, aux = step(tokens[:, begin:end], cache)
        cache = aux.cache
        parts.append(y)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), want, atol=2e-4)


def test_local_heads_execute_their_window_only():
    """The sparse pattern computes blocks; the plain window computes the square."""
    x = jax.random.normal(jax.random.key(0), (1, 64, D))
    pairs = {}
    for name, options in {
        "pattern": {"pattern": functools.partial(AShape, window=8, tile=8)},
        "window": {"window": 8},
    }.items():
        module = Attention(heads=1, **options)
        _, aux = module.apply(jax.jit(module.init)(jax.random.key(1), x), x)
        pairs[name] = int(aux.events["pairs"].executed)
    assert pairs == {"pattern": 15 * 64, "window": 64 * 64}
