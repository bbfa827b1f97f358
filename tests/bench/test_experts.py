"""Planted loads, and the doctor's figures by hand."""

import functools
import json

import numpy as np
import pytest

from dyncomp import bench, config
from dyncomp.bench import doctor, layer, loads, rivals
from dyncomp.core.errors import DyncompError
from dyncomp.experts import MoE
from dyncomp.routers import TopK

TINY = ["DEPTH=2", "D_MODEL=16", "EXPERT_HIDDEN=8", "BATCH=4", "tasks.CodeLM.context=32"]


@pytest.mark.parametrize("experts", [8, 32])
@pytest.mark.parametrize("name", ["even", "dirichlet4", "one_hot", "trained"])
def test_biases_plant_the_load(name, experts):
    if name == "trained" and experts != 8:
        with pytest.raises(DyncompError, match="no load 'trained' for 32 experts"):
            loads.shares(name, experts)
        return
    target = loads.shares(name, experts)
    assert target.sum() == pytest.approx(1.0)
    logits = np.random.default_rng(0).normal(size=(2048, experts))
    bias = loads.planted_biases(logits, 2, target)
    chosen = np.argsort(-(logits + bias), axis=1)[:, :2]
    found = np.bincount(chosen.ravel(), minlength=experts) / chosen.size
    if (
        name == "one_hot"
    ):  # a row's two choices are distinct: half of all is the most an expert can get
        assert found[0] == pytest.approx(0.5, abs=0.01)
    else:
        np.testing.assert_allclose(found, target, atol=0.015)


def test_rivals_compute_the_same_layer():
    x = layer.inputs(64, 16)
    router = functools.partial(TopK, k=2)
    build = lambda form: MoE(
        router=router, num_experts=4, hidden=8, parent=None, **rivals.options(form)
    )
    variables = layer.plant(build("dropless"), x, loads.shares("dirichlet4", 4))
    ours, ragged, limited = (
        layer.outputs(build(form))(variables, x) for form in ("dropless", "ragged_dot", "capacity")
    )
    np.testing.assert_allclose(ragged, ours, atol=1e-6)
    masks = rivals.one_hot(2, variables, x)
    np.testing.assert_allclose(masks, limited, atol=1e-6)  # the same rows are dropped
    assert np.abs(limited - ours).max() > 1e-3


def test_the_doctor_counts_rows_padding_and_drops():
    run = config.load("moe_plus_plus", TINY)
    first, second = doctor.examine(run)
    assert first.experts == second.experts == 12  # free experts have a load too
    assert first.rows_per_expert == pytest.approx(4 * 32 * 2 / 12)
    assert first.imbalance >= 1 and first.padding >= 1 and first.dropped == 0
    scarce = [*TINY, "experts.MoE.dispatch='capacity'", "experts.MoE.capacity_factor=0.5"]
    lost = doctor.examine(config.load("quickstart", [*scarce, "training.Suite.select='top_2'"]))
    assert all(layer.dropped >= 0.5 - 0.05 for layer in lost)  # half the slots cannot be served
    found = doctor.report(lost, "v5e")
    assert found["ridge"] == pytest.approx(197e12 / 0.82e12)
    said = " ".join(found["advice"])
    assert "waits for memory" in said and "choices are dropped" in said


def test_the_doctor_judges_large_models_by_their_shapes(monkeypatch):
    monkeypatch.setattr(doctor, "LARGEST", 0)
    (layer,) = doctor.examine(config.load("moe_plus_plus", TINY))
    assert layer.padding is None and layer.rows_per_expert == pytest.approx(4 * 32 * 2 / 12)
    assert doctor.report([layer], "h100")["layers"][0]["imbalance"] is None


def test_the_doctor_on_the_command_line(capsys):
    arguments = ["--doctor", "moe_plus_plus", "--chip", "v6e"]
    with pytest.raises(DyncompError, match="no figures of chip 'z80'"):
        doctor.report([doctor.Layer("a", 8, 100.0)], "z80")
    with pytest.raises(DyncompError, match="no layer of experts"):
        doctor.examine(config.load("sorted_llama"))
    assert bench.main("experts", arguments, json=True) == 0
    assert json.loads(capsys.readouterr().out)["chip"] == "v6e"
