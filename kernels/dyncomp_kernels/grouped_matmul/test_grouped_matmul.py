import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dyncomp_kernels.grouped_matmul import xla
from dyncomp_kernels.grouped_matmul.api import explain, grouped_matmul
from dyncomp_kernels.grouped_matmul.cases import SMALL, Case

FORMS = [None, "xla", "ragged", "reference"]


def problem(case: Case, dtype="float32"):
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(case.m, case.k)).astype(np.float32)
    weights = rng.normal(size=(len(case.sizes), case.k, case.n)).astype(np.float32)
    sizes = np.asarray(case.sizes, np.int32)
    return jnp.asarray(rows, dtype), jnp.asarray(weights, dtype), jnp.asarray(sizes)


def by_hand(rows, weights, sizes, cotangent):
    """Value and gradients in float64, group by group."""
    rows, weights, cotangent = (np.asarray(a, np.float64) for a in (rows, weights, cotangent))
    out, d_rows, d_weights = np.zeros_like(cotangent), np.zeros_like(rows), np.zeros_like(weights)
    begin = 0
    for group, size in enumerate(np.asarray(sizes)):
        own = slice(begin, begin + size)
        out[own] = rows[own] @ weights[group]
        d_rows[own] = cotangent[own] @ weights[group].T
        d_weights[group] = rows[own].T @ cotangent[own]
        begin += size
    return out, d_rows, d_weights


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_value_and_gradients(case, form, dtype, tolerance):
    rows, weights, sizes = problem(case, dtype)
    cotangent = jnp.asarray(np.random.default_rng(2).normal(size=(case.m, case.n)), dtype)
    fn = lambda r, w: grouped_matmul(r, w, sizes, implementation=form)
    out, pull = jax.vjp(fn, rows, weights)
    expected = by_hand(rows, weights, sizes, cotangent)
    for ours, exact in zip((out, *pull(cotangent)), expected, strict=True):
        scale = max(1.0, np.abs(exact).max(initial=0.0))
        np.testing.assert_allclose(np.asarray(ours, np.float64), exact, atol=tolerance * scale)


@pytest.mark.parametrize("form", ["xla", "ragged"])
def test_every_pattern_of_empty_groups(form):
    rows, weights, _ = problem(Case("patterns", 80, 3, 2, (0,) * 4))
    fn = jax.jit(lambda sizes: grouped_matmul(rows, weights, sizes, implementation=form))
    for pattern in range(16):
        sizes = np.array([17 + g if pattern >> g & 1 else 0 for g in range(4)], np.int32)
        expected, _, _ = by_hand(rows, weights, sizes, np.zeros((80, 2)))
        np.testing.assert_allclose(fn(jnp.asarray(sizes)), expected, atol=1e-5)


def test_finite_differences():
    rows, weights, sizes = problem(SMALL[4])
    fn = lambda r, w: jnp.sin(grouped_matmul(jnp.asarray(r), jnp.asarray(w), sizes))
    check_grads(fn, (rows, weights), order=1, modes=["rev"], atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_executed_rows_are_whole_blocks(case):
    block = xla.block_rows(case.m, len(case.sizes))
    expected = sum(-(-size // block) * block for size in case.sizes)
    sizes = jnp.asarray(case.sizes, jnp.int32)
    assert int(xla.executed_rows(sizes, case.m)) == expected
    _, _, used = xla.block_table(sizes, block, -(-case.m // block) + len(case.sizes))
    assert int(used) * block == expected


def test_refuses_what_does_not_fit():
    rows, weights, sizes = problem(SMALL[0])
    with pytest.raises(ValueError, match="cast one"):
        grouped_matmul(rows.astype(jnp.bfloat16), weights, sizes)
    with pytest.raises(ValueError, match="shapes disagree"):
        grouped_matmul(rows, weights[:3], sizes)
    half = rows.astype(jnp.float16), weights.astype(jnp.float16)
    with pytest.raises(ValueError, match="ragged takes"):
        grouped_matmul(*half, sizes, implementation="ragged")
    assert "ragged takes" in explain(*half, sizes)["tpu"]
    assert explain(rows, weights, sizes)["tpu"] == "ragged serves"


@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 simulated devices")
def test_inside_shard_map():
    case = SMALL[4]
    rows, weights, sizes = problem(case)
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=auto)
    spec = jax.sharding.PartitionSpec("data")
    many = jnp.concatenate([rows * (i + 1) for i in range(4)])
    body = lambda r, w, s: grouped_matmul(r, w[0], s)
    fn = jax.shard_map(body, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec)
    loss = lambda r, w: jnp.sum(jnp.square(fn(r, w, jnp.tile(sizes, 4))))
    stacked = jnp.stack([weights] * 4)
    d_rows, d_weights = jax.jit(jax.grad(loss, (0, 1)))(many, stacked)
    for i in range(4):
        part = np.asarray(rows) * (i + 1)
        out, _, _ = by_hand(part, weights, sizes, np.zeros((case.m, case.n)))
        _, expected_rows, expected_weights = by_hand(part, weights, sizes, 2 * out)
        own = d_rows[i * case.m : (i + 1) * case.m]
        np.testing.assert_allclose(own, expected_rows, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(d_weights[i], expected_weights, rtol=1e-4, atol=1e-2)
