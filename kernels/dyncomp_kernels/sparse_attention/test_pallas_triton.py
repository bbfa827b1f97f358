"""The GPU kernels without a GPU: interpreted against float64, and lowered for CUDA (not compiled, not run)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp_kernels.sparse_attention import pallas_triton, xla
from dyncomp_kernels.sparse_attention.api import explain, sparse_attention
from dyncomp_kernels.sparse_attention.lists import BlockLists, causal_lists
from dyncomp_kernels.sparse_attention.test_sparse_attention import (
    CASES,
    B,
    P,
    drawn,
    random_lists,
    truth,
)
from dyncomp_kernels.sparse_attention.xla import Seeing


def problem(case):
    t, s, h, g, a, rows, columns, _, padded = case
    lists = random_lists(t, s, a, rows, columns)
    real = jnp.asarray(np.random.default_rng(3).random((B, s)) < 0.7) if padded else None
    return drawn(t, s, h, g), lists, max(s - t, 0), real


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_definition(case):
    arrays, lists, offset, real = problem(case)
    half = [jnp.asarray(x, jnp.float32) for x in arrays]
    args = *half, lists, jnp.int32(offset), real, Seeing(case[7])
    out, lse = pallas_triton.forward(*args, interpret=True)
    want, want_lse = truth(*arrays, lists, case[7], offset, real)
    np.testing.assert_allclose(out, want, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, atol=2e-6)
    assert not np.asarray(out)[~np.isfinite(want_lse)].any()


@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[3]], ids=str)
def test_gradients_equal_those_of_the_portable_form(case):
    """Which has them checked against float64."""
    arrays, lists, offset, real = problem(case)
    half = [jnp.asarray(x, jnp.float32) for x in arrays]
    seeing, start = Seeing(case[7], window=9, sink=2), jnp.int32(offset)
    saved = *half, *xla.forward(*half, lists, start, real, seeing)
    rng = np.random.default_rng(5)
    given = [rng.normal(size=(B, case[0], case[2], *end)) for end in ((P,), ())]
    args = saved, lists, start, real, *(jnp.asarray(x, jnp.float32) for x in given), seeing
    found = pallas_triton.backward(*args, interpret=True)
    for own, other in zip(found, xla.backward(*args), strict=True):
        np.testing.assert_allclose(own, other, atol=1e-5)


def shapes(p=128, rows=128, dtype="bfloat16"):
    make = lambda heads: jax.ShapeDtypeStruct((1, 1024, heads, p), dtype)
    return make(8), make(2), make(2), causal_lists(1024, 1024, rows, rows)


def both(q, k, v, lists):
    attend = lambda q, k, v: sparse_attention(q, k, v, lists, implementation="triton")[0]
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(out)


@pytest.mark.parametrize("p", [64, 128])
def test_lowers_for_cuda_without_one(p):
    export = jax.export.export(jax.jit(both), platforms=["cuda"], disabled_checks=CHECKS)
    with jax.sharding.use_abstract_mesh(H100):
        text = export(*shapes(p)).mlir_module()
    for name in ("forward", "query_gradient", "key_gradients"):
        assert f"sparse_attention_{name}" in text


H100 = jax.sharding.AbstractMesh(
    (), (), abstract_device=jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
)  # from jax 0.11 on, Pallas asks which GPU
CHECKS = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]


def test_says_what_fits_and_refuses_the_rest():
    q, k, _, lists = shapes()
    assert explain(q, k, lists)["cuda"].startswith("triton serves")
    assert "takes bfloat16" in explain(*shapes(dtype="float32")[:2], lists)["cuda"]
    assert "heads of 64" in explain(*shapes(p=80)[:2], lists)["cuda"]
    assert "multiples of 16" in explain(q, k, shapes(rows=8)[3])["cuda"]
    spans = BlockLists(lists.index, lists.count, 128, 128, unit=1)
    assert "not spans" in explain(q, k, spans)["cuda"]
    with pytest.raises(ValueError, match="takes bfloat16"):
        sparse_attention(*(jnp.ones((1, 1024, 2, 64)),) * 3, lists, implementation="triton")
