"""What needs no GPU: tables, refusals, and lowering for CUDA (lowered here, not compiled, not run)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from dyncomp_kernels.grouped_matmul import mosaic_gpu, mosaic_wide
from dyncomp_kernels.grouped_matmul.api import explain, grouped_matmul
from dyncomp_kernels.grouped_matmul.cases import LANES, LARGE, SMALL, Case
from dyncomp_kernels.grouped_matmul.selfcheck import flop_ratios
from dyncomp_kernels.grouped_matmul.test_grouped_matmul import by_hand, problem
from dyncomp_kernels.grouped_matmul.tiles import tiles

try:
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
except ImportError:
    get_races = None

ODD = Case("odd", 301, 128, 256, (3, 0, 150, 1, 97))


def both(rows, weights, sizes, cotangent):
    fn = lambda r, w: grouped_matmul(r, w, sizes, implementation="mosaic_gpu")
    out, pull = jax.vjp(fn, rows, weights)
    return out, *pull(cotangent)


def shapes(case, copies=1):
    make = lambda shape, dtype="bfloat16": jax.ShapeDtypeStruct(
        (copies * shape[0], *shape[1:]), dtype
    )
    e = len(case.sizes)
    rows, weights = make((case.m, case.k)), make((e, case.k, case.n))
    return rows, weights, make((e,), "int32"), make((case.m, case.n))


@pytest.mark.parametrize("case", [*SMALL, *LANES, *LARGE, ODD], ids=lambda case: case.name)
def test_tiles_cover_every_row_once_within_its_group(case):
    found = tiles(jnp.asarray(case.sizes, jnp.int32), case.m, 16)
    owner = np.repeat(np.arange(len(case.sizes) + 1), [*case.sizes, case.m - sum(case.sizes)])
    seen = []
    for at, (group, base, skip, rows, first, many) in enumerate(
        zip(*map(np.asarray, found), strict=True)
    ):
        if rows:
            own = slice(first, first + many)
            assert first <= at < first + many and (found.group[own] == group).all()
            assert base % 8 == 0 and 0 <= skip < 8 and skip + rows <= 16
            at = range(base + skip, base + skip + rows)
            assert set(owner[at]) == {group}
            seen += at
    assert seen == list(range(case.m))


@pytest.mark.parametrize("case", [*LANES, ODD], ids=lambda case: case.name)
def test_lowers_for_cuda_without_one(case):
    text = jax.export.export(jax.jit(both), platforms=["cuda"])(*shapes(case)).mlir_module()
    assert text.count("mosaic_gpu") >= 3
    assert "stablehlo.while" not in text.split("func.func private")[0]  # no portable loop


WIDE = (
    Case("pairs", 301, 256, 512, ODD.sizes),
    Case("no_pairs", 150, 384, 256, (3, 0, 80, 1)),
)


@pytest.mark.skipif(not hasattr(plgpu, "InterpretGPUParams"), reason="from jax 0.11 on")
@pytest.mark.parametrize("name", ["forward", "row_gradient", "weight_gradient"])
@pytest.mark.parametrize("case", WIDE, ids=lambda case: case.name)
def test_wide_kernels_by_the_interpreter(name, case, monkeypatch):
    """In an order that real blocks could take; a copy that may overtake its reader would be called a race."""
    monkeypatch.setattr(mosaic_gpu, "SMS", 4)
    rows, weights, sizes = problem(case, "bfloat16")
    cotangent = jnp.asarray(np.random.default_rng(2).normal(size=(case.m, case.n)), "bfloat16")
    number = ("forward", "row_gradient", "weight_gradient").index(name)
    exact = by_hand(rows, weights, sizes, cotangent)[number]
    unused = slice(sum(case.sizes), None)
    rows, cotangent = rows.at[unused].set(jnp.nan), cotangent.at[unused].set(jnp.nan)
    args = ((rows, weights), (cotangent, weights), (rows, cotangent))[number]
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        found = getattr(mosaic_gpu, name)(*args, sizes)
    np.testing.assert_allclose(
        np.asarray(found, np.float64), exact, atol=1e-2 * np.abs(exact).max()
    )
    assert not get_races().races_found


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("columns", [1, 5, 10])
def test_every_tile_of_a_product_is_computed_once(columns, paired, monkeypatch):
    monkeypatch.setattr(mosaic_wide.lax, "axis_index", lambda name: member)
    monkeypatch.setattr(mosaic_wide, "BAND", 4)
    found = tiles(jnp.asarray((300, 0, 5, 2000), jnp.int32), 2400, 128)
    live, seen = int((found.rows > 0).sum()), []
    for member in range(1 + paired):
        index = jnp.arange(live * columns, dtype=jnp.int32)
        at, column, lone = mosaic_wide._place_in_group(
            index, found.first, found.many, columns, 4, paired
        )
        seen.append(np.stack([at, column], 1))
        assert (found.group[at] == found.group[index // columns]).all()  # group after group
        if paired:
            rows, across = seen[0][:, 0] == at, seen[0][:, 1] == column
            assert member == 0 or ((rows == lone).all() and (across != lone).all())
    every = {(i, j) for i in range(live) for j in range(columns * (1 + paired))}
    assert sorted(map(tuple, np.concatenate(seen).tolist())) == sorted(every)


def test_edges_hold_only_own_rows():
    sizes = jnp.asarray((3, 0, 150, 1, 97), jnp.int32)
    ends = jnp.cumsum(sizes)
    rows = jnp.arange(1.0, 302)[:, None]
    first, steps = mosaic_wide.span(ends - sizes, ends)
    assert list(first) == [0, 0, 0, 152, 152] and list(steps) == [1, 0, 3, 1, 2]
    found = np.asarray(mosaic_wide.edges(rows, ends - sizes, ends)).reshape(5, 2, 64)
    assert list(found[2, 0]) == [0, 0, 0, *range(4, 65)]
    assert list(found[2, 1]) == [*range(129, 154), *[0] * 39]
    assert list(found[4, 0]) == [0, 0, *range(155, 217)] and not found[1].any()


def test_lowers_inside_shard_map():
    mesh = jax.make_mesh(
        (1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1]
    )
    spec = jax.sharding.PartitionSpec("data")
    fn = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=(spec,) * 4, out_specs=(spec,) * 3))
    text = jax.export.export(fn, platforms=["cuda"])(*shapes(ODD)).mlir_module()
    assert text.count("mosaic_gpu") >= 3


def test_the_portable_form_serves_other_platforms():
    rows, weights, sizes = problem(ODD, "bfloat16")
    cotangent = jnp.asarray(np.random.default_rng(2).normal(size=(ODD.m, ODD.n)), "bfloat16")
    exact = by_hand(rows, weights, sizes, cotangent)
    for ours, expected in zip(jax.jit(both)(rows, weights, sizes, cotangent), exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            np.asarray(ours, np.float64), expected, atol=1e-2 * np.abs(expected).max()
        )


def test_says_what_fits_and_refuses_the_rest():
    fits = shapes(LANES[0])[:3]
    assert explain(*fits)["cuda"].startswith("xla serves; mosaic_gpu fits, on Hopper")
    assert "mosaic_gpu takes bfloat16" in explain(*problem(LANES[0]))["cuda"]
    for case, reason in ((LANES[0], "takes bfloat16, not float32"), (SMALL[0], "k=6, n=5, m=64")):
        dtype = "float32" if case is LANES[0] else "bfloat16"
        with pytest.raises(ValueError, match=reason):
            grouped_matmul(*problem(case, dtype), implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="at least one row"):
        jax.eval_shape(both, *shapes(Case("none", 0, 128, 128, (0, 0))))
    with pytest.raises(ValueError, match="declares no FLOPs"):
        flop_ratios(*fits, implementation="mosaic_gpu")
