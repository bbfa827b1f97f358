"""Packed slots against attention over everything dequantised, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp_kernels.decode_attention import packed
from dyncomp_kernels.decode_attention.packed import packed_attention
from dyncomp_kernels.decode_attention.packing import (
    Packed,
    from_bytes,
    pack,
    row_bytes,
    to_bytes,
    unpack,
)
from dyncomp_kernels.decode_attention.reference import packed_attention_reference

B, G, P = 2, 3, 16


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_is_exact_and_as_small_as_it_says(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 5, 32)).astype(np.uint8)
    small = pack(jnp.asarray(codes), bits)
    assert small.dtype == jnp.uint8 and small.shape == (3, 5, 4 * bits)
    assert row_bytes(32, bits) == 4 * bits
    np.testing.assert_array_equal(unpack(small, bits), codes)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_floats_come_back_from_bytes(dtype):
    x = jax.random.normal(jax.random.key(0), (2, 3, 8)).astype(dtype)
    assert to_bytes(x).shape == (2, 3, 8 * jnp.dtype(dtype).itemsize)
    np.testing.assert_array_equal(from_bytes(to_bytes(x), dtype), x)


def test_widths_that_fill_no_bytes_are_refused():
    with pytest.raises(ValueError, match="multiple of 8"):
        row_bytes(12, 3)
    with pytest.raises(ValueError, match="1 to 8"):
        pack(jnp.zeros((8,), jnp.uint8), 9)


def case(seed, bits, m=37, t=1, h=6):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.random(shape), jnp.float32)
    codes = lambda: pack(jnp.asarray(rng.integers(0, 2**bits, (B, G, m, P)).astype(np.uint8)), bits)
    one = jnp.ones((1, 1, 1, 1), jnp.float32)
    keys = Packed(codes(), draw(B, G, 1, P) - 0.7, draw(B, G, 1, P) / 2**bits, one, bits)
    values = Packed(
        codes(), draw(B, 1, m, 1) - 0.5, draw(B, 1, m, 1) / 2**bits, 1 + draw(B, G, 1, P), bits
    )
    q = jnp.asarray(rng.normal(size=(B, t, h, P)), jnp.float32)
    return q, keys, values, jnp.asarray(rng.random((B, m)) < 0.7)


def in_float64(q, keys, values, seen):
    with jax.enable_x64(True):
        wide = lambda x: (
            jnp.asarray(np.asarray(x), jnp.float64) if x.dtype == jnp.float32 else jnp.asarray(x)
        )
        own = jax.tree.map(wide, (q, keys, values))
        return [np.asarray(x) for x in packed_attention_reference(*own, seen)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("t", "h"), [(1, 6), (3, 3)])
@pytest.mark.parametrize("block", [256, 8])
def test_equals_the_dequantised_form(monkeypatch, bits, t, h, block):
    monkeypatch.setattr(packed, "BLOCK", block)
    args = case(0, bits, t=t, h=h)
    got, lse = packed_attention(*args)
    want, sums = in_float64(*args)
    np.testing.assert_allclose(got, want, atol=3e-6)
    np.testing.assert_allclose(lse, sums, atol=3e-6)


def test_queries_may_see_different_slots():
    q, keys, values, _ = case(1, 4, t=3)
    seen = jnp.asarray(np.random.default_rng(5).random((B, 3, 37)) < 0.5)
    got, lse = packed_attention(q, keys, values, seen)
    want, sums = in_float64(q, keys, values, seen)
    np.testing.assert_allclose(got, want, atol=3e-6)
    np.testing.assert_allclose(lse, sums, atol=3e-6)


def test_plain_floats_are_a_case_of_it():
    q, keys, values, seen = case(2, 8)
    plain = Packed.plain(keys.whole()), Packed.plain(values.whole())
    for got, want in zip(
        packed_attention(q, *plain, seen), packed_attention(q, keys, values, seen), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=3e-6)


def test_nothing_seen_gives_zeros():
    q, keys, values, seen = case(3, 4)
    got, lse = packed_attention(q, keys, values, seen.at[0].set(False))
    assert not got[0].any() and np.all(np.isneginf(lse[0])) and np.all(np.isfinite(lse[1]))


@pytest.mark.parametrize(("begin", "end"), [(0, 9), (20, 37), (0, 0)])
def test_only_blocks_in_between_are_read(monkeypatch, begin, end):
    """Slots outside are poisoned; the bounds are run-time values of one program."""
    monkeypatch.setattr(packed, "BLOCK", 4)
    q, keys, values, _ = case(4, 4)
    seen = jnp.broadcast_to((jnp.arange(37) >= begin) & (jnp.arange(37) < end), (B, 37))
    edge = slice(begin // 4 * 4, -(-end // 4) * 4) if end else slice(0, 0)
    inside = np.zeros(37, bool)
    inside[edge] = True
    poisoned = jnp.where(jnp.asarray(inside)[None, None, :, None], values.step, jnp.nan)
    bad = Packed(values.codes, values.low, poisoned, values.scale, values.bits)
    call = jax.jit(functools.partial(packed_attention))
    got, _ = call(q, keys, bad, seen, jnp.int32(begin), jnp.int32(end))
    want, _ = in_float64(q, keys, values, seen)
    np.testing.assert_allclose(got, want, atol=3e-6)


def test_bad_shapes_are_refused():
    q, keys, values, seen = case(5, 4)
    with pytest.raises(ValueError, match="divisor"):
        packed_attention(q[:, :, :5], keys, values, seen)
    with pytest.raises(ValueError, match="b t m"):
        packed_attention(q, keys, values, seen[:, :5])
