"""The acting head against a plain loop in float64, and memory that only moves when it shall."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dyncomp.core.errors import DyncompError
from dyncomp.exits import ActionHead

HEAD = ActionHead(pose=2, hidden=3, layers=2, widths=(4,), dropout=0.4, lstm_dropout=0.3)
FEATURES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 6)), jnp.float32)


@pytest.fixture(scope="module")
def params():
    zeros = jnp.zeros((2, HEAD.state_size))
    return nn.meta.unbox(jax.jit(HEAD.init)(jax.random.key(0), FEATURES, zeros))["params"]


@pytest.fixture(scope="module")
def act(params):
    return jax.jit(lambda x, state: HEAD.apply({"params": params}, x, state))


def by_hand(params, features):
    """[b t 3] and the final (h, c) of both layers, one number after the other."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    sigmoid = lambda v: 1 / (1 + np.exp(-v))
    out, states = [], []
    for row in np.asarray(features, np.float64):
        memory = [[np.zeros(3), np.zeros(3)] for _ in range(2)]
        steps = []
        for x in row:
            for layer, (h, c) in enumerate(memory):
                z = x @ p[f"lstm_{layer}_kernel"] + h @ p[f"lstm_{layer}_state"]
                i, f, g, o = np.split(z + p[f"lstm_{layer}_bias"], 4)
                c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
                x = sigmoid(o) * np.tanh(c)
                memory[layer] = [x, c]
            ends = []
            for name in ("pose", "gripper"):
                y = np.maximum(x @ p[f"{name}_0_kernel"] + p[f"{name}_0_bias"], 0)
                ends.append(y @ p[f"{name}_1_kernel"] + p[f"{name}_1_bias"])
            steps.append(np.concatenate([np.tanh(ends[0]), ends[1]]))
        out.append(steps)
        states.append(np.ravel(memory))
    return np.asarray(out), np.asarray(states)


def test_matches_a_loop_in_float64(params, act):
    zeros = jnp.zeros((2, HEAD.state_size))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        said, after = act(FEATURES, zeros)
    wanted, memory = by_hand(params, FEATURES)
    np.testing.assert_allclose(said, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after, memory, rtol=1e-4, atol=1e-5)


def test_step_by_step_equals_the_window(params):
    one = jax.jit(lambda x, state: HEAD.apply({"params": params}, x, state))
    state, said = jnp.zeros((2, HEAD.state_size)), []
    for t in range(5):
        now, after = one(FEATURES[:, t : t + 1], state)
        again, _ = one(FEATURES[:, t : t + 1] + 1, state)  # a question whose memory is thrown away
        assert not np.allclose(now, again)
        said.append(now)
        state = after
    np.testing.assert_allclose(
        np.concatenate(said, 1), by_hand(params, FEATURES)[0], rtol=1e-4, atol=1e-5
    )


def test_dropout_acts_only_while_training(params):
    zeros = jnp.zeros((2, HEAD.state_size))
    call = lambda seed: HEAD.apply(
        {"params": params}, FEATURES, zeros, train=True, rngs={"dropout": jax.random.key(seed)}
    )[0]
    assert not np.allclose(call(0), call(1))


def test_price_and_refusals():
    # LSTM: 2 * 4k * (in + k) twice; MLPs: 3 x 4 and 4 x 2, and 3 x 4 and 4 x 1.
    flops = 2 * 12 * (6 + 3) + 2 * 12 * (3 + 3) + 2 * (12 + 8) + 2 * (12 + 4)
    assert HEAD.cost(6).flops == flops
    with pytest.raises(DyncompError, match="hidden=0"):
        ActionHead(hidden=0)
