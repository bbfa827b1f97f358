"""Objectives and metrics against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.core.aux import Aux
from dyncomp.core.errors import DyncompError
from dyncomp.tasks import ClassificationObjective, Digits, LMObjective


def log_softmax(logits):
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.fixture
def lm():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 5, 7)).astype(np.float32) * 3
    batch = {
        "targets": jnp.asarray(rng.integers(0, 7, (2, 5)), jnp.int32),
        "mask": jnp.asarray(rng.integers(0, 2, (2, 5)), jnp.float32),
    }
    return logits, batch


@pytest.fixture
def images():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(6, 4)).astype(np.float32) * 3
    mask = jnp.asarray([1, 1, 0, 1, 1, 0], jnp.float32)
    return logits, {"targets": jnp.asarray(rng.integers(0, 4, 6), jnp.int32), "mask": mask}


def picked(table, targets):
    return np.take_along_axis(table, np.asarray(targets)[..., None], -1)[..., 0]


LOSSES = {
    "g0": {"ffn": {"balance": jnp.asarray([1.0, 3.0]), "z": jnp.asarray([0.5, 0.25])}},
    "g1": {"ffn": {"balance": jnp.float32(8.0)}},
}


@pytest.mark.parametrize("reduce, balance, z", [("mean", 4.0, 0.375), ("sum", 12.0, 0.75)])
def test_lm_loss(lm, reduce, balance, z):
    logits, batch = lm
    objective = LMObjective(aux_weights={"balance": 0.1, "z": 2.0}, aux_reduce=reduce)
    loss, metrics = jax.jit(objective)(jnp.asarray(logits), Aux(losses=LOSSES), batch, 0)
    mask = np.asarray(batch["mask"], np.float64)
    nll = -picked(log_softmax(logits), batch["targets"])
    expected = (nll * mask).sum() / mask.sum()
    np.testing.assert_allclose(float(loss), expected + 0.1 * balance + 2 * z, rtol=1e-5)
    np.testing.assert_allclose(metrics["nll"].value(), expected, rtol=1e-5)
    assert float(metrics["nll"].count) == mask.sum()
    assert metrics["balance"].value() == pytest.approx(balance) and loss.dtype == jnp.float32


def test_lm_z_loss(lm):
    logits, batch = lm
    plain, _ = LMObjective()(jnp.asarray(logits), Aux(), batch, 0)
    loss, metrics = LMObjective(z_loss=0.01)(jnp.asarray(logits), Aux(), batch, 0)
    mask = np.asarray(batch["mask"], np.float64)
    square = np.log(np.exp(logits.astype(np.float64)).sum(-1)) ** 2
    expected = (square * mask).sum() / mask.sum()
    np.testing.assert_allclose(float(loss - plain), 0.01 * expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["output_z"].value(), expected, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_classification_loss(images, smoothing):
    logits, batch = images
    objective = ClassificationObjective(label_smoothing=smoothing, aux_weights={"z": 3.0})
    loss, metrics = jax.jit(objective)(
        jnp.asarray(logits), Aux(losses={"z": jnp.float32(0.5)}), batch, 0
    )
    table, mask = log_softmax(logits), np.asarray(batch["mask"], np.float64)
    target = np.full((6, 4), smoothing / 4)
    target[np.arange(6), np.asarray(batch["targets"])] += 1 - smoothing
    expected = (-(target * table).sum(-1) * mask).sum() / 4
    np.testing.assert_allclose(float(loss), expected + 1.5, rtol=1e-5)
    nll = (-picked(table, batch["targets"]) * mask).sum() / 4
    np.testing.assert_allclose(metrics["nll"].value(), nll, rtol=1e-5)
    right = ((logits.argmax(-1) == np.asarray(batch["targets"])) * mask).sum() / 4
    assert metrics["accuracy"].value() == pytest.approx(right)
    assert Digits().metrics(jnp.asarray(logits), batch)["accuracy"].value() == pytest.approx(right)


def test_softmax_is_float32(lm):
    """bfloat16 logits lose nothing more than their own rounding."""
    logits, batch = lm
    rounded = jnp.asarray(logits, jnp.bfloat16)
    loss, _ = LMObjective()(rounded, Aux(), batch, 0)
    exact, _ = LMObjective()(rounded.astype(jnp.float32), Aux(), batch, 0)
    assert float(loss) == float(exact)


def test_fully_masked_batch_is_zero_not_nan(images):
    logits, batch = images
    batch = {**batch, "mask": jnp.zeros(6)}
    loss, metrics = ClassificationObjective()(jnp.asarray(logits), Aux(), batch, 0)
    assert float(loss) == 0 and np.isnan(metrics["nll"].value())


def test_weight_of_a_loss_nobody_reports(lm):
    logits, batch = lm
    objective = LMObjective(aux_weights={"balanse": 0.1})
    with pytest.raises(
        DyncompError, match=r"names 'balanse', but the model reports \['balance', 'z'\]"
    ):
        jax.jit(objective)(jnp.asarray(logits), Aux(losses=LOSSES), batch, 0)


def test_objectives_are_static_arguments():
    assert hash(LMObjective(aux_weights={"z": 1.0})) is not None
    assert LMObjective(aux_weights={"z": 1.0}) != LMObjective(aux_weights={"z": 2.0})


def test_strict(strict, lm):
    logits, batch = lm
    objective = LMObjective(aux_weights={"balance": 0.1}, z_loss=0.1)
    objective(jnp.asarray(logits), Aux(losses=LOSSES), batch, 0)


def test_models_that_leave_early_are_judged_by_what_they_emit(images):
    """A mapping has two answers: metrics take the emitted one, an objective either."""
    logits, batch = images
    output = {"emitted": jnp.asarray(logits), "final": jnp.asarray(-logits)}
    mask, labels = np.asarray(batch["mask"], np.float64), np.asarray(batch["targets"])
    mean = lambda values: (values * mask).sum() / mask.sum()
    for answer, own in (("emitted", logits), ("final", -logits)):
        loss, _ = ClassificationObjective(answer=answer)(output, Aux(), batch, 0)
        np.testing.assert_allclose(loss, mean(-picked(log_softmax(own), labels)), rtol=1e-5)
    metrics = Digits().metrics(output, batch)
    assert metrics["accuracy"].value() == pytest.approx(mean(logits.argmax(-1) == labels))
    assert metrics["accuracy_final"].value() == pytest.approx(mean(logits.argmin(-1) == labels))
    np.testing.assert_allclose(
        metrics["nll"].value(), mean(-picked(log_softmax(logits), labels)), rtol=1e-5
    )
    assert "accuracy_final" not in Digits().metrics(jnp.asarray(logits), batch)
