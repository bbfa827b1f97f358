"""A network that repeats a step until it is sure: every executor stops where the model does."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from dyncomp.exits import RunningSumRule
from dyncomp.models import SpikingClassifier
from dyncomp.runtime import (
    CompactExecutor,
    Graph,
    HostExecutor,
    LaxExecutor,
    MaskedExecutor,
    from_steps,
)

STEPS, B = 4, 7
EXECUTORS = {
    "masked": lambda net, x: MaskedExecutor(net),
    "lax": lambda net, x: LaxExecutor(net),
    "compact": lambda net, x: CompactExecutor(net, (4,)),
    "host": lambda net, x: HostExecutor(net, x, capacity=B, buckets=(1, 4)),
}


@pytest.fixture(scope="module")
def case():
    """(model, variables, images, what the model says)."""
    rule = RunningSumRule(classes=3, temperature=1.0, threshold=0.65)
    model = SpikingClassifier(classes=3, widths=(3, 4), convs=(1, 1), steps=STEPS, rule=rule)
    images = 2.0 * np.random.default_rng(5).normal(size=(B, 4, 4, 1)).astype(np.float32)
    variables = nn.meta.unbox(jax.jit(model.init)(jax.random.key(3), images))
    output, aux = jax.device_get(jax.jit(model.apply)(variables, images))
    assert np.abs(output["scores"] - 0.65).min() > 1e-4
    return model, variables, images, output, aux.events


def test_the_case_is_not_trivial(case):
    assert len(set(case[3]["exit"])) > 2


@pytest.mark.parametrize("how", EXECUTORS)
def test_executors_stop_where_the_model_does(case, how):
    model, variables, images, output, events = case
    net = from_steps(model, variables, images.shape)
    found = EXECUTORS[how](net, images)(images)
    np.testing.assert_array_equal(found.visits.sum(axis=1), output["exit"] + 1)
    np.testing.assert_allclose(found.outputs, output["emitted"], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.exits, np.minimum(output["exit"], 1))
    table = model.cost(images.shape)
    steps = int(np.asarray(events["step"].needed).sum())
    needed = B * table["first"].flops + steps * table["step"].flops
    assert found.ledger.total("needed") == needed
    if how == "host":
        # Rows that ran: those that were left, in sizes of 1 and 4.
        assert found.executed.sum() < B * STEPS and (found.executed >= found.needed).all()


def test_one_step_is_one_segment(case):
    model, variables, images, *_ = case
    graph = Graph.of(from_steps(model.clone(steps=1), variables, images.shape))
    assert graph.names == ("first",) and graph.ends(0)
    assert Graph.of(from_steps(model, variables, images.shape)).trips == (0, STEPS - 1)
