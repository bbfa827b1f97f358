"""Banks for Hopper: the same layer as the portable banks, lowered for CUDA with Mosaic kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.core.dtypes import DTypes
from dyncomp.experts import HopperMLPBank, HopperSwiGLUBank, MLPBank, MoE, SwiGLUBank
from dyncomp.routers import TopK

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 128)), "bfloat16")


def layer(bank, compute="bfloat16"):
    router = functools.partial(TopK, k=2)
    return MoE(router, 4, 256, bank=bank, dtypes=DTypes(compute=compute))


PAIRS = [(SwiGLUBank, HopperSwiGLUBank, 3), (MLPBank, HopperMLPBank, 2)]


@pytest.mark.parametrize("portable, hopper, products", PAIRS)
def test_same_layer_and_kernels_for_cuda(portable, hopper, products):
    variables = jax.jit(layer(portable).init)(jax.random.key(0), X)
    y = layer(hopper).apply(variables, X)[0]
    plain = np.asarray(layer(portable).apply(variables, X)[0], np.float32)
    np.testing.assert_allclose(np.asarray(y, np.float32), plain, atol=2e-2)  # bfloat16
    loss = lambda v, x: jnp.sum(layer(hopper).apply(v, x)[0].astype(jnp.float32))
    step = jax.jit(jax.value_and_grad(loss))
    text = jax.export.export(step, platforms=["cuda"])(variables, X).mlir_module()
    # forward and weights of each, rows of the last only: nothing asks for the gradient in X
    assert text.count("@mosaic_gpu") == 2 * products + 1


def test_refuses_float32():
    with pytest.raises(ValueError, match="mosaic_gpu takes bfloat16, not float32"):
        layer(HopperSwiGLUBank, "float32").init(jax.random.key(0), X.astype(jnp.float32))
