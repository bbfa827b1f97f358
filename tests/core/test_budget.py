import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.core import budget
from dyncomp.core.errors import DyncompError


def test_target_losses_and_their_gradients():
    for usage, squared, hinge in [(1.5, 0.25, 0.5), (0.5, 0.25, 0.0)]:
        u = jnp.float32(usage)
        assert float(budget.target_loss(u, 1.0)) == squared
        assert float(budget.target_loss(u, 1.0, kind="hinge")) == hinge
        assert float(jax.grad(budget.target_loss)(u, 1.0)) == 2 * (usage - 1.0)


def test_dual_ascent_is_projected_and_converges():
    assert float(budget.dual_ascent(jnp.float32(0.1), jnp.float32(0.0), 1.0, 0.5)) == 0.0
    dual = jnp.float32(0)
    for _ in range(200):  # min (u - 2)^2 / 2 + dual u has u = 2 - dual, so u = 0.5 at dual 1.5
        dual = budget.dual_ascent(dual, 2 - dual, 0.5, 0.2)
    np.testing.assert_allclose(dual, 1.5, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 1.0])
def test_quantile_threshold_passes_the_share(share):
    scores = np.random.default_rng(0).permutation(40) / 40
    assert (scores >= budget.quantile_threshold(scores, share)).sum() == round(share * 40)


@pytest.mark.parametrize("q", [0.5, 1.0, 2.0])
def test_chain_reaches_the_distribution(q):
    rng = np.random.default_rng(1)
    scores = np.stack([rng.permutation(1000) for _ in range(3)], axis=1) / 1000
    shares = budget.geometric_shares(q, 4)
    np.testing.assert_allclose(shares[1:] / shares[:-1], q)
    thresholds = budget.chain_thresholds(scores, shares)
    leave = np.concatenate([scores >= thresholds, np.ones((1000, 1), bool)], axis=1)
    counts = np.bincount(leave.argmax(axis=1), minlength=4)
    assert np.abs(counts - 1000 * shares).max() <= 1 and counts.sum() == 1000


def test_bad_input_is_refused():
    with pytest.raises(DyncompError, match="shares"):
        budget.chain_thresholds(np.zeros((4, 2)), [0.5, 0.5])
    with pytest.raises(DyncompError, match="sum to 1"):
        budget.chain_thresholds(np.zeros((4, 1)), [0.5, 0.4])
    with pytest.raises(DyncompError, match="share"):
        budget.quantile_threshold(np.zeros(3), 1.5)
