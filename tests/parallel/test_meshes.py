"""Training on a mesh of eight devices against one device in float64, and the rules by which `bench meshes` judges."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.bench import fresh, mesh_runs, meshes
from dyncomp.bench.mesh_job import once_an_epoch
from dyncomp.core.errors import DyncompError


def test_eight_devices_train_like_one_in_float64(tmp_path_factory, monkeypatch):
    """A model of experts, 50 steps, a mesh of three axes; the bench does others."""
    monkeypatch.setenv("DYNCOMP_CACHE", str(tmp_path_factory.getbasetemp() / "bench-cache"))
    found = {row["id"]: row for row in meshes.rows(quick=True)}
    for kind in mesh_runs.QUICK_KINDS:
        row = found.pop(f"meshes/{kind}/float64/1x8")
        assert row["holds"] is True and row["ratio"] <= 1e-8, row["each"]
        assert all(name.count("=2") == 3 for name in row["each"])
    (epochs,) = found.values()
    assert epochs["id"] == "meshes/epochs/float64/1x8" and epochs["ratio"] == 1.0


def test_every_mesh_of_eight_is_tried():
    """2^3 over three axes in 10 ways, over four in 20, half with experts apart; 3 split sequences by tensor."""
    counts = {kind: len(mesh_runs.shapes(kind, quick=False)) for kind in mesh_runs.KINDS}
    assert counts == {"dense": 20 + 3, "moe": 10 + 1, "exits": 10}
    assert mesh_runs.shapes("dense", quick=False)["tensor=8 seq"].rules == {"seq": "tensor"}


def test_distances_of_curves():
    assert meshes.apart([1.0, 2.0], [1.0, 2.5]) == 0.5
    assert meshes.apart([1.0], [1.0, 2.0]) == float("inf")
    seeds = [[1.0, 2.0], [1.5, 2.0], [0.5, 3.0]]  # spreads 1 and 1
    assert meshes.of_spread([1.25, 1.5], seeds) == 0.5
    assert meshes.of_spread([1.0], seeds) == float("inf")


def test_an_epoch_holds_each_example_once():
    order = np.random.default_rng(0).permutation
    epochs = np.concatenate([order(mesh_runs.EXAMPLES), order(mesh_runs.EXAMPLES)[:32]])
    batches = epochs.reshape(-1, 16)
    assert once_an_epoch(batches)
    twice, missing = batches.copy(), batches.copy()
    twice[0, 0], missing[-1, -1] = batches[0, 1], -1
    assert not once_an_epoch(twice) and not once_an_epoch(missing)


def test_a_plan_is_replayed_with_gates_of_its_own():
    """Told experts 3 and (unused) for the first row, 1 and 0 for the second."""
    router = mesh_runs.Replayed(num_experts=4, p=0.4, max_p=0.4, rows=2)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4)), jnp.float32)
    variables = nn.unbox(jax.jit(router.init)(jax.random.key(0), x))
    free, _ = router.apply(variables, x)
    told = jnp.asarray([[3, -1], [1, 0]], jnp.int32)
    controls = {**variables["controls"], "told": told, "replay": jnp.int32(1)}
    plan, _ = router.apply({**variables, "controls": controls}, x)
    assert plan.keep.tolist() == [[True, False], [True, True]]
    assert plan.experts[plan.keep].tolist() == [3, 1, 0]
    gates = jax.nn.softmax(x @ variables["params"]["kernel"])
    np.testing.assert_allclose(plan.weights, [[gates[0, 3], 0], gates[1, :2][::-1]], rtol=1e-6)
    np.testing.assert_array_equal(mesh_runs.told(plan), told)
    variables["controls"]["told"] = mesh_runs.told(free)
    again, _ = router.apply(variables, x)
    np.testing.assert_array_equal(again.weights, free.weights)


def test_several_processes_at_once():
    found = fresh.together("builtins:dict", {"a": 1}, processes=2, environment={})
    assert (found["a"], found["processes"], found["process"]) == (1, 2, 0)
    with pytest.raises(DyncompError, match="No module named 'nothing'"):
        fresh.together("nothing:at_all", {}, processes=2, environment={})
