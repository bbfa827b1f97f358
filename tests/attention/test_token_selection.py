"""Properties of voting and of the lists it gives (arXiv 2411.02886)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.attention import Attention, TokenSelection
from dyncomp.attention.counts import counts_of
from dyncomp.attention.token_selection import votes_of

D, H, G = 24, 6, 3


def votes(q, k, *words):
    """`votes_of` for keys [b s g p]."""
    return votes_of(q, jnp.swapaxes(k, 1, 2), *words)


@pytest.fixture(scope="module")
def queries():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, H, 8)), rng.normal(size=(2, 30, G, 8))
    candidates = np.broadcast_to((np.arange(30) >= 3) & (np.arange(30) < 26), (2, 30))
    return jnp.float32(q), jnp.float32(k), jnp.asarray(candidates)


def test_votes_are_softmaxes_added_up(queries):
    q, k, candidates = queries
    want = np.zeros((2, 30))
    for b in range(2):
        for h in range(H):
            raw = np.exp(np.float64(k[b, :, h // 2]) @ np.float64(q[b, h])) * candidates[b]
            want[b] += raw / raw.sum()
    got = votes(q, k, candidates, "soft")
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(jnp.sum(got, axis=1), H, rtol=1e-5)


def test_a_constant_for_one_head_changes_only_the_raw_sum(queries):
    q, k, candidates = queries
    k = k.at[..., 0].set(
        1.0
    )  # adding to this coordinate of q adds a constant to the head's products
    shifted = q.at[:, 0, 0].add(7.0)
    same = lambda vote: np.abs(
        np.asarray(votes(q, k, candidates, vote) - votes(shifted, k, candidates, vote))
    ).max()
    assert same("soft") < 1e-5 and same("raw") > 6.0


def test_a_louder_head_keeps_its_influence(queries):
    q, k, candidates = queries
    loud = q.at[:, 1].multiply(10.0)
    one, other = (votes(x, k, candidates, "soft") for x in (q, loud))
    assert np.abs(np.asarray(one - other)).max() > 1e-2
    np.testing.assert_allclose(jnp.sum(other, axis=1), H, rtol=1e-5)


def test_shared_key_heads_vote_like_copies(queries):
    q, k, candidates = queries
    np.testing.assert_allclose(
        votes(q, k, candidates, "soft"),
        votes(q, jnp.repeat(k, H // G, axis=2), candidates, "soft"),
        atol=1e-6,
    )
    released = votes(q, k, candidates, "soft", "modulo")
    copies = jnp.tile(k, (1, 1, H // G, 1))
    np.testing.assert_allclose(released, votes(q, copies, candidates, "soft"), atol=1e-6)


def test_permuting_candidates_permutes_the_votes(queries):
    q, k, candidates = queries
    order = np.arange(30)
    order[3:26] = np.random.default_rng(1).permutation(order[3:26])
    got = votes(q, k[:, order], candidates, "soft")
    np.testing.assert_allclose(got, votes(q, k, candidates, "soft")[:, order], atol=1e-6)


def layer(**words):
    x = jax.random.normal(jax.random.key(2), (1, 26, D))
    module = Attention(heads=H, kv_heads=G, cache=functools.partial(TokenSelection, **words))
    variables = jax.jit(module.init)(jax.random.key(3), x)
    return module, jax.tree.map(lambda w: 2.0 * w, variables), x


def steps(module, variables, x, prompt, state=None):
    """One prompt, then token by token."""
    call = jax.jit(lambda x, state: module.apply(variables, x, cache=state))
    state = module.init_cache(D, 1, 32) if state is None else state
    y, aux = call(x[:, :prompt], state)
    outs, found = [y], [aux]
    for i in range(prompt, x.shape[1]):
        y, aux = call(x[:, i : i + 1], aux.cache)
        outs.append(y)
        found.append(aux)
    return jnp.concatenate(outs, axis=1), found


def test_the_list_is_ascending_and_as_long_as_promised():
    module, variables, x = layer(sink=2, top=5, local=4)
    _, found = steps(module, variables, x, 12)
    policy = found[-1].cache.policy
    for aux in found[1:]:
        state = aux.cache
        count = state.seen()
        slots, seen = policy._list(state, counts_of(state.positions >= 0), 1)
        kept = np.asarray(slots[0])[np.asarray(seen[0])]
        assert np.all(np.diff(kept) > 0)
        assert len(kept) == min(int(count[0]), 11)
        pairs = aux.events["pairs"]
        assert int(pairs.needed) == len(kept) and int(pairs.executed) == 11


def test_a_needle_is_selected():
    rng = np.random.default_rng(4)
    q, k = rng.normal(size=(1, H, 16)), rng.normal(size=(1, 40, G, 16))
    mean = q.reshape(1, G, 2, 16).mean(2)
    k[:, 17] = 5 * np.linalg.norm(k[:, 17]) * mean / np.linalg.norm(mean, axis=-1, keepdims=True)
    got = votes(jnp.float32(q), jnp.float32(k), jnp.ones((1, 40), bool), "soft")
    assert int(jnp.argmax(got[0])) == 17


@pytest.mark.parametrize(("reuse", "selections"), [(1.01, 14), (-1.01, 1)])
def test_reuse_follows_its_threshold(reuse, selections):
    module, variables, x = layer(sink=2, top=5, local=4, reuse=reuse, patience=40)
    _, found = steps(module, variables, x, 12)
    assert int(found[-1].cache.selections[0]) == selections
    scored = sum(int(aux.events["scored"].executed) for aux in found[1:])
    assert scored == 32 * selections


def test_patience_ends_a_selection():
    module, variables, x = layer(sink=2, top=5, local=4, reuse=-1.01, patience=5)
    _, found = steps(module, variables, x, 12)
    assert int(found[-1].cache.selections[0]) == 3


def test_pieces_of_one_equal_steps():
    module, variables, x = layer(sink=2, top=5, local=4, chunk=1)
    whole, aux = module.apply(variables, x, cache=module.init_cache(D, 1, 32))
    single, found = steps(module, variables, x, 1)
    np.testing.assert_allclose(whole, single, atol=2e-5)
    np.testing.assert_array_equal(aux.cache.chosen, found[-1].cache.chosen)


def test_no_position_exceeds_the_list(monkeypatch):
    module, variables, x = layer(sink=2, top=5, local=4)
    highest = []
    turn = Attention._turn
    watch = lambda self, y, at, most=None: (highest.append(jnp.max(at)), turn(self, y, at, most))[1]
    _, aux = module.apply(variables, x[:, :25], cache=module.init_cache(D, 1, 32))
    monkeypatch.setattr(Attention, "_turn", watch)
    module.apply(variables, x[:, 25:], cache=aux.cache)
    assert highest and max(int(at) for at in highest) < 11


def test_a_budget_is_a_run_time_value(counting_jit):
    module, variables, x = layer(sink=2, top=8, local=4)
    _, aux = module.apply(variables, x[:, :25], cache=module.init_cache(D, 1, 32))
    call, traces = counting_jit(lambda state: module.apply(variables, x[:, 25:], cache=state))
    import dataclasses

    for budget in (8, 3, 0):
        state = dataclasses.replace(aux.cache, budget=jnp.int32(budget))
        _, after = call(state)
        assert int(after.events["pairs"].needed) == 2 + budget + 4
    assert len(traces) == 1
