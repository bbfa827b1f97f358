import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp_kernels.dense_matmul import reference
from dyncomp_kernels.dense_matmul.api import FEW, dense_matmul, weights_transposed


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (2,), (3, 5), (0,)])
def test_value_and_gradients(shape, dtype, tolerance):
    rng = np.random.default_rng(0)
    exact = [rng.normal(size=s) for s in ((*shape, 24), (24, 40), (*shape, 40))]
    x, w, dy = (jnp.asarray(a, dtype) for a in exact)

    @jax.jit
    def both(x, w, dy):
        y, pull = jax.vjp(dense_matmul, x, w)
        return y, *pull(dy)

    rows, weights, cotangent = (np.asarray(a, np.float64) for a in (x, w, dy))
    flat, back = rows.reshape(-1, 24), cotangent.reshape(-1, 40)
    wanted = rows @ weights, cotangent @ weights.T, flat.T @ back
    for ours, want in zip(both(x, w, dy), wanted, strict=True):
        assert ours.dtype == x.dtype
        scale = max(1.0, np.abs(want).max(initial=0.0))
        np.testing.assert_allclose(np.asarray(ours, np.float64), want, atol=tolerance * scale)
    close = reference.dense_matmul(x, w).astype(jnp.float32)
    np.testing.assert_allclose(dense_matmul(x, w).astype(jnp.float32), close, atol=0.1, rtol=1e-2)


def test_bfloat16_is_summed_in_float32_on_the_cpu_and_left_alone_elsewhere():
    x, w = jnp.ones((1, 8), jnp.bfloat16), jnp.ones((8, 4), jnp.bfloat16)
    text = lambda platform: jax.export.export(jax.jit(dense_matmul), platforms=[platform])(
        x, w
    ).mlir_module()
    assert "-> tensor<1x4xf32>" in text("cpu")
    assert "-> tensor<1x4xf32>" not in text("tpu")


@pytest.mark.parametrize(
    "dtype, tolerance", [("float32", 5e-5), ("bfloat16", 2e-2)]
)  # of a sum of 2,600
@pytest.mark.parametrize("rows", [1, 2, 7, FEW, FEW + 1])
def test_weights_that_lie_transposed_change_no_value(rows, dtype, tolerance):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=s), dtype) for s in ((rows, 24), (40, 24)))

    def loss(x, w, transposed):
        return jnp.sum(jnp.sin(dense_matmul(x, w.T, transposed=transposed, dtype=jnp.float32)))

    found = [jax.value_and_grad(loss, (0, 1))(x, w, way) for way in (True, False)]
    for ours, want in zip(*map(jax.tree.leaves, found), strict=True):
        ours, want = (np.asarray(a, np.float64) for a in (ours, want))
        np.testing.assert_allclose(ours, want, atol=tolerance * max(1.0, np.abs(want).max()))


def test_transposed_weights_go_left_for_a_few_rows_on_the_cpu_only():
    def left(rows, platform, transposed=None):
        product = lambda x, w: dense_matmul(x, w.T, transposed=transposed)
        args = jnp.ones((rows, 8)), jnp.ones((4, 8))
        module = jax.export.export(jax.jit(product), platforms=[platform])(*args).mlir_module()
        return "optimization_barrier" in module

    assert left(8, "cpu", True) and not left(8, "cpu")
    assert not left(1, "cpu", True) and not left(FEW + 1, "cpu", True) and not left(8, "tpu", True)
    with weights_transposed():
        assert left(8, "cpu") and not left(8, "cpu", False)
    assert not left(8, "cpu")


def test_bad_arguments():
    with pytest.raises(ValueError, match="do not fit"):
        dense_matmul(jnp.ones((2, 3)), jnp.ones((4, 5)))
    with pytest.raises(ValueError, match="one dtype"):
        dense_matmul(jnp.ones((2, 3)), jnp.ones((3, 5), jnp.bfloat16))


def test_heads_are_axes_of_their_own():
    rng = np.random.default_rng(0)
    x, w, back = (
        jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((2, 3, 8), (8, 4, 5), (4, 5, 8))
    )
    heads = dense_matmul(x, w)
    assert heads.shape == (2, 3, 4, 5)
    flat = dense_matmul(x, w.reshape(8, 20)).reshape(heads.shape)
    np.testing.assert_array_equal(heads, flat)
    assert dense_matmul(heads, back, axes=2).shape == x.shape
