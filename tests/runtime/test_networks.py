"""Every network of the repository that decides example by example does the same under all executors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Ledger
from dyncomp.models import ExitingDenoiser, UViT, apply
from dyncomp.runtime import Graph, agreement
from dyncomp.runtime.evaluate import executed_split
from dyncomp.tasks import Digits
from dyncomp.training import AdamW, Run
from dyncomp.training.evaluate import Evaluator

from . import networks
from .networks import DEPTHS, NETWORKS, NEW, TOKENS, language


@pytest.fixture(scope="module")
def ran():
    """What every network did, by name; each is compiled once."""
    found = {}

    def get(name):
        if name not in found:
            net, inputs = NETWORKS[name]()
            found[name] = net, inputs, agreement(net, inputs)
        return found[name]

    return get


@pytest.mark.parametrize("name", NETWORKS)
def test_all_executors_agree(ran, name):
    net, _, same = ran(name)
    assert same.error <= 1e-5 and same.differ == 0 and same.near == 0
    graph = Graph.of(net)
    if any(map(graph.decides, range(graph.end))):  # and the examples do not all go one way
        assert len(np.unique(same.visits, axis=0)) > 1


def test_skipped_blocks_are_what_the_model_skips(ran):
    net, images, same = ran("skipped blocks")
    model, variables = networks.skipping_model(), networks.skipping_variables()
    call = jax.jit(lambda v, x: model.apply(v, x, capture=("plan",)))
    logits, aux = call(variables, images)
    np.testing.assert_allclose(same.outputs, logits, rtol=1e-4, atol=1e-5)
    opened = np.asarray(aux.plans["opened"])
    blocks = [n for n, place in enumerate(model.places()) if place.next]
    np.testing.assert_array_equal(same.visits[:, blocks] > 0, opened)
    assert opened.any() and not opened.all()
    ledger = Ledger(model.cost(images.shape)).record(jax.device_get(aux.events))
    assert ledger.total("needed") == sum(
        part.cost.flops * runs for part, runs in zip(net.segments, same.visits.sum(0), strict=True)
    )


def test_prices_of_skipped_blocks_by_hand():
    """4 x 4 images, 3 classes: 4 channels and a block on 4 x 4, 6 channels and two blocks on 2 x 2; gates of 4."""
    gate = lambda d, gates: 2 * gates * (d + 1) * 4
    stem = 2 * 16 * 9 * 1 * 4 + gate(4, 1)
    fine = 2 * 16 * 9 * 2 * 4 * 4
    down = 2 * 4 * (9 * 4 * 6 + 9 * 6 * 6 + 4 * 6)
    coarse, head = 2 * 4 * 9 * 2 * 6 * 6, 4 * 6 + 2 * 6 * 3
    wanted = [stem, fine, down + gate(6, 2) + head, coarse + gate(6, 1) + head, coarse + head]
    prices = networks.skipping_model().cost((1, 4, 4, 1)).values()
    assert [price.flops for price in prices] == wanted


@pytest.mark.parametrize("kind", ["nested", "stopping"])
def test_decoding_leaves_where_the_models_own_pass_does(ran, kind):
    net, _, same = ran(f"{kind} decoder")
    model, variables = language(kind)
    call = jax.jit(lambda v, x: apply(model, v, x, capture=("plan",)))
    runs = np.zeros((len(TOKENS), len(DEPTHS)), int)
    said = np.full((len(TOKENS), NEW), -1)
    for b, prompt in enumerate(TOKENS):
        tokens = np.zeros((1, 4), np.int32)  # causal: what stands behind does not matter
        tokens[0, :3] = prompt
        for n in range(NEW):
            output, aux = call(variables, tokens)
            at = 2 + n
            exits = np.asarray(aux.plans["exit"].exit)[at]
            runs[b, : exits + 1] += 1
            if kind == "stopping" and bool(aux.plans["stopped"][0, at]):
                break
            said[b, n] = int(np.argmax(output["emitted"][0, at]))
            if n + 1 < NEW:
                tokens[0, at + 1] = said[b, n]
    np.testing.assert_array_equal(same.outputs, said)
    np.testing.assert_array_equal(same.visits[:, 1:-1], runs)
    if kind == "stopping":
        assert (said[:, -1] == -1).any() and (said[:, 0] >= 0).any()
    # Embedding aside, an exit costs its block on 4 positions (10 pairs) and a head (d 8, v 13) on one.
    causal = 4 * (2 * 4 * 64 + 2 * 3 * 8 * 12) + 4 * 8 * 10
    extra = 2 * 3 * 8 if kind == "stopping" else 0
    assert net.segments[1].cost.flops == causal + 2 * 8 * 13 + extra


def test_gates_learn_by_either_way_of_training():
    images = networks.IMAGES
    for how in ("soft", "straight_through"):
        model = networks.skipping_model().clone(train_gates=how)
        variables = networks.skipping_variables()

        def open_share(gates, model=model, variables=variables):
            params = {**variables["params"], "level_0_gates": gates}
            output, aux = model.apply({**variables, "params": params}, images, train=True)
            return jnp.sum(output**2), aux.losses["open"]

        gates = variables["params"]["level_0_gates"]
        both = jax.jit(jax.jacrev(open_share))(gates)
        assert all(float(jnp.abs(grad["bias"]).sum()) > 0 for grad in both)


def test_a_trained_model_is_judged_as_it_is_served():
    run = Run(
        model=networks.exits_model(10),
        task=Digits(),
        steps=1,
        optimizer=AdamW(learning_rate=1e-3),
        batch_size=8,
    )
    others = networks.skipping_model().clone(classes=10), networks.staged_model(10)
    for model in (run.model, *others):
        run = run.replace(model=model)
        sample = run.task.source("test").batch(np.arange(1))["inputs"]
        variables = networks.started(model, sample, 1.0)
        variables["controls"]["thresholds"][:] = 0.12
        found = executed_split(run, variables, "test", batches=2)
        wanted = Evaluator(run)(variables, "test", 2)
        assert found["examples"] == 16 and found["other_ways"] == 0
        assert found["quality"]["accuracy"] == wanted["quality"]["accuracy"]
        assert found["flops_needed"] == pytest.approx(wanted["compute"]["flops_needed"])
        assert found["flops_executed"] >= found["flops_needed"]
    for model, told in (
        (networks.DecoderLM(vocab_size=3, d_model=4, groups=[]), "DecoderLM has no segments"),
        (ExitingDenoiser(backbone=UViT), "ExitingDenoiser: only classifiers are judged"),
    ):
        with pytest.raises(DyncompError, match=told):
            executed_split(run.replace(model=model), {})
