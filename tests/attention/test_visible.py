"""Attention among new positions that do not all see each other: trees of guesses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dyncomp.attention import Attention
from dyncomp.core.ledger import Ledger

D, EARLIER = 8, 3
PARENT = [-1, 0, 0, 1, 2]
DEPTH = [0, 1, 1, 2, 2]


@pytest.fixture(scope="module")
def layer():
    module = Attention(heads=4, kv_heads=2, rope_theta=50.0)
    x = jax.random.normal(jax.random.key(0), (2, EARLIER + len(PARENT), D))
    return module, nn.unbox(jax.jit(module.init)(jax.random.key(1), x)), x


def path_of(slot):
    return [slot] if PARENT[slot] < 0 else [*path_of(PARENT[slot]), slot]


@pytest.fixture(scope="module")
def tree(layer):
    """One pass over a tree behind a cache of three positions."""
    module, params, x = layer
    _, aux = module.apply(params, x[:, :EARLIER], cache=module.init_cache(D, 2, 12))
    visible = np.zeros((1, 5, 5), bool)
    for slot in range(5):
        visible[0, slot, path_of(slot)] = True
    places = jnp.asarray(DEPTH)[None] + EARLIER
    return module.apply(
        params, x[:, EARLIER:], places, cache=aux.cache, visible=jnp.asarray(visible)
    )


@pytest.mark.parametrize("slot", range(5))
def test_a_slot_sees_what_its_path_alone_would_show(layer, tree, slot):
    module, params, x = layer
    path = [EARLIER + s for s in path_of(slot)]
    want, _ = module.apply(params, x[:, [*range(EARLIER), *path]])
    np.testing.assert_allclose(tree[0][:, slot], want[:, -1], atol=1e-6)


def test_pairs_are_counted_by_what_is_seen(layer, tree):
    ledger = Ledger(layer[0].cost(D, 1)).record(tree[1].events)
    assert ledger.events(under="pairs") == 2 * sum(EARLIER + 1 + depth for depth in DEPTH)


def test_seeing_everything_changes_no_bit(layer):
    module, params, x = layer
    plain, _ = module.apply(params, x)
    free, _ = module.apply(params, x, visible=jnp.ones((1, x.shape[1], x.shape[1]), bool))
    np.testing.assert_array_equal(free, plain)


def test_a_mask_wider_than_the_new_positions_hides_older_ones(layer):
    """The newest 5 slots are 3 older and 2 new ones; slot 1 is hidden from the first of the new."""
    module, params, x = layer
    _, aux = module.apply(params, x[:, :EARLIER], cache=module.init_cache(D, 2, 12))
    visible = jnp.ones((1, 2, 5), bool).at[0, 0, 1].set(False)
    places = jnp.asarray([[3, 4]])
    y, _ = module.apply(params, x[:, 3:5], places, cache=aux.cache, visible=visible)
    want, _ = module.apply(params, x[:, [0, 2, 3]], jnp.asarray([[0, 2, 3]]))
    np.testing.assert_allclose(y[:, 0], want[:, -1], atol=1e-6)
    whole, _ = module.apply(params, x[:, :5])
    np.testing.assert_allclose(y[:, 1], whole[:, -1], atol=1e-6)
