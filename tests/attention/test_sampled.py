"""Sampled attention: what a draw lets be seen, what it computes, and that it is attention over just that."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dyncomp.attention import (
    Attention,
    DroppedWeights,
    RandomKeys,
    ShuffledWindows,
    Sight,
    attend,
    attend_seen,
)
from dyncomp.attention.draws import example_keys, random_subset, shuffled_order
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Ledger

B, T, H, G, P = 2, 24, 4, 2, 8
SAMPLERS = {
    "random": RandomKeys(reduction=4),
    "random_heads": RandomKeys(reduction=4, per_head=True),
    "windows": ShuffledWindows(reduction=4, sigma=0.0),
    "biased": ShuffledWindows(reduction=4, sigma=3.0),
    "biased_heads": ShuffledWindows(reduction=4, sigma=3.0, per_head=True),
}


@pytest.fixture(autouse=True)
def strict_rules(strict):
    """No implicit promotion."""


def drawn(seed=0, t=T):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (B, t, H, P), (B, t, G, P), (B, t, G, P)
    return [jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True)]


def sight(t=T, causal=True, padded=0):
    place = jnp.arange(t, dtype=jnp.int32)
    real = jnp.broadcast_to(place, (B, t)).at[1, :padded].set(-1)
    return Sight(place, real, causal=causal)


@functools.partial(jax.jit, static_argnums=0)
def called(sampler, seed, q, k, v, own):
    return sampler(jax.random.key(seed), q, k, v, own)


def sees(sampler, found, own):
    """[b h t t] in numpy: what each query of each head reads."""
    table = np.asarray(found.plan.table())
    heads = H if sampler.per_head else 1
    table = table.reshape(B, -1, *table.shape[1:]).repeat(H // G if heads == H else H, axis=1)
    place, real = np.asarray(own.place), np.asarray(own.key_place) >= 0
    if own.causal:
        table = table & (place[None] <= place[:, None])
        if isinstance(sampler, RandomKeys):
            table = table | np.eye(len(place), dtype=bool)
    return table & real[:, None, None, :]


def reference(q, k, v, table):
    """Softmax over the seen keys, float64, one query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, i, h in np.ndindex(*q.shape[:3]):
        seen = np.flatnonzero(table[b, h, i])
        if len(seen):
            scores = k[b, seen, h // (H // G)] @ q[b, i, h] / np.sqrt(P)
            weights = np.exp(scores - scores.max())
            out[b, i, h] = weights / weights.sum() @ v[b, seen, h // (H // G)]
    return out


@pytest.mark.parametrize("t, causal", [(24, True), (22, True), (22, False)])
@pytest.mark.parametrize("name", SAMPLERS)
def test_it_is_attention_over_what_was_drawn(name, t, causal):
    sampler, (q, k, v), own = SAMPLERS[name], drawn(t=t), sight(t, causal, padded=3)
    found = called(sampler, 3, q, k, v, own)
    table = sees(sampler, found, own)
    real = np.asarray(own.key_place) >= 0
    want = reference(q, k, v, table)
    np.testing.assert_allclose(np.asarray(found.mixed)[real], want[real], atol=2e-6)
    pairs = (table & real[:, None, :, None]).sum(axis=(2, 3))
    np.testing.assert_array_equal(found.needed, pairs.sum(axis=1) // H)


@pytest.mark.parametrize("name", SAMPLERS)
def test_pairs_computed_are_a_share(name):
    q, k, v = drawn()
    found = called(SAMPLERS[name], 0, q, k, v, sight(causal=False))
    assert found.executed == T * T // 4
    causal = called(SAMPLERS[name], 0, q, k, v, sight())
    assert causal.executed == T * T // 4 + (T if name.startswith("random") else 0)
    # Gathered, not masked: no product is larger.
    jaxpr = str(
        jax.make_jaxpr(lambda *x: SAMPLERS[name](jax.random.key(0), *x, sight()).mixed)(q, k, v)
    )
    assert f"{T},{T}]" not in jaxpr.replace(f"bool[{B},{T},{T}]", "")


@pytest.mark.parametrize("causal", [True, False])
def test_everything_kept_is_dense(causal):
    q, k, v = drawn()
    own = sight(causal=causal, padded=2)
    dense = jax.jit(lambda q, k, v: attend(q, k, v, own.all()))(q, k, v)
    call = lambda sampler: called(sampler, 1, q, k, v, own).mixed
    np.testing.assert_array_equal(call(RandomKeys(reduction=1)), dense)
    real = np.asarray(own.key_place) >= 0
    windows = call(ShuffledWindows(reduction=1, sigma=5.0))
    np.testing.assert_allclose(windows[real], dense[real], atol=2e-6)
    np.testing.assert_allclose(call(DroppedWeights(rate=0.0))[real], dense[real], atol=2e-6)


def test_no_shuffle_gives_plain_windows():
    q, k, v = drawn()
    found = called(ShuffledWindows(reduction=4, sigma=0.0), 0, q, k, v, sight(causal=False))
    block = np.arange(T) // 6
    np.testing.assert_array_equal(found.plan.table(), np.tile(block[:, None] == block, (B, 1, 1)))


def inclusion(t, w, sigma, draws):
    """P(i and j share a window), by drawing."""
    real = jnp.ones((draws, t), bool)
    order = np.asarray(shuffled_order(jax.random.key(0), real, sigma))
    window = np.argsort(order, axis=1) // w
    return (window[:, :, None] == window[:, None, :]).mean(axis=0)


def test_near_keys_are_drawn_more_often():
    """Independently drawn with numpy, then against ours: t = 64, w = 16, sigma = 4."""
    found = inclusion(64, 16, 4.0, 4000)
    rng = np.random.default_rng(0)
    noisy = np.arange(64) + 4 * rng.standard_normal((4000, 64))
    window = np.argsort(np.argsort(noisy, axis=1), axis=1) // 16
    want = (window[:, :, None] == window[:, None, :]).mean(axis=0)
    ours, theirs = ([np.diagonal(p, o).mean() for o in (1, 2, 4, 8, 16)] for p in (found, want))
    np.testing.assert_allclose(ours, theirs, atol=0.02)
    np.testing.assert_allclose(ours, [0.77, 0.75, 0.71, 0.55, 0.16], atol=0.02)
    assert np.all(np.diff(ours) < 0)
    far = inclusion(64, 16, 1e5, 4000)
    np.testing.assert_allclose(np.diagonal(far, 1).mean(), 15 / 63, atol=0.01)
    np.testing.assert_array_equal(np.diagonal(found), 1.0)  # itself always


def test_random_keys_come_equally_often():
    index = random_subset(jax.random.key(0), jnp.ones((4000, 20), bool), 5)
    assert np.all(np.diff(np.asarray(index), axis=1) > 0)  # distinct, ascending
    np.testing.assert_allclose(np.bincount(np.ravel(index), minlength=20) / 4000, 0.25, atol=0.03)
    real = jnp.arange(20) < 7
    some = random_subset(jax.random.key(0), jnp.broadcast_to(real, (50, 20)), 5)
    assert int(some.max()) < 7


def test_examples_and_keys_differ():
    real = jnp.ones((3, 30), bool)
    first, second = (shuffled_order(jax.random.key(s), real, 9.0) for s in (0, 1))
    assert len({tuple(row) for row in np.concatenate([first, second]).tolist()}) == 6
    keys = jax.random.key_data(example_keys(jax.random.key(0), 3))
    assert len({tuple(row) for row in keys.tolist()}) == 3


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_future_changes_nothing(name):
    q, k, v = drawn()
    before = called(SAMPLERS[name], 5, q, k, v, sight()).mixed
    late = [x.at[:, 15:].add(1.0) for x in (q, k, v)]
    after = called(SAMPLERS[name], 5, *late, sight()).mixed
    np.testing.assert_array_equal(before[:, :15], after[:, :15])
    assert np.abs(before[:, 15:] - after[:, 15:]).max() > 0.1


@pytest.mark.parametrize("name", SAMPLERS)
def test_gradients(name):
    """Against dense attention masked by the same draw; keys that were left out get none."""
    sampler, (q, k, v), own = SAMPLERS[name], drawn(), sight()
    found = called(sampler, 2, q, k, v, own)
    table = jnp.asarray(sees(sampler, found, own))

    def masked(q, k, v):
        each = [attend(q[:, :, i:i + 1], k[:, :, i // 2:i // 2 + 1], v[:, :, i // 2:i // 2 + 1], table[:, i])
                for i in range(H)]  # fmt: skip
        return jnp.sum(jnp.sin(jnp.concatenate(each, axis=2)))

    ours = jax.grad(lambda *x: jnp.sum(jnp.sin(called(sampler, 2, *x, own).mixed)), (0, 1, 2))(
        q, k, v
    )
    for got, want in zip(ours, jax.grad(masked, (0, 1, 2))(q, k, v), strict=True):
        np.testing.assert_allclose(got, want, atol=3e-6)
    if name == "random":
        free = called(sampler, 2, q, k, v, sight(causal=False))
        grad = jax.grad(
            lambda k: jnp.sum(jnp.sin(called(sampler, 2, q, k, v, sight(causal=False)).mixed))
        )(k)
        moved = np.abs(np.asarray(grad)).max(axis=(2, 3)) > 0
        np.testing.assert_array_equal(moved, np.asarray(free.plan.table())[:, 0])


def test_dropped_weights_keep_the_mean():
    q, k, v = drawn()
    own = sight()
    each = [called(DroppedWeights(rate=0.5), seed, q, k, v, own).mixed for seed in range(400)]
    np.testing.assert_allclose(np.mean(each, axis=0), attend(q, k, v, own.all()), atol=0.3)
    assert called(DroppedWeights(rate=0.5), 0, q, k, v, own).executed == T * T


@pytest.fixture(scope="module")
def layer():
    make = functools.partial(Attention, heads=H, kv_heads=G, rope_theta=100.0)
    x = jax.random.normal(jax.random.key(5), (B, T, 16))
    return make, nn.unbox(jax.jit(make().init)(jax.random.key(1), x)), x


def test_when_a_mixer_samples(layer):
    """In training and where the stream is given; else it is dense, and the events are the same ones."""
    make, params, x = layer
    module = make(sampler=functools.partial(ShuffledWindows, reduction=4, sigma=2.0))
    rngs = {"dropout": jax.random.key(0)}
    dense, dense_aux = module.apply(params, x)
    np.testing.assert_array_equal(dense, make().apply(params, x)[0])
    train, aux = module.apply(params, x, train=True, rngs=rngs, capture=("plan",))
    again, _ = module.apply(params, x, rngs=rngs)
    np.testing.assert_array_equal(train, again)
    assert np.abs(train - dense).max() > 0.01
    assert set(aux.events) == set(dense_aux.events) and "sampled" in aux.plans
    price = module.cost(16, T)
    entries = lambda a: Ledger(price).record(a.events).entries
    assert entries(aux)["pairs"].executed == B * T * T // 4
    assert entries(dense_aux)["pairs"].executed == B * T * T
    assert entries(aux)["draws"].needed == B * T and entries(dense_aux)["draws"].needed == 0


def test_rotation_comes_before_the_shuffle(layer):
    """Scores of a window are those of dense attention at the same original places."""
    make, params, x = layer
    sampler = functools.partial(ShuffledWindows, reduction=1, sigma=50.0)
    mixed, _ = make(sampler=sampler).apply(params, x, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_allclose(mixed, make().apply(params, x)[0], atol=3e-6)


def test_a_padded_pass_equals_the_short_one(layer):
    make, params, x = layer
    module = make(sampler=functools.partial(ShuffledWindows, reduction=1, sigma=3.0))
    mask = (jnp.arange(T) < 17)[None].repeat(B, axis=0)
    rngs = {"dropout": jax.random.key(0)}
    padded, aux = module.apply(params, x, None, mask, rngs=rngs)
    np.testing.assert_allclose(padded[:, :17], make().apply(params, x[:, :17])[0], atol=3e-6)
    assert int(aux.events["pairs"].needed) == B * 17 * 18 // 2


@pytest.mark.parametrize("change", [{"window": 3}, {"cache": True}])
def test_what_does_not_go_together_is_refused(layer, change):
    make, params, x = layer
    cache = make().init_cache(16, B, T) if change.pop("cache", False) else None
    module = make(sampler=RandomKeys, **change)
    with pytest.raises(DyncompError, match="Attention.sampler"):
        module.apply(params, x, cache=cache, rngs={"dropout": jax.random.key(0)})


def test_bad_samplers_are_refused():
    with pytest.raises(DyncompError, match="reduction"):
        RandomKeys(reduction=0)
    with pytest.raises(DyncompError, match="sigma"):
        ShuffledWindows(sigma=-1.0)
    with pytest.raises(DyncompError, match="rate"):
        DroppedWeights(rate=1.0)
    q, k, v = drawn()
    with pytest.raises(DyncompError, match="without a cache"):
        RandomKeys()(jax.random.key(0), q[:, :3], k, v, sight())


def test_a_short_pass_still_works():
    q, k, v = (x[:, :3] for x in drawn())
    for sampler in SAMPLERS.values():
        found = called(sampler, 0, q, k, v, sight(3))
        np.testing.assert_allclose(
            found.mixed[:, 0], attend_seen(q, k, v, sight(3))[0][:, 0], atol=2e-6
        )
