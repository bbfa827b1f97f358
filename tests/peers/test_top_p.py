"""Top-p expert routing (arXiv 2403.07652) against an independent torch version of the released rule.

The rule: sort probabilities, cumulative sum, compare with p strictly, keep up to and including the first position that
crosses; weights are the raw softmax values; experts are a dropless loop with ``index_add``.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.core import choose, dispatch
from dyncomp.experts import MoE, SwiGLUBank
from dyncomp.routers import TopP

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.peers

N, D, F, E = 40, 12, 10, 8
THRESHOLDS = [0.0, 0.2, 0.4, 0.9, 1.0]


def tensor(x):
    return torch.from_numpy(np.array(x))


def nucleus(probabilities, p):
    """The released rule: dense gates [n e] and the mask of kept experts."""
    ranked, order = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    crossed = torch.cumsum(ranked, dim=-1) > p
    first = crossed.long().argmax(dim=-1, keepdim=True)  # 0 where nothing crosses ...
    later = torch.arange(ranked.shape[-1]) > first
    dropped = torch.zeros_like(crossed).scatter(-1, order, crossed & later)  # ... and all stay
    return torch.where(dropped, torch.zeros_like(probabilities), probabilities), ~dropped


def experts_loop(x, gates, kept, gate, up, down):
    """One expert after the other on the rows that chose it."""
    y = torch.zeros_like(x)
    for e in range(gates.shape[1]):
        rows = kept[:, e].nonzero()[:, 0]
        h = torch.nn.functional.silu(x[rows] @ gate[e]) * (x[rows] @ up[e])
        y = y.index_add(0, rows, (h @ down[e]) * gates[rows, e, None])
    return y


def draw(seed, temperature=1.0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    weights = {"gate": normal(E, D, F), "up": normal(E, D, F), "down": normal(E, F, D)}
    weights = {name: 0.3 * w for name, w in weights.items()}
    router = {"kernel": normal(D, E) * temperature / np.sqrt(D)}
    return SimpleNamespace(
        params={"router": router, **weights}, x=normal(1, N, D), cotangent=normal(1, N, D)
    )


def losses(logits, probabilities, kept):
    """Entropy and balance as in the paper: E sum_i f_i Q_i, f_i the share of rows that keep expert i."""
    entropy = -(probabilities * torch.log_softmax(logits, -1)).sum(-1).mean()
    balance = E * (kept.float().mean(0) * probabilities.mean(0)).sum()
    return {"entropy": entropy, "balance": balance}


def train_theirs(case, p):
    """Output, kept mask, losses and gradients of sum(y cotangent) + losses."""
    leaves = {k: tensor(v).requires_grad_() for k, v in case.params.items() if k != "router"}
    kernel = tensor(case.params["router"]["kernel"]).requires_grad_()
    x = tensor(case.x[0]).requires_grad_()
    logits = x @ kernel
    probabilities = torch.softmax(logits, dim=-1)
    gates, kept = nucleus(probabilities, p)
    y = experts_loop(x, gates, kept, **leaves)
    extra = losses(logits, probabilities, kept)
    ((y * tensor(case.cotangent[0])).sum() + sum(extra.values())).backward()
    grads = {k: v.grad.numpy() for k, v in leaves.items()}
    grads |= {"router": {"kernel": kernel.grad.numpy()}}
    extra = {name: value.detach().numpy() for name, value in extra.items()}
    return y.detach().numpy(), kept.numpy(), extra, (grads, x.grad.numpy()[None])


@functools.lru_cache
def ours(dispatch_name):
    router = functools.partial(TopP, p=0.4)
    options = {"dispatch": dispatch_name, "capacity_factor": float(E)}  # nothing is dropped
    moe = MoE(router=router, num_experts=E, hidden=F, **options)

    traces = []

    def loss(params, x, cotangent, p):
        traces.append(1)
        variables = {"params": params, "controls": {"router": {"p": p}}}
        y, aux = moe.apply(variables, x, capture=("plan",))
        extra = {name: aux.losses[name] for name in ("entropy", "balance")}
        total = jnp.sum(y * cotangent) + sum(extra.values())
        return total, (y, aux.plans["route"], extra)

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True)), traces


@pytest.mark.parametrize("dispatch_name", ["dropless", "mask", "gather", "capacity"])
@pytest.mark.parametrize("p", THRESHOLDS)
def test_layer(peer, p, dispatch_name):
    """Plan, output, losses and every gradient; one compilation serves all thresholds."""
    step, traces = ours(dispatch_name)
    for seed, temperature in [(0, 1.0), (1, 3.0)]:
        case = draw(seed, temperature)
        out = step(case.params, case.x, case.cotangent, jnp.float32(p))
        grads, (y, plan, extra) = out
        expected, kept, their_losses, their_grads = train_theirs(case, p)
        np.testing.assert_array_equal(plan.replace(weights=1.0 * plan.keep).one_hot(E), kept)
        peer.close(y[0], expected)
        peer.close(extra, their_losses, rtol=1e-5)
        peer.close(grads, their_grads)
    assert len(traces) == 1


@pytest.mark.parametrize("experts", [4, 16, 64])
@pytest.mark.parametrize("p", THRESHOLDS[:-1])
def test_plans_of_many_rows(p, experts):
    """Flat to peaked rows; the slots that `TopP.max_p` = p allows never cut one short."""
    rng = np.random.default_rng(experts)
    logits = rng.normal(size=(5000, experts)) * rng.uniform(0, 6, size=(5000, 1))
    probabilities = jax.nn.softmax(jnp.asarray(logits, jnp.float32))
    gates, kept = nucleus(tensor(probabilities), p)
    slots = TopP(num_experts=experts, p=p, max_p=p).slots
    plan = choose.top_p(probabilities, jnp.float32(p), max_slots=slots)
    assert slots == min(experts, int(p * experts) + 1)
    np.testing.assert_array_equal(plan.one_hot(experts), gates.numpy())
    np.testing.assert_array_equal(plan.counts(), kept.sum(-1).numpy())
    assert (kept.sum(-1) >= 1).all() and bool((kept.sum(-1) > 1).any()) == (p * experts >= 1)


def test_exact_ties_at_the_threshold():
    """Masses that are powers of two: reaching p exactly is not crossing it."""
    probabilities = jnp.asarray([[0.5, 0.25, 0.125, 0.125], [0.125, 0.5, 0.125, 0.25]])
    for p, count in [(0.25, 1), (0.5, 2), (0.75, 3), (0.8, 3), (0.875, 4)]:
        _, kept = nucleus(tensor(probabilities), p)
        plan = choose.top_p(probabilities, jnp.float32(p))
        assert plan.counts().tolist() == kept.sum(-1).tolist() == [count, count]


def test_p_of_one_keeps_what_rounding_drops_in_the_released_code():
    """A float32 cumulative sum can pass 1 early: theirs then loses experts, of hardly any mass; ours keeps all."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(3 * rng.normal(size=(5000, 64)), jnp.float32)
    probabilities = jax.nn.softmax(logits)
    gates, kept = nucleus(tensor(probabilities), 1.0)
    plan = choose.top_p(probabilities, jnp.float32(1.0))
    assert bool(plan.keep.all()) and not bool(kept.all())
    np.testing.assert_allclose(plan.one_hot(64), gates.numpy(), atol=1e-5, rtol=0)


def test_dropless_with_idle_experts(peer):
    """The loop and `dispatch.dropless` where some experts get no row and some rows no expert, gates included."""
    case, rng = draw(2), np.random.default_rng(3)
    scores = jnp.asarray(rng.uniform(size=(N, E)) * (np.arange(E) % 3 > 0), jnp.float32)
    bank = SwiGLUBank(*(case.params[name] for name in ("gate", "up", "down")))

    def loss(scores, x, bank):
        plan = choose.threshold(scores, jnp.float32(0.7))
        y, stats = dispatch.dropless(plan, x, bank, E)
        return jnp.sum(y * case.cotangent[0]), (y, plan.load(E))

    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    grads, (y, load) = grad(scores, case.x[0], bank)
    leaves = [tensor(a).requires_grad_() for a in (scores, case.x[0], *jax.tree.leaves(bank))]
    gates, x, *weights = leaves
    kept = gates >= 0.7
    expected = experts_loop(x, gates, kept, *weights)
    (expected * tensor(case.cotangent[0])).sum().backward()
    assert load.tolist() == kept.sum(0).tolist() and load[0] == 0 and not kept.any(1).all()
    peer.close(y, peer.array(expected))
    peer.close(jax.tree.leaves(grads), [peer.array(leaf.grad) for leaf in leaves])
