"""Attention over blocks of seen slots against a loop over queries and keys in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.attention import Sight, attend, attend_seen
from dyncomp.attention.attend import KEYS, ROWS, SMALL

B, H, G, P = 2, 4, 2, 8


def drawn(t, s, seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (B, t, H, P), (B, s, G, P), (B, s, G, P)
    return [
        jax.random.normal(k, shape).astype(dtype) for k, shape in zip(keys, shapes, strict=True)
    ]


def table(sight):
    """Which keys each query sees, by the definition."""
    place, keys = np.asarray(sight.place), np.asarray(sight.key_place)
    seen = np.zeros((len(keys), len(place), keys.shape[1]), bool)
    for n, i, j in np.ndindex(seen.shape):
        at = keys[n, j]
        seen[n, i, j] = at >= 0 and (not sight.causal or at <= place[i])
        if sight.window is not None:
            seen[n, i, j] &= at > place[i] - sight.window
        if sight.visible is not None:
            visible = np.asarray(sight.visible)
            newest = j - (place[-1] + 1 - visible.shape[-1])
            if 0 <= newest < visible.shape[-1]:
                seen[n, i, j] &= visible[n % len(visible), i, newest]
    return seen


def by_hand(q, k, v, seen):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for n, i, j in np.ndindex(out.shape[:3]):
        own = np.flatnonzero(seen[n % len(seen), i])
        if len(own):
            scores = k[n, own, j // (H // G)] @ q[n, i, j] / np.sqrt(P)
            weights = np.exp(scores - scores.max())
            out[n, i, j] = weights / weights.sum() @ v[n, own, j // (H // G)]
    return out


def compare(q, k, v, sight, atol=2e-6):
    mixed, pairs = jax.jit(attend_seen)(q, k, v, sight)
    seen = table(sight)
    np.testing.assert_array_equal(np.asarray(sight.all()), seen)
    looks = np.broadcast_to(seen.any(-1), q.shape[:2])  # others may give anything finite
    want = by_hand(q, k, v, seen)
    np.testing.assert_allclose(np.asarray(mixed, np.float64)[looks], want[looks], atol=atol)
    assert np.isfinite(np.asarray(mixed, np.float32)).all()
    return int(pairs)


def filled(start, t, s, holes=()):
    """Places of a cache with ``start + t`` filled slots; padding at ``holes`` of row 0."""
    place = np.where(np.arange(s) < start + t, np.arange(s), -1)
    keys = np.stack([place, place])
    keys[0, list(holes)] = -1
    return jnp.arange(start, start + t, dtype=jnp.int32), jnp.asarray(keys, jnp.int32)


@pytest.mark.parametrize(
    ("start", "t", "s"),
    [(0, 1, 1), (5, 1, 16), (600, 1, 1300), (0, 300, 320), (37, 513, 1024), (1100, 3, 1104)],
)
def test_equals_the_definition(start, t, s):
    """One block and several, full and partly filled, with padding in front."""
    place, keys = filled(start, t, s, holes=range(min(3, start)))
    pairs = compare(*drawn(t, s), Sight(place, keys))
    if t == 1:  # two blocks of three: all slots are one product
        assert pairs == s
    assert t == 1 or pairs <= -(-t // min(t, ROWS)) * min(t, ROWS) * (start + t + KEYS)


@pytest.mark.parametrize("window", [1, 7, 600])
def test_windows(window):
    place, keys = filled(900, 280, 1536)
    compare(*drawn(280, 1536), Sight(place, keys, window=window))


def test_without_causality():
    place, keys = filled(0, 70, 196)
    compare(*drawn(70, 196), Sight(place, keys, causal=False))


@pytest.mark.parametrize("rows", [1, B])
def test_trees_of_new_positions(rows):
    place, keys = filled(530, 9, 1024)
    told = jax.random.bernoulli(jax.random.key(3), 0.5, (rows, 9, 9)) | jnp.eye(9, dtype=bool)
    compare(*drawn(9, 1024), Sight(place, keys, told))


def test_slots_in_any_order():
    """A policy may keep keys wherever it likes: places decide."""
    place, keys = filled(1200, 2, 1600)
    mixed = jax.random.permutation(jax.random.key(1), keys, axis=1, independent=False)
    compare(*drawn(2, 1600), Sight(place, mixed, window=300))


def test_only_blocks_that_are_seen_are_computed():
    for start, window, blocks in (
        (5, None, 1),
        (KEYS, None, 2),
        (2 * KEYS, None, 3),
        (3 * KEYS, 4, 2),
        (3 * KEYS, None, 8),  # half of them: all are one product
    ):
        place, keys = filled(start, 1, 8 * KEYS)
        pairs = compare(*drawn(1, 8 * KEYS), Sight(place, keys, window=window))
        assert pairs == blocks * KEYS
    place, keys = filled(0, 2 * KEYS, 2 * KEYS)
    _, pairs = attend_seen(*drawn(2 * KEYS, 2 * KEYS), Sight(place, keys))
    assert int(pairs) == ROWS * KEYS * (1 + 1 + 2 + 2)


def test_gradients_are_those_of_the_plain_form():
    q, k, v = drawn(5, 2 * SMALL)
    place, keys = filled(150, 5, 2 * SMALL, holes=(2, 3))
    sight = Sight(place, keys)
    target = jax.random.normal(jax.random.key(9), q.shape)
    loss = lambda mixed: jnp.sum(mixed * target)
    ours = jax.grad(lambda *x: loss(attend_seen(*x, sight)[0]), (0, 1, 2))(q, k, v)
    want = jax.grad(lambda *x: loss(attend(*x, sight.all())), (0, 1, 2))(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, want)


def test_bfloat16_keeps_its_type_and_sums_in_float32():
    q, k, v = drawn(3, 700, dtype=jnp.bfloat16)
    place, keys = filled(690, 3, 700)
    mixed, _ = attend_seen(q, k, v, Sight(place, keys))
    assert mixed.dtype == jnp.bfloat16
    compare(q, k, v, Sight(place, keys), atol=4e-3)


def test_no_table_of_all_scores():
    """The compiled prefill of 4096 tokens needs less memory than one head's scores."""
    t = 4096
    shape = lambda h: jax.ShapeDtypeStruct((1, t, h, P), jnp.float32)
    place, keys = filled(0, t, t)
    call = jax.jit(lambda q, k, v: attend_seen(q, k, v, Sight(place, keys[:1]))[0])
    memory = call.lower(shape(H), shape(G), shape(G)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * t * t
