"""What published models add to attention: windows, scaled RoPE, norms of queries and keys, biases apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dyncomp.attention import Attention, RopeScaling, rope_angles, rotate
from dyncomp.attention.attention import PAIR_BLOCK
from dyncomp.core.errors import DyncompError

B, T, D = 2, 9, 12


def make(**fields):
    module = Attention(heads=4, kv_heads=2, head_dim=4, rope_theta=50.0, **fields)
    x = jax.random.normal(jax.random.key(0), (B, T, D))
    return module, nn.unbox(jax.jit(module.init)(jax.random.key(1), x)), x


def pairs(aux):
    """Needed and executed pairs."""
    events = aux.events
    total = lambda kind: (
        int(getattr(events["pair_blocks"], kind)) * PAIR_BLOCK + int(getattr(events["pairs"], kind))
    )
    return total("needed"), total("executed")


def test_a_window_is_the_last_positions(strict):
    """Position i sees i - w + 1 .. i: the same as running the layer on just these."""
    module, params, x = make(window=3)
    y, _ = module.apply(params, x)
    for i in range(T):
        first = max(0, i - 2)
        part, _ = module.clone(window=None).apply(
            params, x[:, first : i + 1], positions=jnp.arange(first, i + 1)[None]
        )
        np.testing.assert_allclose(y[:, i], part[:, -1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [T, 1000])
def test_a_wide_window_is_none(window):
    module, params, x = make(window=window)
    y, aux = module.apply(params, x)
    z, plain = module.clone(window=None).apply(params, x)
    np.testing.assert_array_equal(y, z)
    assert pairs(aux) == pairs(plain) == (B * T * (T + 1) // 2, B * T * T)


def test_window_pairs_by_hand():
    """Window 3, nine positions: 1 + 2 + 7 * 3 = 24 pairs a sequence."""
    module, params, x = make(window=3)
    _, aux = module.apply(params, x)
    assert pairs(aux) == (B * 24, B * T * T)
    mask = np.ones((B, T))
    mask[0, :4] = 0  # five real ones at the end: 1 + 2 + 3 + 3 + 3
    _, aux = module.apply(params, x, mask=jnp.asarray(mask, jnp.float32))
    assert pairs(aux) == (24 + 12, B * T * T)


def test_window_with_cache_and_padding():
    """Prompts padded on the left, then decoded: outputs and counted pairs as of the whole sequence."""
    module, params, x = make(window=3)
    mask = np.ones((B, T), np.float32)
    mask[0, :2] = 0
    whole, all_at_once = module.apply(params, x, mask=jnp.asarray(mask))
    cache, parts, needed = module.init_cache(D, B, T), [], 0
    for start, stop in ((0, 5), (5, 6), (6, 9)):
        real = jnp.asarray(mask[:, start:stop])
        y, aux = module.apply(params, x[:, start:stop], mask=real, cache=cache)
        cache, needed = aux.cache, needed + pairs(aux)[0]
        parts.append(y)
    np.testing.assert_allclose(
        np.concatenate(parts, axis=1)[mask > 0], whole[mask > 0], rtol=1e-5, atol=1e-6
    )
    assert needed == pairs(all_at_once)[0]


def test_query_and_key_norms(strict):
    """Scale of the projections does not matter any more, that of the norm does."""
    module, params, x = make(qk_norm=True)
    assert params["params"]["q_norm"].shape == (4,)
    y, _ = module.apply(params, x)
    weights = params["params"]
    louder = {"params": {**weights, "q": 5 * weights["q"], "k": 3 * weights["k"]}}
    np.testing.assert_allclose(module.apply(louder, x)[0], y, rtol=1e-4, atol=1e-5)
    sharper = {"params": {**weights, "q_norm": 5 * weights["q_norm"]}}
    assert not np.allclose(module.apply(sharper, x)[0], y, atol=1e-3)


@pytest.mark.parametrize(
    ("bias", "qkv", "expected"),
    [
        (False, None, set()),
        (True, None, {"q_bias", "k_bias", "v_bias", "out_bias"}),
        (False, True, {"q_bias", "k_bias", "v_bias"}),
        (True, False, {"out_bias"}),
    ],
)
def test_biases(bias, qkv, expected):
    _, params, _ = make(bias=bias, qkv_bias=qkv)
    assert {name for name in params["params"] if "bias" in name} == expected


def test_linear_scaling_is_slower_positions(strict):
    slow = rope_angles(jnp.arange(9), 8, 100.0, RopeScaling(kind="linear", factor=4.0))
    np.testing.assert_allclose(slow[8], rope_angles(jnp.arange(9), 8, 100.0)[2], rtol=1e-6)


def test_llama3_scaling_by_hand():
    """Llama 3.1's values: short wavelengths stay, long ones stretch by 8, between them a blend of turns."""
    scaling = RopeScaling(kind="llama3", factor=8.0, original_length=8192)
    divisors = scaling.divisors(128, 5e5)
    wavelength = 2 * np.pi * 5e5 ** (np.arange(64) / 64)
    assert (divisors[wavelength < 8192 / 4] == 1).all()
    np.testing.assert_allclose(divisors[wavelength > 8192], 8)
    middle = np.flatnonzero((wavelength > 8192 / 4) & (wavelength < 8192))
    assert len(middle) > 2
    smooth = (8192 / wavelength[middle] - 1) / 3
    np.testing.assert_allclose(1 / divisors[middle], smooth + (1 - smooth) / 8)


def test_yarn_scaling():
    """The fastest frequencies stay, the slowest stretch; attention gets sharper by 0.1 ln s + 1, squared."""
    scaling = RopeScaling(kind="yarn", factor=4.0, original_length=32768)
    divisors = scaling.divisors(128, 1e6)
    assert divisors[0] == 1 and divisors[-1] == 4 and (np.diff(divisors) >= 0).all()
    turns = 32768 / (2 * np.pi * 1e6 ** (np.arange(64) / 64))
    assert (divisors[turns > 36] == 1).all() and (divisors[turns < 0.8] == 4).all()
    assert scaling.amplitude == pytest.approx(1 + 0.1 * np.log(4))
    x = jax.random.normal(jax.random.key(0), (1, 3, 1, 8))
    angles = rope_angles(jnp.arange(3)[None], 8)
    np.testing.assert_allclose(rotate(x, angles, 1.5), 1.5 * rotate(x, angles), rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"kind": "linear", "factor": 0.5}, "use 1 or more"),
        ({"kind": "linear", "factor": float("nan")}, "use 1 or more"),
        ({"kind": "yarn", "factor": 2.0}, "needs original_length"),
        ({"kind": "llama3", "original_length": 8, "low_freq_factor": 5.0}, "low_freq_factor"),
        ({"kind": "yarn", "original_length": 8, "beta_slow": 64.0}, "beta_slow"),
    ],
)
def test_bad_scaling(fields, match):
    with pytest.raises(DyncompError, match=match):
        RopeScaling(**fields)


@pytest.mark.parametrize("fields", [{"window": 0}, {"window": 3, "causal": False}])
def test_bad_window(fields):
    with pytest.raises(DyncompError, match="window"):
        make(**fields)
