"""The TPU kernels, interpreted on the CPU, against the definition in float64 on the cases of the portable form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp_kernels.sparse_attention import pallas_tpu
from dyncomp_kernels.sparse_attention.api import explain, sparse_attention
from dyncomp_kernels.sparse_attention.lists import BlockLists, a_shape_lists, causal_lists
from dyncomp_kernels.sparse_attention.reference import sparse_attention_reference
from dyncomp_kernels.sparse_attention.test_sparse_attention import (
    CASES,
    B,
    P,
    drawn,
    random_lists,
    truth,
)
from dyncomp_kernels.sparse_attention.tpu_walk import Steps
from dyncomp_kernels.sparse_attention.xla import Seeing

half = lambda *arrays: [jnp.asarray(x, jnp.float32) for x in arrays]


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    """The interpreter takes what hardware does not."""
    monkeypatch.setattr(pallas_tpu, "supports", lambda *_: None)


@functools.cache
def compiled(causal=True, window=None, sink=0):
    call = functools.partial(pallas_tpu.forward, interpret=pallas_tpu.INTERPRETED)
    return jax.jit(functools.partial(call, seeing=Seeing(causal, window, sink)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_definition(case):
    t, s, h, g, a, rows, columns, causal, padded = case
    q, k, v = drawn(t, s, h, g)
    lists = random_lists(t, s, a, rows, columns)
    real = jnp.asarray(np.random.default_rng(3).random((B, s)) < 0.7) if padded else None
    offset = max(s - t, 0)
    out, lse = compiled(causal)(*half(q, k, v), lists, jnp.int32(offset), real)
    want, want_lse = truth(q, k, v, lists, causal, offset, real)
    np.testing.assert_allclose(out, want, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, atol=2e-6)
    assert not np.asarray(out)[~np.isfinite(want_lse)].any()


@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[3], CASES[4]], ids=str)
def test_gradients_equal_those_of_the_definition(case):
    t, s, h, g, a, rows, columns, causal, padded = case
    q, k, v = drawn(t, s, h, g)
    lists = random_lists(t, s, a, rows, columns)
    real = jnp.asarray(np.random.default_rng(3).random((B, s)) < 0.7) if padded else None
    rng, where = np.random.default_rng(5), {"causal": causal, "offset": max(s - t, 0), "real": real}
    d_out, d_lse = rng.normal(size=(B, t, h, P)), rng.normal(size=(B, t, h))

    def loss(attend, d_out, d_lse, *args, **words):
        out, lse = attend(*args, lists, **where, **words)
        return jnp.sum(out * d_out) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0) * d_lse)

    ours = functools.partial(loss, sparse_attention, *half(d_out, d_lse), implementation="pallas")
    found = jax.grad(ours, (0, 1, 2))(*half(q, k, v))
    with jax.enable_x64(True):
        exact = functools.partial(loss, sparse_attention_reference, d_out, d_lse)
        want = jax.grad(exact, (0, 1, 2))(*(jnp.asarray(x, jnp.float64) for x in (q, k, v)))
    for own, other in zip(found, want, strict=True):
        assert np.isfinite(own).all()
        np.testing.assert_allclose(own, other, atol=1e-5)


def test_bfloat16():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in drawn(16, 16, 4, 2))
    lists = random_lists(16, 16, 2, 4, 4)
    out, _ = compiled()(q, k, v, lists, jnp.int32(0), None)
    want, _ = truth(*(np.asarray(x, np.float64) for x in (q, k, v)), lists, True, 0, None)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), want, atol=1e-2)


@pytest.mark.parametrize(("window", "sink"), [(1, 0), (5, 3)])
def test_window_and_sink_are_exact(window, sink):
    t, s, offset = 14, 21, 7
    q, k, v = half(*drawn(t, s, 2, 1))
    lists = a_shape_lists(t, s, 4, 3, window=window, sink=sink, offset=offset)
    found = compiled(True, window, sink)(q, k, v, lists, jnp.int32(offset), None)
    words = {"offset": offset, "window": window, "sink": sink}
    for own, other in zip(found, sparse_attention(q, k, v, lists, **words), strict=True):
        np.testing.assert_allclose(own, other, atol=2e-6)


def test_parts_of_several_blocks_are_computed_in_one_piece():
    """Blocks of 128 keys, lists from none to eleven long: whole steps of 1024 keys, pieces of 512 and single ones."""
    t, s = 384, 1408
    q, k, v = drawn(t, s, 1, 1)
    lists = causal_lists(t, s, 128, 128, offset=s - t)
    count = jnp.asarray([[[11, 0, 9]]], jnp.int32)
    lists = BlockLists(lists.index, count, 128, 128)
    assert Steps.of(128, 11) == Steps(size=128, wide=8, narrow=4)
    out, lse = compiled()(*half(q, k, v), lists, jnp.int32(s - t), None)
    want, want_lse = truth(q, k, v, lists, True, s - t, None)
    np.testing.assert_allclose(out, want, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, atol=4e-6)


def test_says_which_form_serves(monkeypatch):
    monkeypatch.undo()
    lists = causal_lists(256, 256, 128, 128)
    given = lambda p, dtype="bfloat16": [jax.ShapeDtypeStruct((1, 256, 2, p), dtype)] * 2
    assert explain(*given(64), lists)["tpu"] == "pallas serves"
    assert "heads of 64" in explain(*given(80), lists)["tpu"]
    spans = BlockLists(lists.index, lists.count, 128, 128, unit=1)
    assert "not spans" in explain(*given(64), spans)["tpu"]
    assert "multiples of 64" in explain(*given(64), causal_lists(256, 256, 32, 128))["tpu"]
    assert "not float16" in explain(*given(64, "float16"), lists)["tpu"]
    with pytest.raises(ValueError, match="heads of 64"):
        sparse_attention(*(jnp.ones((1, 256, 2, 80)),) * 3, lists, implementation="pallas")
