"""Plans: what they count and show, by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.core.plans import ExitPlan, RoutePlan

PLAN = RoutePlan(
    experts=jnp.asarray([[2, 0], [1, 3], [2, 1]], jnp.int32),
    weights=jnp.asarray([[0.5, 0.25], [0.75, 9.0], [0.0, 0.125]], jnp.float32),
    keep=jnp.asarray([[True, True], [True, False], [False, True]]),
)


def test_counts_and_load():
    assert PLAN.counts().tolist() == [2, 1, 1]
    assert PLAN.load(5).tolist() == [
        1,
        2,
        1,
        0,
        0,
    ]  # the slots of experts 3 and 2 that are not kept count nowhere
    assert PLAN.counts().dtype == PLAN.load(5).dtype == jnp.int32


def test_one_hot_ignores_what_an_unused_slot_holds():
    expected = [[0.25, 0, 0.5, 0], [0, 0.75, 0, 0], [0, 0.125, 0, 0]]
    np.testing.assert_array_equal(PLAN.one_hot(4), np.asarray(expected, np.float32))


def test_padding_uses_nothing():
    for mask in (jnp.asarray([1.0, 0.0, 1.0]), jnp.asarray([True, False, True])):
        plan = PLAN.masked(mask)
        assert plan.counts().tolist() == [2, 0, 1] and plan.load(4).tolist() == [1, 1, 1, 0]
        assert plan.weights.tolist() == [[0.5, 0.25], [0.0, 0.0], [0.0, 0.125]]
        np.testing.assert_array_equal(plan.experts, PLAN.experts)


def test_exit_histogram():
    plan = ExitPlan(jnp.asarray([3, 0, 3, 1, 3], jnp.int32), jnp.zeros((5, 4)))
    assert plan.histogram(4).tolist() == [1, 1, 0, 3]


def test_plans_are_frozen_pytrees():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAN.keep = PLAN.keep
    again = jax.jit(lambda plan: plan)(PLAN)
    assert jax.tree.structure(again) == jax.tree.structure(PLAN)
    assert [leaf.dtype for leaf in jax.tree.leaves(again)] == [jnp.int32, jnp.float32, bool]
