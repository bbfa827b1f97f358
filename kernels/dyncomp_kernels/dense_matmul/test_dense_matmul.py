import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp_kernels.dense_matmul import reference
from dyncomp_kernels.dense_matmul.api import dense_matmul


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
