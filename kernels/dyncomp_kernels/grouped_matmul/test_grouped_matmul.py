import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dyncomp_kernels.grouped_matmul import bench, blocks, xla
from dyncomp_kernels.grouped_matmul.api import explain, grouped_matmul
from dyncomp_kernels.grouped_matmul.cases import LANES, SMALL, Case, dirichlet4
from dyncomp_kernels.grouped_matmul.selfcheck import flop_ratios

FORMS = [None, "xla", "ragged", "pallas", "reference"]
MIXED = (
    Case("uneven", 700, 6, 5, (3, 0, 180, 97, 0, 1, 350, 60)),
    Case("dirichlet4", 512, 6, 5, dirichlet4(512, 4)),
    Case("many_small", 200, 6, 5, dirichlet4(150, 40)),
)
"""Whole blocks, last blocks of several sizes, blocks that would reach past the last row."""


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


TABLE = [(form, case) for form in ("xla", "ragged", "reference") for case in SMALL]
TABLE += [("xla", case) for case in MIXED] + [("pallas", case) for case in LANES]
TABLE += [(None, SMALL[4]), (None, LANES[1])]


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("form, case", TABLE, ids=lambda x: getattr(x, "name", str(x)))
def test_value_and_gradients(form, case, dtype, tolerance):
    rows, weights, sizes = problem(case, dtype)
    cotangent = jnp.asarray(np.random.default_rng(2).normal(size=(case.m, case.n)), dtype)
    exact = by_hand(rows, weights, sizes, cotangent)
    for ours, expected in zip(both(form)(rows, weights, sizes, cotangent), exact, strict=True):
        scale = max(1.0, np.abs(expected).max(initial=0.0))
        np.testing.assert_allclose(np.asarray(ours, np.float64), expected, atol=tolerance * scale)


@functools.cache
def both(form):
    """Value and both gradients by one form."""

    @jax.jit
    def run(rows, weights, sizes, cotangent):
        fn = lambda r, w: grouped_matmul(r, w, sizes, implementation=form)
        out, pull = jax.vjp(fn, rows, weights)
        return out, *pull(cotangent)

    return run


PATTERNS = [("xla", 6, 5, 24), ("ragged", 6, 5, 24), ("pallas", 128, 128, 24)]


@pytest.mark.parametrize("form, k, n, most", PATTERNS)
def test_every_pattern_of_empty_groups(form, k, n, most):
    """All 2^8 ways in which groups can be empty, value and both gradients, with unused rows at the end."""
    rows, weights, _ = problem(Case("patterns", 8 * most + 9, k, n, (0,) * 8))
    cotangent = jnp.asarray(np.random.default_rng(2).normal(size=(len(rows), n)), "float32")

    run = lambda sizes: both(form)(rows, weights, sizes, cotangent)
    for pattern in range(256):
        sizes = np.array([most - 3 * g if pattern >> g & 1 else 0 for g in range(8)], np.int32)
        exact = by_hand(rows, weights, sizes, cotangent)
        for ours, expected in zip(run(jnp.asarray(sizes)), exact, strict=True):
            np.testing.assert_allclose(ours, expected, atol=1e-3)


@pytest.mark.parametrize("form", ["xla", "ragged", "pallas"])
def test_rows_of_no_group_never_matter(form):
    case = Case("garbage", 300, 128, 128, (70, 0, 90))
    rows, weights, sizes = problem(case)
    cotangent = jnp.asarray(np.random.default_rng(2).normal(size=(case.m, case.n)), "float32")
    exact = by_hand(rows, weights, sizes, cotangent)
    rows, cotangent = rows.at[160:].set(jnp.nan), cotangent.at[160:].set(jnp.nan)
    out, pull = jax.vjp(
        lambda r, w: grouped_matmul(r, w, sizes, implementation=form), rows, weights
    )
    for ours, expected in zip((out, *pull(cotangent)), exact, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-3)


def test_finite_differences():
    rows, weights, sizes = problem(SMALL[4])
    fn = lambda r, w: jnp.sin(grouped_matmul(jnp.asarray(r), jnp.asarray(w), sizes))
    check_grads(jax.jit(fn), (rows, weights), order=1, modes=["rev"], atol=3e-2, rtol=3e-2)


def blocks_by_hand(sizes, block_sizes):
    """(first row, row after the last own one, block size) of every block, group by group."""
    found, begin, top = [], 0, block_sizes[-1]
    for size in sizes:
        left, start = size, begin
        while left > top:
            found.append((start, start + top, top))
            left, start = left - top, start + top
        if left:
            found.append((start, start + left, min(b for b in block_sizes if b >= left)))
        begin += size
    return found


@pytest.mark.parametrize("case", SMALL + MIXED, ids=lambda case: case.name)
def test_executed_rows_and_blocks_are_exact(case):
    if not case.m:
        assert int(xla.executed_rows(jnp.zeros(4, jnp.int32), 0)) == 0
        return
    sizes = jnp.asarray(case.sizes, jnp.int32)
    expected = blocks_by_hand(case.sizes, blocks.block_sizes(case.m, len(case.sizes)))
    assert int(xla.executed_rows(sizes, case.m)) == sum(block for _, _, block in expected)
    assert sum(size * int(n) for size, n in xla.trips(sizes, case.m)) == sum(
        b for *_, b in expected
    )
    found = [
        (int(sweep.start[i]), int(sweep.end[i]), sweep.block)
        for sweep in blocks.sweeps(sizes, case.m)
        for i in range(int(sweep.begin), int(sweep.stop))
    ]
    assert sorted(found) == sorted(expected)


def test_blocks_follow_the_groups():
    """Large groups get large blocks; on an uneven load padding stays near an eighth of the rows, or less."""
    assert blocks.block_sizes(8192, 8) == tuple(range(32, 385, 32))
    assert blocks.block_sizes(8192, 64) == (32, 64, 96, 128, 160, 192)
    assert blocks.block_sizes(64, 8) == (16,) and blocks.block_sizes(3, 8) == (3,)
    for groups, share in ((8, 1.05), (32, 1.15), (64, 1.15)):
        sizes = jnp.asarray(dirichlet4(8192, groups), jnp.int32)
        assert int(xla.executed_rows(sizes, 8192)) < share * 8192


def test_self_check_warns_of_a_dense_fallback():
    """On a CPU ragged_dot multiplies every row with every matrix."""
    rows, weights, sizes = problem(Case("even", 512, 64, 64, (128,) * 4))
    with pytest.warns(UserWarning) as said:
        ratios = flop_ratios(rows, weights, sizes, implementation="ragged")
    assert len(said) == 3 and "forward on cpu: 4" in str(said[0].message)
    assert min(ratios.values()) > 3.9
    assert flop_ratios(rows, weights, sizes) == dict.fromkeys(ratios, 1.0)


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
    assert "pallas takes k and n in multiples" in explain(rows, weights, sizes)["tpu"]
    wide = problem(LANES[0])
    assert explain(*wide)["tpu"] == "pallas serves" and "cuda" in explain(*wide)
    with pytest.raises(ValueError, match="pallas takes k and n"):
        grouped_matmul(rows, weights, sizes, implementation="pallas")


@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 simulated devices")
@pytest.mark.parametrize("case", [SMALL[4], LANES[1]], ids=lambda case: case.name)
def test_inside_shard_map(case):
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
        for ours, exact in ((own, expected_rows), (d_weights[i], expected_weights)):
            np.testing.assert_allclose(ours, exact, atol=1e-5 * np.abs(exact).max())


def test_quick_benchmark_has_a_row_for_every_contestant():
    found = {row["id"]: row for row in bench.rows(quick=True)}
    for load in ("even", "dirichlet4", "one_hot"):
        for part in ("forward", "forward_backward"):
            for contestant in ("ours", "capacity"):
                assert found[f"grouped_matmul/{load}/8/{part}/{contestant}"]["ratio"] > 0
    assert found["grouped_matmul/even/8/forward/ours"]["executed"] == 1.0
