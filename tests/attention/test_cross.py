"""Cross-attention by hand, and the cache whose rows stand at places of their own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dyncomp.attention import Attention, CrossAttention, FullCache, RowSlots
from dyncomp.attention.row_cache import RowCache, copy_slot
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Ledger

B, T, S, D, H = 2, 3, 5, 8, 2
P = D // H


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X, MEMORY = jnp.asarray(draw(0, B, T, D)), jnp.asarray(draw(1, B, S, D))
SEEN = np.asarray([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]], bool)


@pytest.fixture(scope="module")
def cross():
    module = CrossAttention(d_model=D, heads=H, bias=True)
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), X, MEMORY))
    leaves, tree = jax.tree.flatten(shapes)
    return module, tree.unflatten([draw(10 + i, *leaf.shape) for i, leaf in enumerate(leaves)])


def test_reads_the_memory_as_the_definition_says(cross):
    module, variables = cross
    (y, aux), made = jax.jit(
        lambda v, seen: (
            module.apply(v, X, MEMORY, seen),
            module.apply(v, MEMORY, method="keys_values"),
        )
    )(variables, SEEN)
    own = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    project = lambda x, name: np.einsum("btd,dhp->bthp", x, own[name]["kernel"]) + own[name]["bias"]
    q, k, v = project(X, "q"), project(MEMORY, "k"), project(MEMORY, "v")
    np.testing.assert_allclose(made[0], k, atol=1e-5)
    mixed = np.zeros((B, T, H, P))
    for b, t, h in np.ndindex(B, T, H):
        score = k[b, SEEN[b], h] @ q[b, t, h] / np.sqrt(P)
        weight = np.exp(score - score.max())
        mixed[b, t, h] = weight / weight.sum() @ v[b, SEEN[b], h]
    want = np.einsum("bthp,hpd->btd", mixed, own["out"]["kernel"]) + own["out"]["bias"]
    np.testing.assert_allclose(y, want, atol=1e-4)
    ledger = Ledger(module.cost()).record(jax.device_get(aux.events))
    each = 4 * D * D  # query and output, or key and value
    assert ledger.total() == each * B * T + each * 8 + 4 * D * T * 8


def test_heads_must_divide_the_width():
    with pytest.raises(DyncompError, match="multiple of heads=3"):
        CrossAttention(d_model=D, heads=3).init(jax.random.key(0), X, MEMORY)


def test_rows_at_places_of_their_own_see_what_a_common_cache_shows():
    module = Attention(heads=H, rope_theta=100.0)
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), X))
    leaves, tree = jax.tree.flatten(shapes)
    variables = tree.unflatten([draw(20 + i, *leaf.shape) for i, leaf in enumerate(leaves)])
    whole, _ = jax.jit(module.apply)(variables, X)
    step = jax.jit(lambda x, at, cache: module.apply(variables, x, at, None, cache))
    cache, found = RowSlots(T).init(B, H, P), np.zeros((B, T, D))
    # Row 0 goes ahead; row 1 repeats its place until row 0 is at its end.
    for places in ((0, 0), (1, 0), (2, 1), (2, 2)):
        at = np.asarray(places, np.int32)[:, None]
        y, aux = step(X[np.arange(B), at[:, 0]][:, None], at, cache)
        cache = aux.cache
        for b in range(B):
            found[b, at[b, 0]] = y[b, 0]
    np.testing.assert_allclose(found, whole, atol=1e-5)
    assert int(aux.events["pairs"].needed) == 6
    with pytest.raises(DyncompError, match="one position a pass"):
        module.apply(variables, X, None, None, cache)


def test_copies_touch_one_slot_of_some_rows():
    make = functools.partial(RowCache, policy=RowSlots(4))
    wide = lambda seed: jnp.asarray(draw(seed, B, 4, H, P))
    own, other = (make(wide(i), wide(i + 5)) for i in (30, 31))
    at, rows = jnp.asarray([1, 3], jnp.int32), jnp.asarray([True, False])
    got = copy_slot(own, other, at, rows)
    for name in ("keys", "values"):
        want = np.array(getattr(own, name))
        want[0, 1] = getattr(other, name)[0, 1]
        np.testing.assert_array_equal(getattr(got, name), want)
    with pytest.raises(DyncompError, match="at least 1 slot"):
        RowSlots(0)
    assert FullCache(4) != RowSlots(4)
