"""The cache: decoding equals the full forward pass, padding stays hidden, overflow is never silent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dyncomp.attention import Attention, FullCache, keep_slots, truncate
from dyncomp.attention.cache import by_token
from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError

B, T, D = 2, 7, 8


@pytest.fixture
def layer():
    module = Attention(heads=4, kv_heads=2, rope_theta=50.0)
    x = jax.random.normal(jax.random.key(0), (B, T, D))
    return module, nn.unbox(jax.jit(module.init)(jax.random.key(1), x)), x


@pytest.mark.parametrize("prefill", [1, 4, 7])
def test_prefill_and_decode_equal_full(layer, prefill):
    module, params, x = layer
    full, _ = module.apply(params, x)
    y, aux = module.apply(params, x[:, :prefill], cache=module.init_cache(D, B, 9))
    outputs = [y]
    for place in range(prefill, T):
        y, aux = module.apply(params, x[:, place : place + 1], cache=aux.cache)
        outputs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), full, rtol=1e-5, atol=1e-6)
    assert int(aux.cache.length) == T


def test_left_padded_prompts(layer):
    """Ragged prompts, padded on the left: the continuation is that of the bare prompt (RoPE is relative)."""
    module, params, x = layer
    mask = jnp.asarray([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], jnp.float32)
    _, aux = module.apply(params, x[:, :5], mask=mask, cache=module.init_cache(D, B, 9))
    y, aux = module.apply(params, x[:, 5:6], cache=aux.cache)
    bare, _ = module.apply(params, x[:1, 2:6])
    np.testing.assert_allclose(y[0, 0], bare[0, -1], rtol=1e-4, atol=1e-5)
    needed, executed = aux.events["pairs"].needed, aux.events["pairs"].executed
    assert (int(needed), int(executed)) == (4 + 6, B * 9)


def test_long_prompt_is_refused(layer):
    module, params, x = layer
    with pytest.raises(DyncompError, match="raise max_length"):
        module.apply(params, x, cache=module.init_cache(D, B, T - 1))


def test_decoding_past_the_end_gives_nan(layer):
    module, params, x = layer
    y, aux = module.apply(params, x, cache=module.init_cache(D, B, T))
    assert np.isfinite(y).all()
    y, _ = module.apply(params, x[:, :1], cache=aux.cache)
    assert np.isnan(y).all()


def test_bad_policy():
    with pytest.raises(DyncompError, match="at least 1"):
        FullCache(max_length=0)


def test_state_is_a_pytree_that_can_be_donated(layer, counting_jit):
    module, params, x = layer
    step, traces = counting_jit(
        lambda c, x: module.apply(params, x, cache=c)[1].cache, donate_argnums=0
    )
    cache = module.init_cache(D, B, 9)
    for place in range(3):
        cache = step(cache, x[:, place : place + 1])
    assert len(traces) == 1
    np.testing.assert_array_equal(cache.positions[0], [0, 1, 2] + [-1] * 6)


def filled(rows=2, slots=6, used=5):
    """A cache whose slot i of row r holds 10 r + i."""
    policy = FullCache(max_length=slots)
    values = (10 * jnp.arange(rows)[:, None] + jnp.arange(used)).astype(jnp.float32)
    state, *_ = policy.extend(
        policy.init(rows, 1, 1), values[:, :, None, None], values[:, :, None, None]
    )
    return state


def test_truncating_one_length_or_one_for_each_row():
    assert truncate(filled(), jnp.int32(3)).positions.tolist() == [[0, 1, 2, -1, -1, -1]] * 2
    each = truncate(filled(), jnp.asarray([1, 3]))
    assert each.positions.tolist() == [[0, -1, -1, -1, -1, -1], [0, 1, 2, -1, -1, -1]]
    assert int(each.length) == 3


def test_kept_slots_move_together():
    """Of slots 1..4, row 0 keeps the 1st and 4th, row 1 the 3rd alone."""
    state = keep_slots(filled(), jnp.int32(1), jnp.asarray([[0, 3, -1], [2, -1, -1]]))
    assert state.positions.tolist() == [[0, 1, 2, -1, -1, -1], [0, 1, -1, -1, -1, -1]]
    assert int(state.length) == 3
    for held in by_token(state.keys, state.values):
        assert held[0, :3, 0, 0].tolist() == [0.0, 1.0, 4.0]
        assert held[1, :2, 0, 0].tolist() == [10.0, 13.0]


def test_a_bfloat16_cache_of_few_slots():
    """CPUs have no product of bfloat16 matrices for every layout."""
    module = Attention(heads=4, kv_heads=2, dtypes=DTypes(param="bfloat16", compute="bfloat16"))
    x = jax.random.normal(jax.random.key(0), (2, 6, 16), jnp.bfloat16)
    variables = jax.jit(module.init)(jax.random.key(1), x)
    call = jax.jit(lambda x, cache: module.apply(variables, x, cache=cache))
    _, aux = call(x[:, :5], module.init_cache(16, 2, 8))
    y, _ = call(x[:, 5:], aux.cache)
    whole, _ = module.apply(variables, x)
    np.testing.assert_allclose(
        np.float32(y[:, 0]), np.float32(whole[:, 5]), atol=2e-2 * float(jnp.max(jnp.abs(whole)))
    )
