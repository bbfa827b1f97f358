"""experts.MoE with routers.TopK against the Mixtral block of transformers; the balance loss against two others."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.core import choose
from dyncomp.experts import MoE
from dyncomp.routers import TopK, balance_loss

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.peers

E, K, B, T, D, F = 8, 2, 3, 17, 16, 24
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(B, T, D)), jnp.float32)
COTANGENT = jnp.asarray(RNG.normal(size=(B, T, D)), jnp.float32)


def tensor(x):
    return torch.from_numpy(np.array(x))


def convert(tensors):
    """Their parameters, or gradients, by name -> ours. They fuse gate and up into one matrix, rows first."""
    both = tensors["experts.gate_up_proj"].transpose(0, 2, 1)
    return {
        "router": {"kernel": tensors["gate.weight"].T},
        "gate": both[..., :F],
        "up": both[..., F:],
        "down": tensors["experts.down_proj"].transpose(0, 2, 1),
    }


@pytest.fixture(scope="module")
def theirs(peer):
    """Their block's weights, output and gradients of sum(output * COTANGENT)."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K
    )
    config._experts_implementation = "eager"
    block = peer.randomize(MixtralSparseMoeBlock(config), scale=0.4)
    x = tensor(X).requires_grad_()
    y = block(x)
    (y * tensor(COTANGENT)).sum().backward()
    named = dict(block.named_parameters())
    return SimpleNamespace(
        params=convert({name: peer.array(p) for name, p in named.items()}),
        grads=convert({name: peer.array(p.grad) for name, p in named.items()}),
        y=peer.array(y),
        x_grad=peer.array(x.grad),
    )


@pytest.mark.parametrize("dispatch", ["dropless", "mask", "gather", "capacity"])
def test_block_under_every_dispatch(peer, theirs, dispatch):
    """Softmax over all experts, the two best, renormalised; a capacity of all rows drops nothing."""
    moe = MoE(
        router=functools.partial(TopK, k=K, renormalize=True),
        num_experts=E,
        hidden=F,
        dispatch=dispatch,
        capacity_factor=float(E),
    )

    def loss(params, x):
        y, aux = moe.apply({"params": params}, x)
        return jnp.sum(y * COTANGENT), (y, aux)

    grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (params, x), (y, aux) = grad(theirs.params, X)
    peer.close(y, theirs.y)
    peer.close(params, theirs.grads)
    peer.close(x, theirs.x_grad)
    assert int(aux.events["experts"]["rows"].needed) == B * T * K


@pytest.mark.parametrize("padded", [False, True])
def test_balance_loss_is_mixtrals(peer, padded):
    """The same number for one layer, no factor between: f counts all k choices in both, so its sum is k, not 1.

    Mixtral averages f and Q over all layers before it multiplies; ours is one loss a layer, and the objective
    averages the products. Over several layers the two agree only where the layers do.
    """
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = jnp.asarray(2 * RNG.normal(size=(B * T, E)), jnp.float32)
    mask = jnp.asarray(RNG.integers(0, 2, B * T), jnp.float32) if padded else None

    def ours(logits):
        probabilities = jax.nn.softmax(logits, axis=-1)
        plan = choose.top_k(probabilities, K)
        return balance_loss(probabilities, plan if mask is None else plan.masked(mask), mask)

    value, grad = jax.value_and_grad(ours)(logits)
    peers_logits = tensor(logits).requires_grad_()
    peers_mask = None if mask is None else tensor(mask).reshape(B, T)
    expected = load_balancing_loss_func((peers_logits,), E, K, peers_mask)
    expected.backward()
    peer.close(value, peer.array(expected), rtol=1e-6)
    peer.close(grad, peer.array(peers_logits.grad), atol=1e-8)
    assert float(value) > K * 1.01  # a perfectly even router would give k


def test_balance_loss_is_switchs_on_one_group(peer):
    """Top-1: e * sum f Q for each group (sequence), then the mean over groups; ours takes all rows as one group."""
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        load_balancing_loss_func,
    )

    probabilities = jax.nn.softmax(jnp.asarray(2 * RNG.normal(size=(B, T, E)), jnp.float32))
    groups = [balance_loss(rows, choose.top_k(rows, 1)) for rows in probabilities]
    expected = load_balancing_loss_func(
        tensor(probabilities), tensor(jnp.argmax(probabilities, axis=-1))
    )
    peer.close(jnp.mean(jnp.stack(groups)), peer.array(expected), rtol=1e-6)
    rows = probabilities.reshape(1, B * T, E)
    whole = load_balancing_loss_func(tensor(rows), tensor(jnp.argmax(rows, axis=-1)))
    peer.close(balance_loss(rows[0], choose.top_k(rows[0], 1)), peer.array(whole), rtol=1e-6)
    assert abs(float(whole - expected)) > 1e-3  # so grouping is a real difference
