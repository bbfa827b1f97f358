"""When cuDNN's kernel serves; what it computes is checked where a GPU is (docs/bench/models_gpu.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.attention import Attention, Sight
from dyncomp.attention import attention as module
from dyncomp.attention.attend import attend
from dyncomp.attention.fused import fused_serves

PLACE = jnp.arange(6, dtype=jnp.int32)


@pytest.mark.parametrize(
    ("dtype", "width", "words", "real", "serves"),
    [
        ("bfloat16", 64, {}, None, True),
        ("bfloat16", 64, {"causal": False}, None, True),
        ("float32", 64, {}, None, False),
        ("bfloat16", 60, {}, None, False),
        ("bfloat16", 256, {}, None, False),
        ("bfloat16", 64, {"window": 3}, None, False),
        ("bfloat16", 64, {}, jnp.ones((1, 6), bool), False),
    ],
)
def test_what_is_refused_is_done_in_plain_form(monkeypatch, dtype, width, words, real, serves):
    q, sight = jnp.zeros((1, 6, 2, width), dtype), Sight(PLACE, PLACE[None], **words)
    assert not fused_serves(q, sight, real)  # no GPU here
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert fused_serves(q, sight, real) is serves


def test_the_layer_counts_what_the_kernel_computes(monkeypatch):
    """On the seam: the same values and needs as the plain form; executed are the pairs below the diagonal."""
    layer = Attention(heads=2)
    x = jax.random.normal(jax.random.key(0), (2, 6, 16))
    variables = jax.jit(layer.init)(jax.random.key(1), x)
    plain, aux = layer.apply(variables, x)
    stand_in = lambda q, k, v, causal: attend(q, k, v, jnp.tril(jnp.ones((1, 6, 6), bool)))
    monkeypatch.setattr(module, "fused_serves", lambda *_: True)
    monkeypatch.setattr(module, "fused_attention", stand_in)
    fused, other = layer.apply(variables, x)
    np.testing.assert_allclose(fused, plain, atol=1e-6)
    total = lambda aux, which: int(jnp.sum(getattr(aux.events["pairs"], which)))
    assert total(aux, "needed") == total(other, "needed")
    assert total(other, "executed") <= total(aux, "executed")
