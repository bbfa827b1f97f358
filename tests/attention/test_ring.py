"""Attention of sequences that a mesh splits, against the same on one device in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dyncomp.attention import Attention
from dyncomp.attention.attend import attend
from dyncomp.attention.ring import ring_attention
from dyncomp.attention.sight import Sight
from dyncomp.core.errors import DyncompError
from dyncomp.parallel import MeshSpec, hlo, make_rules, use

B, T, P = 2, 8, 4


def drawn(h, g, dtype="float64"):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(B, T, n, P)), dtype) for n in (h, g, g)]


def both(fn, q, k, v, sight):
    """Values, and gradients of a sum in which every value has a weight of its own."""
    weights = jnp.cos(jnp.arange(q.size, dtype=q.dtype)).reshape(q.shape)

    def loss(q, k, v):
        out = fn(q, k, v, sight)
        return jnp.sum(jnp.sin(out) * weights), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return [out, *grads]


# mesh, heads, words of the sight, real positions of each row (below 0: the last ones)
CASES = {
    "causal, grouped heads": ({"sequence": 4}, (4, 2), {}, None),
    "not causal, padding": ({"sequence": 2, "data": 2}, (2, 2), {"causal": False}, [8, 5]),
    "causal, padding": ({"sequence": 4}, (2, 1), {}, [3, 8]),
    "a window": ({"sequence": 4}, (2, 2), {"window": 3}, None),
    "queries that see nothing": ({"sequence": 4}, (2, 2), {}, [-3, 0]),
    "nothing in the window": ({"sequence": 4}, (2, 2), {"window": 2}, [2, 8]),
    "the axis of another rule": ({"tensor": 4}, (2, 1), {}, None),
    "heads split too": ({"sequence": 2, "tensor": 2, "data": 1}, (4, 2), {}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_one_device(case):
    mesh, heads, words, lengths = CASES[case]
    with jax.enable_x64(True):
        q, k, v = drawn(*heads)
        place = jnp.arange(T, dtype=jnp.int32)
        count = np.asarray(lengths or [T] * B)[:, None]
        real = np.where(count < 0, np.arange(T) >= T + count, np.arange(T) < count)
        sight = Sight(place, jnp.where(real, place, -1), **words)
        dense = lambda q, k, v, sight: attend(q, k, v, sight.all())
        wanted = both(dense, q, k, v, sight)
        rules = make_rules({"seq": "tensor"} if "sequence" not in mesh else None)
        with use(MeshSpec(**{"data": 1, **mesh}).build(), rules):
            found = both(ring_attention, q, k, v, sight)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-13)


def test_key_heads_that_are_whole_beside_split_heads():
    rules = make_rules({"kv_heads": None})
    q, k, v = drawn(4, 1, "float32")
    sight = Sight(jnp.arange(T), jnp.arange(T)[None])
    wanted = both(lambda q, k, v, sight: attend(q, k, v, sight.all()), q, k, v, sight)
    with use(MeshSpec(data=1, sequence=2, tensor=2).build(), rules):
        found = both(ring_attention, q, k, v, sight)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def layer(**words):
    return Attention(heads=4, kv_heads=2, **words)


@functools.cache
def inputs():
    x = jax.random.normal(jax.random.key(0), (B, T, 16))
    mask = jnp.asarray([[1] * T, [1] * 6 + [0] * 2])
    variables = nn.meta.unbox(jax.jit(layer().init)(jax.random.key(1), x))
    return x, mask, variables


@pytest.mark.parametrize("across", ["ring", "gather"])
def test_the_layer_and_its_events_do_not_depend_on_the_mesh(across):
    x, mask, variables = inputs()
    call = lambda: jax.jit(lambda v, x, m: layer(across=across).apply(v, x, mask=m))(
        variables, x, mask
    )
    y, aux = call()
    with use(MeshSpec(data=1, sequence=4).build()):
        found, events = call()
    np.testing.assert_allclose(found, y, atol=1e-5)
    assert jax.tree.map(int, events.events) == jax.tree.map(int, aux.events)


@pytest.mark.parametrize(
    ("across", "kind"), [("ring", "collective-permute"), ("gather", "all-gather")]
)
def test_what_is_sent(across, kind):
    """A ring passes keys on and collects nothing; the other form collects them."""
    x, _, variables = inputs()
    with use(MeshSpec(data=1, sequence=4).build()):
        run = jax.jit(lambda v, x: layer(across=across).apply(v, x)[0])
        found = hlo.collectives(run.lower(variables, x).compile().as_text())
    assert set(found) == {kind}


def test_a_form_that_is_none(unchecked):
    x, _, variables = inputs()
    with pytest.raises(DyncompError, match="Attention.across='rign': use 'ring' or 'gather'"):
        layer(across="rign").apply(variables, x)


def test_one_example_on_a_mesh_that_splits_the_batch():
    x, _, variables = inputs()
    wanted, _ = layer().apply(variables, x[:1])
    with use(MeshSpec(data=2, sequence=2).build()):
        found, _ = layer().apply(variables, x[:1])
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_decode_step_and_lengths_that_do_not_divide():
    x, _, variables = inputs()
    with use(MeshSpec(data=1, sequence=4).build()):
        cache = layer().init_cache(16, B, T)
        y, aux = layer().apply(variables, x[:, :4], cache=cache)
        step, _ = layer().apply(variables, x[:, 4:5], cache=aux.cache)
        with pytest.raises(DyncompError, match="6 positions are not a multiple of mesh axis seq"):
            layer().apply(variables, x[:, :6])
    whole, _ = layer().apply(variables, x[:, :5])
    np.testing.assert_allclose(jnp.concatenate([y, step], axis=1), whole, atol=1e-5)
