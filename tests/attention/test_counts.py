"""Counts of real slots and where the real one of a number lies, against NumPy's running sums and searches."""

import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.attention.counts import counts_of, slots_of


@pytest.mark.parametrize("s", [1, 100, 128, 129, 1000])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_against_numpy(s, share):
    rng = np.random.default_rng(s)
    real = rng.random((3, s)) < share
    counts = np.asarray(counts_of(jnp.asarray(real)))
    np.testing.assert_array_equal(counts, np.cumsum(real, axis=1))
    rank = rng.integers(0, s + 3, (3, 40)).astype(np.int32)
    found = np.asarray(slots_of(jnp.asarray(counts), jnp.asarray(rank)))
    for row in range(3):
        wanted = np.searchsorted(counts[row], rank[row] + 1)
        np.testing.assert_array_equal(np.minimum(found[row], s), wanted)
    assert (np.asarray(slots_of(jnp.asarray(counts), jnp.full((3, 1), -5, jnp.int32))) == 0).all()
