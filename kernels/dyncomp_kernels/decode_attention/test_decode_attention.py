"""Listed slots against dense attention under the mask that the list stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp_kernels.decode_attention.api import decode_attention
from dyncomp_kernels.decode_attention.reference import decode_attention_reference


def case(seed, b=2, h=6, g=3, s=19, p=8, lists=1, m=7, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    q, k, v = (
        jnp.asarray(rng.normal(size=shape), dtype)
        for shape in ((b, h, p), (b, s, g, p), (b, s, g, p))
    )
    index = np.stack([rng.permutation(s)[:m] for _ in range(b * lists)]).reshape(b, lists, m)
    seen = rng.random((b, lists, m)) < 0.7
    return q, k, v, jnp.asarray(index, jnp.int32), jnp.asarray(seen)


@pytest.mark.parametrize("lists", [1, 3])
@pytest.mark.parametrize("heads", [(6, 3), (3, 3)])
def test_equals_the_masked_dense_form(lists, heads):
    q, k, v, index, seen = case(0, h=heads[0], lists=lists)
    got, lse = decode_attention(q, k, v, index, seen)
    with jax.enable_x64(True):
        wide = (jnp.asarray(np.asarray(x), jnp.float64) for x in (q, k, v))
        want, sums = decode_attention_reference(*wide, index, seen)
        want, sums = np.asarray(want), np.asarray(sums)
    np.testing.assert_allclose(got, want, atol=2e-6)
    np.testing.assert_allclose(lse, sums, atol=2e-6)


def test_nothing_listed_gives_zeros():
    q, k, v, index, seen = case(1)
    seen = seen.at[0].set(False)
    got, lse = decode_attention(q, k, v, index, seen)
    assert not got[0].any() and np.all(np.isneginf(lse[0])) and np.all(np.isfinite(lse[1]))


def test_unlisted_slots_are_never_read():
    q, k, v, index, seen = case(2, m=4)
    listed = np.zeros(k.shape[:2], bool)
    for row in range(2):
        listed[row, np.asarray(index[row, 0])] = True
    poison = lambda x: jnp.where(jnp.asarray(listed)[:, :, None, None], x, jnp.nan)
    got, _ = decode_attention(q, poison(k), poison(v), index, seen)
    want, _ = decode_attention(q, k, v, index, seen)
    np.testing.assert_array_equal(got, want)


def test_bfloat16_stays_close():
    q, k, v, index, seen = case(3, dtype=jnp.bfloat16)
    got, _ = decode_attention(q, k, v, index, seen)
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    want, _ = decode_attention_reference(*wide, index, seen)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=3e-2)


def test_bad_shapes_are_refused():
    q, k, v, index, seen = case(4)
    with pytest.raises(ValueError, match="divisor"):
        decode_attention(q[:, :5], k, v, index, seen)
    with pytest.raises(ValueError, match="b 1 m"):
        decode_attention(q, k, v, jnp.repeat(index, 2, axis=1), jnp.repeat(seen, 2, axis=1))
