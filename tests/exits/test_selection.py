"""Confidence in a running sum, one threshold for all exits, and the first right exit, against brute force."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.exits import KeepAccuracy, RunningSumRule, cheapest_threshold, decide, leaves_above
from dyncomp.exits.oracle import first_right
from dyncomp.exits.selection import Chosen, threshold_for_cost, threshold_front

X, B, C = 9, 60, 4


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(0).normal(0.0, 1.5, (X, B, C)).astype(np.float32) + 0.4


def posthoc(logits, temperature, mean=False):
    """Confidence [x b] in float64 on the whole trace."""
    z = np.cumsum(logits.astype(np.float64), axis=0) / temperature
    z = z / np.arange(1, len(z) + 1)[:, None, None] if mean else z
    e = np.exp(z - z.max(-1, keepdims=True))
    return (e / e.sum(-1, keepdims=True)).max(-1)


def stops(logits, threshold, **options):
    rule = RunningSumRule(classes=C, **options)
    gates = jnp.zeros(logits.shape[:2])[:-1]
    plan = decide(rule, jnp.asarray(logits)[:-1], gates, jnp.full((X - 1,), threshold))
    return np.asarray(plan.exit), np.asarray(plan.scores)[:, :-1]


@pytest.mark.parametrize(("accumulate", "temperature"), [("sum", 3.0), ("mean", 1.3)])
def test_it_stops_where_the_whole_trace_says(logits, accumulate, temperature):
    wanted = posthoc(logits, temperature, accumulate == "mean")
    found, scores = stops(logits, 0.6, temperature=temperature, accumulate=accumulate)
    np.testing.assert_allclose(scores, wanted[:-1].T, rtol=1e-5)
    assert np.abs(wanted - 0.6).min() > 1e-6
    np.testing.assert_array_equal(found, leaves_above(wanted.T, 0.6))
    brute = [next((t for t in range(X - 1) if wanted[t, b] > 0.6), X - 1) for b in range(B)]
    np.testing.assert_array_equal(found, brute)
    assert len(set(brute)) > 3


def test_thresholds_at_the_ends_and_between(logits):
    assert (
        stops(logits, 1.0, temperature=1e-3)[0] == X - 1
    ).all()  # even where confidence is 1: strict
    assert (stops(logits, 1 / C - 1e-6, temperature=3.0)[0] == 0).all()
    latency = [stops(logits, t, temperature=3.0)[0].mean() for t in (0.3, 0.5, 0.7, 0.9)]
    assert latency == sorted(latency) and latency[0] < latency[-1]


def test_temperatures_at_the_ends(logits):
    exits, scores = stops(logits, 1 / C + 1e-3, temperature=1e6)
    np.testing.assert_allclose(scores, 1 / C, atol=1e-4)
    assert (exits == X - 1).all()
    assert (stops(logits, 0.999, temperature=1e-4)[0] == 0).all()
    silent = logits.copy()
    silent[0] = 0.0  # no spike has arrived: all classes tie, whatever the temperature
    exits, scores = stops(silent, 0.999, temperature=1e-4)
    np.testing.assert_allclose(scores[:, 0], 1 / C)
    assert (exits == 1).all()


def test_padding_of_confidence_by_time_is_gone_in_the_mean(logits):
    """With the same logits at every step the sum grows surer, the mean does not."""
    same = np.repeat(logits[:1], X, axis=0)
    rising = stops(same, 1.0, temperature=3.0)[1]
    assert (np.diff(rising, axis=1) > 0).all()
    flat = stops(same, 1.0, temperature=3.0, accumulate="mean")[1]
    np.testing.assert_allclose(flat, np.repeat(flat[:, :1], X - 1, axis=1), rtol=1e-5)


@pytest.fixture(scope="module")
def held(logits):
    labels = np.random.default_rng(1).integers(0, C, B)
    right = (np.cumsum(logits, axis=0).argmax(-1) == labels).T
    return posthoc(logits, 3.0).T, right, np.linspace(1.0, 5.0, X)


def price(held, threshold):
    scores, right, costs = held
    stop = [next((t for t in range(X - 1) if scores[b, t] > threshold), X - 1) for b in range(B)]
    return np.mean(costs[stop]), np.mean([right[b, t] for b, t in enumerate(stop)])


@pytest.mark.parametrize("tolerance", [0.0, 0.05])
def test_the_cheapest_threshold_of_all_that_keep_the_accuracy(held, tolerance):
    candidates = np.linspace(0.2, 1.0, 41)
    found = cheapest_threshold(*held, tolerance=tolerance, candidates=candidates)
    full = held[1][:, -1].mean()
    fits = [
        one
        for one in map(lambda t: price(held, t), candidates)
        if one[1] >= full - tolerance - 1e-9
    ]
    assert found.cost == pytest.approx(min(cost for cost, _ in fits))
    assert (found.cost, found.accuracy) == pytest.approx(price(held, found.threshold))


def test_nobody_leaves_where_nothing_keeps_it(held):
    scores, right, costs = held
    right = np.zeros_like(right)
    right[:, -1] = True
    found = cheapest_threshold(scores, right, costs, candidates=np.asarray([0.3, 0.4]))
    assert found == Chosen(float("inf"), 5.0, 1.0)
    assert (leaves_above(scores, found.threshold) == X - 1).all()


def test_a_front_holds_what_nothing_beats(held):
    candidates = np.linspace(0.2, 1.0, 41)
    front = threshold_front(*held, candidates)
    everything = [price(held, t) for t in candidates]
    for one in front:
        assert not any(
            cost <= one.cost
            and accuracy >= one.accuracy
            and (cost, accuracy) != (one.cost, one.accuracy)
            for cost, accuracy in everything
            if cost < one.cost - 1e-12 or accuracy > one.accuracy + 1e-12
        )
    assert [one.cost for one in front] == sorted(one.cost for one in front)


def test_a_threshold_for_a_cost(held):
    scores, _, costs = held
    threshold = threshold_for_cost(scores, costs, 3.0)
    assert 2.5 < price(held, threshold)[0] <= 3.0
    assert price(held, threshold_for_cost(scores, costs, 0.5))[0] == 1.0


def test_shapes_that_disagree_are_refused(held, unchecked):
    scores, right, costs = held
    with pytest.raises(DyncompError, match=r"\[b x\]"):
        threshold_front(scores, right[:, 1:], costs)
    with pytest.raises(DyncompError, match="without NaN"):
        cheapest_threshold(np.full_like(scores, np.nan), right, costs)


def test_the_first_right_exit_bounds_accuracy_and_steps_of_what_is_right(held):
    scores, right, _ = held
    first = np.asarray(first_right(jnp.asarray(right.T)))
    for b in range(B):
        assert first[b] == next((t for t in range(X) if right[b, t]), X - 1)
    rows = np.arange(B)
    for threshold in (0.3, 0.5, 0.8):
        stop = leaves_above(scores, threshold)
        assert right[rows, first].mean() >= right[rows, stop].mean()
        good = right[rows, stop]
        assert (first[good] <= stop[good]).all() and good.any()


def test_the_controller_reads_the_calibration_split(logits, held):
    """A fake task and model: the controller's threshold is that of the same numbers without it."""
    scores, right, costs = held
    answers = np.cumsum(logits, axis=0)
    labels = np.where(right[:, -1], answers[-1].argmax(-1), (answers[-1].argmax(-1) + 1) % C)
    right = (answers.argmax(-1) == labels).T

    class Source:
        def __len__(self):
            return B

        def batch(self, rows):
            return {"inputs": rows, "targets": labels[rows], "mask": np.ones(len(rows), np.float32)}

    class Task:
        def source(self, split):
            assert split == "calibration"
            return Source()

    def forward(batch):
        rows = batch["inputs"]
        return {"logits": answers[:, rows], "scores": scores.T[:, rows], "costs": costs}, None

    class State(types.SimpleNamespace):
        def replace(self, **changes):
            return State(**{**vars(self), **changes})

    state = State(controls={"threshold": jnp.float32(0.0), "other": jnp.float32(3.0)})
    moved = KeepAccuracy(tolerance=0.05, batch_size=25)(state, forward, Task(), 1)
    wanted = cheapest_threshold(scores, right, costs, tolerance=0.05).threshold
    assert float(moved.controls["threshold"]) == pytest.approx(wanted)
    assert float(moved.controls["other"]) == 3.0


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0.0}, {"classes": 1}, {"accumulate": "max"}, {"score": "p"}]
)
def test_options_that_do_not_exist_are_refused(wrong, unchecked):
    with pytest.raises(DyncompError, match="use"):
        RunningSumRule(**{"classes": C, **wrong})
