"""Cross-attention against a plain loop in float64, its events and its price."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dyncomp.attention import MediaAttention
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Ledger

CROSS = MediaAttention(heads=2, head_dim=3)
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)
MEDIA = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 6)), jnp.float32)
REAL = jnp.asarray([[1, 1, 0], [1, 1, 1]])


def test_matches_a_loop_and_counts_what_it_did(strict):
    params = nn.meta.unbox(jax.jit(CROSS.init)(jax.random.key(0), X, MEDIA))["params"]
    y, aux = jax.jit(lambda x, m: CROSS.apply({"params": params}, x, m, REAL))(X, MEDIA)
    p = {name: np.asarray(value["kernel"], np.float64) for name, value in params.items()}
    for b in range(2):
        for t in range(3):
            total = np.zeros(4)
            for h in range(2):
                q = np.asarray(X, np.float64)[b, t] @ p["q"][:, h]
                k, v = (np.asarray(MEDIA, np.float64)[b] @ p[name][:, h] for name in ("k", "v"))
                weights = np.exp(k @ q / np.sqrt(3))
                total += (weights / weights.sum()) @ v @ p["out"][h]
            np.testing.assert_allclose(y[b, t], total, rtol=1e-4, atol=1e-5)
    ledger = Ledger(CROSS.cost(4, 6)).record(aux.events)
    # Needed: five real positions; executed: six. Each reads five tokens of its own example.
    pair, row, token = 4 * 6, 2 * 2 * 4 * 6, 2 * 2 * 6 * 6
    assert ledger.total("needed") == 5 * row + 10 * token + 25 * pair
    assert ledger.total("executed") == 6 * row + 10 * token + 30 * pair


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(DyncompError, match="set head_dim"):
        MediaAttention(heads=3).width(4)
