import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from jax.test_util import check_grads

from dyncomp_kernels.grouped_matmul.cases import SMALL, Case, dirichlet4
from dyncomp_kernels.grouped_swiglu import reference
from dyncomp_kernels.grouped_swiglu.api import composed, grouped_swiglu

MIXED = (
    Case("uneven", 700, 6, 5, (3, 0, 180, 97, 0, 1, 350, 60)),
    Case("many_small", 200, 6, 5, dirichlet4(150, 40)),
)
NAMES = ("out", "rows", "gate", "up", "down")


def problem(case: Case, dtype="float32"):
    """Rows, three weights, sizes, cotangent."""
    rng, e = np.random.default_rng(1), len(case.sizes)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    m, d, f = case.m, case.k, case.n
    return (
        draw(m, d), draw(e, d, f), draw(e, d, f), draw(e, f, d),
        jnp.asarray(case.sizes, jnp.int32), draw(m, d),
    )  # fmt: skip


def by_hand(rows, gate, up, down, sizes, dy):
    """Value and gradients in float64, group by group, by the chain rule."""
    rows, gate, up, down, dy = (np.asarray(a, np.float64) for a in (rows, gate, up, down, dy))
    out, grads, begin = np.zeros_like(dy), [np.zeros_like(a) for a in (rows, gate, up, down)], 0
    for g, size in enumerate(np.asarray(sizes)):
        own = slice(begin, begin + size)
        begin += size
        x, a, b = rows[own], rows[own] @ gate[g], rows[own] @ up[g]
        s = 1 / (1 + np.exp(-a))
        out[own] = (a * s * b) @ down[g]
        dh = dy[own] @ down[g].T
        da, db = dh * b * s * (1 + a * (1 - s)), dh * a * s
        grads[0][own] = da @ gate[g].T + db @ up[g].T
        grads[1][g], grads[2][g], grads[3][g] = x.T @ da, x.T @ db, (a * s * b).T @ dy[own]
    return out, *grads


@functools.cache
def both(fn):
    @jax.jit
    def run(rows, gate, up, down, sizes, dy):
        out, pull = jax.vjp(lambda *a: fn(*a, sizes), rows, gate, up, down)
        return out, *pull(dy)

    return run


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("case", [*SMALL, *MIXED], ids=lambda case: case.name)
@pytest.mark.parametrize("fn", [grouped_swiglu, composed])
def test_value_and_gradients(fn, case, dtype, tolerance):
    given = problem(case, dtype)
    for name, ours, exact in zip(NAMES, both(fn)(*given), by_hand(*given), strict=True):
        scale = max(1.0, np.abs(exact).max(initial=0.0))
        np.testing.assert_allclose(
            np.asarray(ours, np.float64), exact, atol=tolerance * scale, err_msg=name
        )


@pytest.mark.parametrize("case", SMALL[:5], ids=lambda case: case.name)
def test_the_reference_is_the_definition(case):
    given = problem(case)
    np.testing.assert_allclose(reference.grouped_swiglu(*given[:5]), by_hand(*given)[0], atol=1e-4)


def test_every_pattern_of_empty_groups():
    """All 2^8 ways in which groups can be empty, with unused rows at the end."""
    most, run = 24, both(grouped_swiglu)
    given = problem(Case("patterns", 8 * most + 9, 6, 5, (0,) * 8))
    rng = np.random.default_rng(0)
    for pattern in range(256):
        sizes = [int(rng.integers(1, most)) if pattern >> g & 1 else 0 for g in range(8)]
        given = (*given[:4], jnp.asarray(sizes, jnp.int32), given[5])
        for ours, exact in zip(run(*given), by_hand(*given), strict=True):
            np.testing.assert_allclose(ours, exact, atol=1e-3, err_msg=str(sizes))


def test_rows_of_no_group_reach_nothing():
    rows, *weights, sizes, dy = problem(SMALL[4])
    used = int(sizes.sum())
    poisoned = rows.at[used:].set(jnp.nan), *weights, sizes, dy.at[used:].set(jnp.nan)
    clean = both(grouped_swiglu)(rows, *weights, sizes, dy)
    for ours, expected in zip(both(grouped_swiglu)(*poisoned), clean, strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_finite_differences():
    rows, gate, up, down, sizes, _ = problem(SMALL[1])
    fn = jax.jit(lambda *a: grouped_swiglu(*a, sizes))
    check_grads(fn, (rows, gate, up, down), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 simulated devices")
def test_inside_shard_map():
    """Four devices with rows and weights of their own: value and gradients of each as alone."""
    given = [problem(SMALL[1])[:4] for _ in range(4)]
    given = [tuple(x * (i + 1) for x in own) for i, own in enumerate(given)]
    sizes, dy = problem(SMALL[1])[4:]
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=auto)
    spec = PartitionSpec("data")
    body = lambda *a: tuple(x[None] for x in both(grouped_swiglu)(*(x[0] for x in a)))
    fn = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(spec,) * 6, out_specs=spec))
    stacked = [jnp.stack(x) for x in zip(*[(*own, sizes, dy) for own in given], strict=True)]
    found = fn(*stacked)
    for i, own in enumerate(given):
        for ours, alone in zip(found, both(grouped_swiglu)(*own, sizes, dy), strict=True):
            np.testing.assert_allclose(ours[i], alone, rtol=1e-5, atol=1e-4)


def test_bad_arguments():
    rows, gate, up, down, sizes, _ = problem(SMALL[0])
    with pytest.raises(ValueError, match="up is float32.* must be"):
        grouped_swiglu(rows, gate, up[:2], down, sizes)
    with pytest.raises(ValueError, match="group_sizes"):
        grouped_swiglu(rows, gate, up, down, sizes[:2])
