import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.experts import MoE, SliceDense, SwiGLU, UpcycleDense
from dyncomp.experts.convert import assign_neurons, balanced_clusters, cut, joined, upcycled
from dyncomp.routers import TopK

D, F, LAYERS = 5, 12, 3
RNG = np.random.default_rng(0)
DENSE = {
    "gate": RNG.normal(size=(LAYERS, D, F)).astype(np.float32),
    "up": RNG.normal(size=(LAYERS, D, F)).astype(np.float32),
    "down": RNG.normal(size=(LAYERS, F, D)).astype(np.float32),
}
X = RNG.normal(size=(7, D))


def swiglu(gate, up, down, x=X):
    """float64, one network."""
    g = x @ gate.astype(np.float64)
    return (g / (1 + np.exp(-g)) * (x @ up.astype(np.float64))) @ down.astype(np.float64)


def layer(weights, *index):
    return {name: leaf[index] for name, leaf in weights.items()}


@pytest.mark.parametrize("how", ["contiguous", "random", "clustered"])
@pytest.mark.parametrize("slices", [1, 2, 4, 12])
def test_slices_add_up_to_the_dense_network(how, slices):
    neurons = assign_neurons(DENSE["gate"], slices, how)
    assert neurons.shape == (LAYERS, slices, F // slices)
    assert (np.sort(neurons.reshape(LAYERS, -1)) == np.arange(F)).all()
    parts = cut(DENSE, neurons)
    assert parts["gate"].shape == (LAYERS, slices, D, F // slices)
    assert parts["down"].shape == (LAYERS, slices, F // slices, D)
    for i in range(LAYERS):
        total = sum(swiglu(**layer(parts, i, j)) for j in range(slices))
        np.testing.assert_allclose(total, swiglu(**layer(DENSE, i)), atol=1e-12)


def test_each_neuron_keeps_its_own_row_and_columns():
    neurons = assign_neurons(DENSE["gate"], 3, "random", seed=4)
    parts = cut(DENSE, neurons)
    for i, j, s in np.ndindex(*neurons.shape):
        n = neurons[i, j, s]
        np.testing.assert_array_equal(parts["gate"][i, j, :, s], DENSE["gate"][i, :, n])
        np.testing.assert_array_equal(parts["up"][i, j, :, s], DENSE["up"][i, :, n])
        np.testing.assert_array_equal(parts["down"][i, j, s], DENSE["down"][i, n])
    assert (assign_neurons(DENSE["gate"], 3, "random", 4) == neurons).all()
    assert (assign_neurons(DENSE["gate"], 3, "random", 5) != neurons).any()
    assert (neurons[0] != neurons[1]).any()  # each layer has its own shuffle


def test_a_contiguous_cut_can_be_undone_and_one_layer_needs_no_layer_axis():
    parts = cut(DENSE, assign_neurons(DENSE["gate"], 4))
    for name, leaf in joined(parts).items():
        np.testing.assert_array_equal(leaf, DENSE[name])
    one = layer(DENSE, 0)
    np.testing.assert_array_equal(cut(one, assign_neurons(one["gate"], 4))["up"], parts["up"][0])


def test_balanced_clusters_find_groups_of_unequal_pull_and_stay_equal_in_size():
    centres = 10 * np.eye(3)
    points = np.repeat(centres, 4, axis=0) + 0.1 * RNG.normal(size=(12, 3))
    order = RNG.permutation(12)
    found = balanced_clusters(points[order], 3)
    assert {frozenset(order[group] // 4) for group in found} == {frozenset({i}) for i in range(3)}
    crowded = np.concatenate([RNG.normal(size=(10, 2)), 50 + RNG.normal(size=(2, 2))])
    groups = balanced_clusters(crowded, 2)
    assert groups.shape == (2, 6) and any({10, 11} <= set(g.tolist()) for g in groups)
    with pytest.raises(DyncompError, match="divisor"):
        balanced_clusters(points, 5)


def test_an_upcycled_mixture_is_the_dense_network_with_renormalised_gates():
    one = layer(DENSE, 1)
    copies = upcycled(one, 4)
    x = jnp.asarray(X[None], jnp.float32)
    dense, _ = SwiGLU(hidden=F).apply({"params": one}, x)
    for k, renormalize, same in (
        (1, True, True),
        (2, True, True),
        (3, True, True),
        (2, False, False),
    ):
        router = functools.partial(TopK, k=k, renormalize=renormalize)
        moe = MoE(router=router, num_experts=4, hidden=F)
        start = nn.unbox(jax.jit(moe.init)(jax.random.key(0), x))["params"]
        y, _ = moe.apply({"params": {**start, **copies}}, x)
        assert np.allclose(y, dense, atol=1e-5) is same
    noisy = upcycled(one, 4, noise=0.1)
    change = noisy["gate"] - copies["gate"]
    np.testing.assert_allclose(change.std() / one["gate"].std(), 0.1, rtol=0.15)
    assert noisy["gate"].dtype == np.float32 and (noisy["gate"][0] != noisy["gate"][1]).any()


def test_checkpoints_are_converted_by_path():
    flat = {f"group_0/layers/block_0/ffn/{n}": leaf for n, leaf in DENSE.items()}
    flat |= {"embed": np.ones((2, D)), "group_0/layers/block_0/noffn/gate": np.ones(3)}
    out = SliceDense(slices=4)(flat)
    parts = cut(DENSE, assign_neurons(DENSE["gate"], 4))
    for name in DENSE:
        place = f"group_0/layers/block_0/ffn/{name}"
        np.testing.assert_array_equal(out[place], parts[name])
        teacher = out[f"group_0/layers/block_0/ffn/teacher/{name}"]
        np.testing.assert_array_equal(teacher, DENSE[name])
    assert out["embed"] is flat["embed"]
    assert out["group_0/layers/block_0/noffn/gate"] is flat["group_0/layers/block_0/noffn/gate"]
    copies = UpcycleDense(experts=3)(flat)["group_0/layers/block_0/ffn/down"]
    assert copies.shape == (LAYERS, 3, F, D) and (copies[:, 1] == DENSE["down"]).all()
    with pytest.raises(DyncompError, match="mlp"):
        SliceDense(slices=4, seam="mlp")(flat)
    with pytest.raises(DyncompError, match="divisor of 12"):
        SliceDense(slices=5)(flat)
