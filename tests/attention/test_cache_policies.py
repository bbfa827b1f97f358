"""Policies that keep or read less: against dense attention, and against masks worked out one query at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dyncomp.attention import Attention, HeavyHitters, SinkWindow, TokenSelection
from dyncomp.core.errors import DyncompError

D, H, G, T = 24, 6, 3, 21
EVERYTHING = {
    "sink_window": functools.partial(SinkWindow, sink=2, window=40, piece=8),
    "heavy_hitters": functools.partial(HeavyHitters, budget=40, recent=20),
    "tokens": functools.partial(TokenSelection, sink=2, top=40, local=8),
    "tokens_text_places": functools.partial(TokenSelection, sink=2, top=40, local=8, compact=False),
    "tokens_chunked": functools.partial(TokenSelection, sink=2, top=40, local=8, chunk=5),
    "tokens_reused": functools.partial(
        TokenSelection, sink=2, top=40, local=8, reuse=0.5, patience=4
    ),
}
SMALL = {
    "sink_window": functools.partial(SinkWindow, sink=2, window=5, piece=4),
    "heavy_hitters": functools.partial(HeavyHitters, budget=8, recent=3),
    "tokens": functools.partial(TokenSelection, sink=2, top=3, local=4),
    "tokens_chunked": functools.partial(TokenSelection, sink=2, top=3, local=4, chunk=3),
}


def mixer(cache=None, **more):
    return Attention(heads=H, kv_heads=G, **({} if cache is None else {"cache": cache}), **more)


@pytest.fixture(scope="module")
def setting():
    x = jax.random.normal(jax.random.key(0), (2, T, D))
    variables = nn.meta.unbox(jax.jit(mixer().init)(jax.random.key(1), x))
    return jax.tree.map(lambda w: 2.0 * w, variables), x


def drive(cache, variables, x, pieces, mask=None):
    """Outputs of a text read in pieces of the given lengths, and the last state."""
    module = mixer(cache)
    call = jax.jit(lambda x, state, mask, at: module.apply(variables, x, at, mask, state))
    state, outs, start = module.init_cache(D, len(x), 40), [], 0
    for size in pieces:
        part = slice(start, start + size)
        own = None if mask is None else mask[:, part]
        at = None if mask is None else jnp.maximum(jnp.cumsum(mask, axis=1)[:, part] - 1, 0)
        y, aux = call(x[:, part], state, own, at)
        outs.append(y)
        state, start = aux.cache, start + size
    return jnp.concatenate(outs, axis=1), state


@pytest.mark.parametrize("name", EVERYTHING)
@pytest.mark.parametrize("pieces", [(T,), (9, *[1] * 12), (13, 5, 3)])
def test_keeping_everything_equals_dense(setting, name, pieces):
    variables, x = setting
    got, _ = drive(EVERYTHING[name], variables, x, pieces)
    want, _ = mixer().apply(variables, x)
    np.testing.assert_allclose(got, want, atol=3e-5)


@pytest.mark.parametrize("name", SMALL)
def test_the_future_changes_no_past(setting, name):
    variables, x = setting
    changed = x.at[:, 15:].add(1.0)
    pieces = (12, 3, *[1] * 6)
    one, other = (drive(SMALL[name], variables, each, pieces)[0] for each in (x, changed))
    np.testing.assert_array_equal(one[:, :15], other[:, :15])
    assert np.abs(np.asarray(one - other))[:, 15:].max() > 1e-3


@pytest.mark.parametrize("name", SMALL)
def test_a_padded_row_equals_itself_alone(setting, name):
    variables, x = setting
    alone, _ = drive(SMALL[name], variables, x[:1, 4:], (8, *[1] * 9))
    mask = jnp.ones((2, T), bool).at[0, :4].set(False)
    together, _ = drive(SMALL[name], variables, x, (12, *[1] * 9), mask)
    start = 8 if "chunked" in name else 0  # pieces of a padded prompt begin elsewhere
    np.testing.assert_allclose(together[:1, 4 + start :], alone[:, start:], atol=3e-5)


def dense(variables, x, allowed):
    """Outputs where each query of each head sees only what ``allowed`` [b h t s] says, float64 in NumPy."""
    w = {k: np.asarray(v, np.float64) for k, v in variables["params"].items()}
    q, k, v = (np.einsum("btd,dhp->bthp", np.asarray(x, np.float64), w[n]) for n in "qkv")
    t, p = q.shape[1], q.shape[-1]
    angle = np.arange(t)[:, None] * 10_000.0 ** (-np.arange(p // 2) * 2 / p)

    def turn(y):
        first, second = y[..., : p // 2], y[..., p // 2 :]
        cos, sin = np.cos(angle)[None, :, None], np.sin(angle)[None, :, None]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    q, k, v = turn(q), np.repeat(turn(k), H // G, 2), np.repeat(v, H // G, 2)
    scores = np.einsum("bthp,bshp->bhts", q, k) / np.sqrt(p)
    scores = np.where(allowed, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhts,bshp,hpd->btd", weights, v, w["out"]), weights


@pytest.mark.parametrize("pieces", [(T,), (9, *[1] * 12), [1] * T, (6, 9, 6)])
def test_sinks_and_window_equal_their_mask(setting, pieces):
    variables, x = setting
    i, j = np.arange(T)[:, None], np.arange(T)[None]
    allowed = (j <= i) & ((j < 2) | (i - j < 5))
    want, _ = dense(variables, x, np.broadcast_to(allowed, (2, H, T, T)))
    got, state = drive(SMALL["sink_window"], variables, x, pieces)
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert state.keys.shape[1] == 7
    assert sorted(np.asarray(state.positions[0]).tolist()) == [0, 1, 16, 17, 18, 19, 20]


def test_heavy_hitters_against_one_query_at_a_time(setting):
    variables, x = setting
    prompt, budget, recent = 12, 8, 3
    allowed = np.broadcast_to(np.tril(np.ones((T, T), bool)), (2, H, T, T)).copy()
    _, weights = dense(variables, x, allowed)
    for b in range(2):
        for g in range(G):
            own = slice(2 * g, 2 * g + 2)
            score = weights[b, own, :prompt].sum((0, 1))
            kept = set(range(prompt - recent, prompt))
            kept |= set(np.argsort(-score[: prompt - recent], kind="stable")[: budget - recent])
            for step in range(prompt, T):
                newest = sorted(kept)[-recent:]
                kept.remove(min(kept - set(newest), key=lambda j: score[j]))
                kept.add(step)
                seen = np.isin(np.arange(T), list(kept))
                allowed[b, own, step] = seen
                _, now = dense(variables, x, allowed)
                score = score + now[b, own, step].sum(0)
    want, _ = dense(variables, x, allowed)
    got, state = drive(SMALL["heavy_hitters"], variables, x, (prompt, *[1] * (T - prompt)))
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert state.keys.shape[1] == budget


@pytest.mark.parametrize("name", [name for name in SMALL if "chunked" not in name])
def test_forgetting_padding_leaves_the_rest(setting, name):
    """Reading a piece that is padded on the right, and cutting it off again, changes nothing.

    Where pieces choose by their mean query it may: real tokens then share pieces with others.
    """
    variables, x = setting
    module = mixer(SMALL[name])
    state = module.init_cache(D, 2, 40)
    mask = jnp.ones((2, 12), bool).at[:, 9:].set(False)
    _, aux = module.apply(variables, x[:, :12], None, mask, state)
    cut = aux.cache.policy.truncate(aux.cache, jnp.int32(9))
    got, _ = module.apply(variables, x[:, 9:10], None, None, cut)
    want, _ = drive(SMALL[name], variables, x[:, :10], (9, 1))
    np.testing.assert_allclose(got, want[:, 9:], atol=2e-5)


def test_windows_and_trees_are_refused(setting):
    variables, x = setting
    for policy in (SMALL["sink_window"], SMALL["heavy_hitters"], SMALL["tokens"]):
        module = mixer(policy, window=4)
        with pytest.raises(DyncompError, match="use FullCache"):
            module.apply(variables, x, cache=module.init_cache(D, 2, 40))


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (SinkWindow, {"window": 0}),
        (HeavyHitters, {"budget": 4, "recent": 4}),
        (TokenSelection, {"top": 0}),
        (TokenSelection, {"local": 4, "chunk": 5}),
    ],
)
def test_bad_budgets_are_refused(policy, words):
    with pytest.raises(DyncompError, match="use"):
        policy(max_length=16, **words)
