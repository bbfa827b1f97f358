"""Calibration and controllers against hand-made cases and brute force."""

import numpy as np
import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.exits import calibration as cal
from dyncomp.exits.controllers import HeadPatience, positive_weights

RNG = np.random.default_rng(0)


def test_ece_by_hand():
    # Two bins of two: confidence .95 with accuracy .5, confidence .65 with accuracy 1.
    p = np.asarray([[0.95, 0.05], [0.95, 0.05], [0.65, 0.35], [0.65, 0.35]])
    labels = np.asarray([0, 1, 0, 0])
    assert cal.ece(p, labels, bins=10) == pytest.approx(0.5 * 0.45 + 0.5 * 0.35)


def test_brier_by_hand():
    p = np.asarray([[0.8, 0.2], [0.3, 0.7]])
    assert cal.brier(p, np.asarray([0, 0])) == pytest.approx((0.04 + 0.04 + 0.49 + 0.49) / 2)


def test_conformal_quantile_rank():
    scores = np.arange(1, 100) / 100.0  # n = 99: rank ceil(100 * .95) = 95
    assert cal.conformal_quantile(scores, 0.05) == pytest.approx(0.95)
    assert cal.conformal_quantile(scores[:10], 0.05) == np.inf


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_sets_cover_at_the_promised_rate():
    n, x, c = 20_000, 3, 5
    labels = RNG.integers(0, c, n)
    p = softmax(RNG.normal(size=(x, n, c)) + 2 * np.eye(c)[labels])
    exits = RNG.integers(0, x, n)
    half = n // 2
    tau = cal.conformal_thresholds(p[:, :half], labels[:half], exits[:half], 0.1)
    sets = cal.prediction_sets(p[:, half:], exits[half:], tau)
    assert cal.coverage(sets, labels[half:]) == pytest.approx(0.9, abs=0.015)


def test_rarely_used_exits_borrow_all_examples():
    n = 400
    p = softmax(RNG.normal(size=(2, n, 3)))
    labels, exits = RNG.integers(0, 3, n), np.zeros(n, int)
    exits[:20] = 1  # not more than 20
    tau = cal.conformal_thresholds(p, labels, exits, 0.1)
    everyone = 1 - p[1, np.arange(n), labels]
    assert tau[1] == np.sort(everyone)[int(np.ceil(401 * 0.9)) - 1]
    exits[:21] = 1
    tau = cal.conformal_thresholds(p, labels, exits, 0.1)
    assert tau[1] == np.sort(everyone[:21])[int(np.ceil(22 * 0.9)) - 1]


def test_chain_thresholds_reach_the_wanted_shares():
    n = 1000
    scores = RNG.uniform(size=(3, n))
    target = np.asarray([0.2, 0.0, 0.35, 0.45])
    tau = cal.chain_thresholds(scores, target)
    leave = scores >= tau[:, None]
    exits = np.where(leave.any(0), leave.argmax(0), 3)
    np.testing.assert_array_equal(np.bincount(exits, minlength=4), [200, 0, 350, 450])
    # Who leaves first are the surest.
    assert scores[0][exits == 0].min() > scores[0][exits != 0].max()


def test_chain_thresholds_at_the_ends():
    scores = RNG.uniform(size=(2, 50))
    assert np.isinf(cal.chain_thresholds(scores, np.asarray([0.0, 0.0, 1.0]))).all()
    tau = cal.chain_thresholds(scores, np.asarray([1.0, 0.0, 0.0]))
    assert (scores[0] >= tau[0]).all() and np.isinf(tau[1])
    with pytest.raises(DyncompError, match="sum to 1"):
        cal.chain_thresholds(scores, np.asarray([0.5, 0.5, 0.5]))


def test_positive_weights():
    best = np.asarray(
        [0] * 10 + [1] * 80 + [3] * 10
    )  # N = 100; exit 2 never best; 3 is the final one
    np.testing.assert_allclose(positive_weights(best, 3), [5.0, 0.25, 5.0])


def test_patience_freezes_heads_one_by_one_at_their_best():
    patience = HeadPatience(2, patience=2)
    heads = lambda v: {"kernel": np.full((2, 3), v, np.float32)}
    losses = [[3.0, 3.0], [2.0, 2.0], [2.5, 1.0], [2.6, 0.9], [0.1, 0.8]]
    after = [patience.update(np.asarray(loss), heads(i)) for i, loss in enumerate(losses)]
    # Head 0 was best at validation 1 and frozen at 3; its later luck does not count.
    np.testing.assert_array_equal(np.asarray(after[3]["kernel"])[:, 0], [1, 3])
    np.testing.assert_array_equal(np.asarray(after[4]["kernel"])[:, 0], [1, 4])
    np.testing.assert_array_equal(patience.frozen, [True, False])
    np.testing.assert_array_equal(np.asarray(patience.restore()["kernel"])[:, 0], [1, 4])
