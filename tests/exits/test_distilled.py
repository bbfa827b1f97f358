"""The loss of distilled exits against numpy, in both forms, and where its gradient goes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.exits import DistilledExitObjective
from dyncomp.exits.distilled import exit_terms, soft_targets

RNG = np.random.default_rng(0)
LOGITS, LABELS = RNG.normal(size=(4, 5, 3)), np.asarray([0, 2, 1, 1, 0], np.int32)
MASK = np.asarray([1, 1, 0, 1, 1], np.float32)


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def by_hand(hard, soft, temperature, targets):
    """Mean over the four real examples, in float64."""
    total = 0.0
    for n in np.flatnonzero(MASK):
        teacher = log_softmax(LOGITS[3, n] / temperature)
        for k in range(4):
            total -= hard[k] * (targets[n] * log_softmax(LOGITS[k, n])).sum()
        for k in range(3):
            student = log_softmax(LOGITS[k, n] / temperature)
            kl = (np.exp(teacher) * (teacher - student)).sum()
            total += soft * temperature**2 * kl
    return total / MASK.sum()


def loss(objective, targets):
    batch = {"targets": targets, "mask": jnp.asarray(MASK)}
    return objective({"logits": jnp.asarray(LOGITS, jnp.float32)}, None, batch, 0)


def test_both_forms_by_hand(strict):
    hot = np.eye(3)[LABELS]
    value, metrics = loss(DistilledExitObjective(), LABELS)
    np.testing.assert_allclose(value, by_hand([0.5, 0.5, 0.5, 1.0], 0.5, 1.0, hot), rtol=1e-5)
    value, _ = loss(DistilledExitObjective(form="code", temperature=4.0), LABELS)
    np.testing.assert_allclose(value, by_hand([0.5, 0.5, 1.0, 1.0], 0.5, 4.0, hot), rtol=1e-5)
    right = (LOGITS[1].argmax(-1) == LABELS)[MASK > 0].mean()
    np.testing.assert_allclose(metrics["accuracy_exit_1"].value(), right, rtol=1e-6)


def test_distributions_in_place_of_labels_and_smoothing():
    mixed = RNG.dirichlet(np.ones(3), size=5)
    smooth = 0.9 * mixed + 0.1 / 3
    objective = DistilledExitObjective(alpha=0.25, label_smoothing=0.1)
    value, _ = loss(objective, jnp.asarray(mixed, jnp.float32))
    wanted = by_hand([0.25, 0.25, 0.25, 1.0], 0.75, 1.0, smooth)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)


def test_the_teacher_learns_nothing_from_its_pupils():
    targets = soft_targets(LABELS, 3)
    term = lambda logits: jnp.sum(exit_terms(logits, targets, 2.0)[1])
    slopes = np.asarray(jax.grad(term)(jnp.asarray(LOGITS, jnp.float32)))
    assert (slopes[-1] == 0).all() and (np.abs(slopes[:-1]).max((1, 2)) > 1e-3).all()
    # d/ds T^2 KL(p || softmax(s / T)) = T (softmax(s / T) - p)
    soft = np.exp(log_softmax(LOGITS / 2.0))
    np.testing.assert_allclose(slopes[:-1], 2.0 * (soft[:-1] - soft[-1:]), rtol=1e-4, atol=1e-6)
    same = jnp.broadcast_to(jnp.asarray(LOGITS[:1], jnp.float32), LOGITS.shape)
    np.testing.assert_allclose(exit_terms(same, targets)[1], 0.0, atol=1e-6)


def test_options_are_checked_early(unchecked):
    with pytest.raises(DyncompError, match="'paper' or 'code'"):
        DistilledExitObjective(form="thesis")
    with pytest.raises(DyncompError, match="alpha=2"):
        DistilledExitObjective(alpha=2.0)
