"""Patterns under a mesh: each device attends for its own sequences and heads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.attention import (
    AShape,
    Assigned,
    Attention,
    ImportantTokens,
    PerHead,
    RoutedAttention,
    TopBlocks,
    VerticalSlash,
)
from dyncomp.parallel import MeshSpec, use

LINES = functools.partial(VerticalSlash, vertical=6, slash=10, probe=8, sink=2, local=4, tile=8)
BLOCKS = functools.partial(TopBlocks, blocks=2, tile=8)
PATTERNS = {
    "a_shape": functools.partial(AShape, window=7, sink=2, tile=8),
    "blocks": BLOCKS,
    "lines": LINES,
    "per_head": functools.partial(PerHead, (LINES(), BLOCKS()), (0, 1, 1, 0)),
    "assigned": functools.partial(Assigned, (LINES(), BLOCKS())),
    "important": functools.partial(ImportantTokens, tau=0.7, tile=8),
}
MESHES = {"data2_tensor2": MeshSpec(data=2, tensor=2), "data4": MeshSpec(data=4)}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", PATTERNS)
def test_four_devices_do_as_one(name, mesh):
    """Values, gradients and counted pairs."""
    layer = Attention(heads=4, kv_heads=2, pattern=PATTERNS[name], pattern_from=8)
    x = jax.random.normal(jax.random.key(0), (4, 40, 16))
    variables = jax.tree.map(lambda w: 2.0 * w, jax.jit(layer.init)(jax.random.key(1), x[:1]))
    if name == "assigned":
        variables |= {"controls": {"pattern": {"heads": jnp.asarray([0, 1, 1, 0])}}}

    def loss(params):
        y, aux = layer.apply({**variables, "params": params}, x)
        return jnp.sum(jnp.sin(y)), (y, aux.events)

    call = lambda: jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    grads, (y, events) = call()
    with use(MESHES[mesh].build()):
        theirs, (z, others) = call()
    np.testing.assert_allclose(z, y, rtol=2e-6, atol=2e-6)
    near = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
    jax.tree.map(near, theirs, grads)
    if name != "important":  # rounds up the mean of those it computes
        jax.tree.map(np.testing.assert_array_equal, others, events)


@pytest.mark.parametrize("membership", ["nearest", "best"])
def test_clusters_on_four_devices(membership):
    layer = RoutedAttention(heads=4, clusters=3, members=8, membership=membership)
    x = jax.random.normal(jax.random.key(0), (4, 40, 16))
    variables = jax.jit(layer.init)(jax.random.key(1), x[:1])

    def loss(params):
        y, aux = layer.apply({**variables, "params": params}, x)
        return jnp.sum(jnp.sin(y)), (y, aux.events)

    call = lambda: jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    grads, (y, events) = call()
    with use(MeshSpec(data=2, tensor=2).build()):
        theirs, (z, others) = call()
    np.testing.assert_allclose(z, y, rtol=2e-6, atol=2e-6)
    near = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
    jax.tree.map(near, theirs, grads)
    jax.tree.map(np.testing.assert_array_equal, others, events)
