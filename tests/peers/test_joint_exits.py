"""Jointly learned exits (JEI-DNN, arXiv 2310.09163) against an independent torch version of the released code.

The torch side is float64 and written from the method: exit mass, hazard in its product form, the exit rule, the three
weightings of the heads' loss, the gates' targets and loss, the warm-up weights.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.exits import (
    ExitBank,
    GateRule,
    JointExitObjective,
    MultiExitObjective,
    decide,
    gate_features,
)
from dyncomp.exits.rules import exit_mass, hazards

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.peers

Y, B, D, C = 4, 48, 10, 6
REWEIGHTS = ["paper", "boosted_sg", "official_identity"]


def tensor(x):
    return torch.from_numpy(np.array(x, np.float64))


def masses(g):
    """P_l = max(0, min(g_l, 1 - sum of earlier g)); g [y b]."""
    earlier = torch.cumsum(g, 0) - g
    return torch.clamp(torch.minimum(g, 1 - earlier), min=0)


def hazards_by_product(g):
    """h_l = clip(P_l / prod_{j<l} (1 - h_j), 0, 1); 0/0 is NaN in the released code, 0 here."""
    p, survival, out = masses(g), torch.ones_like(g[0]), []
    for row in p:
        hazard = torch.nan_to_num((row / survival).clamp(0, 1), nan=0.0)
        out.append(hazard)
        survival = survival * (1 - hazard)
    return torch.stack(out)


def features(logits):
    """Max p, entropy, margin, entropy of the squared and renormalised distribution."""
    p = torch.softmax(logits, -1).detach()
    entropy = lambda q: -(q * torch.log(q)).sum(-1)
    best = torch.topk(p, 2, dim=-1).values
    squared = p**2 / (p**2).sum(-1, keepdim=True)
    parts = (best[..., 0], entropy(p), best[..., 0] - best[..., 1], entropy(squared))
    return torch.stack(parts, -1)


class Theirs:
    """Heads and gates with the same parameters, float64."""

    def __init__(self, params, inputs, final, labels):
        flat, self.tree = jax.tree.flatten(params)
        self.leaves = [tensor(leaf).requires_grad_() for leaf in flat]
        p = jax.tree.unflatten(self.tree, self.leaves)
        heads, gates = p["heads"], p["gates"]
        logits = torch.einsum("ybd,ydc->ybc", tensor(inputs), heads["logits_kernel"])
        self.logits = logits + heads["logits_bias"][:, None]
        u = features(self.logits)
        self.gates = torch.einsum("ybu,yu->yb", u, gates["weight"]) + gates["bias"][:, None]
        self.labels = torch.from_numpy(np.array(labels)).long()
        self.everything = torch.cat([self.logits, tensor(final)[None]])

    def ce(self, logits):
        rows = [torch.nn.functional.cross_entropy(z, self.labels, reduction="none") for z in logits]
        return torch.stack(rows)

    def grads(self, loss):
        grads = torch.autograd.grad(loss, self.leaves, retain_graph=True, allow_unused=True)
        pairs = zip(grads, self.leaves, strict=True)
        full = [torch.zeros_like(leaf) if g is None else g for g, leaf in pairs]
        return jax.tree.unflatten(self.tree, [g.numpy() for g in full])


@pytest.fixture
def case():
    """A problem whose gates spend all mass on some examples and almost none on others."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    bank = ExitBank(exits=Y, classes=C)
    params = {
        "heads": {"logits_kernel": 0.5 * normal(Y, D, C), "logits_bias": normal(Y, C)},
        "gates": {"weight": normal(Y, 4), "bias": normal(Y) - 1.0},
    }
    labels = jnp.asarray(rng.integers(0, C, B), jnp.int32)
    inputs, final = normal(Y, B, D), 2 * normal(B, C)
    costs = jnp.asarray([0.15, 0.4, 0.6, 0.8, 1.0], jnp.float32)
    pos_weight = jnp.asarray([5.0, 1.5, 0.7, 2.0], jnp.float32)

    def output(params):
        logits, gates = bank.apply({"params": params}, inputs)
        logits = jnp.concatenate([logits, final[None]])
        return {"logits": logits, "gates": gates, "costs": costs, "pos_weight": pos_weight}

    batch = {"targets": labels, "mask": jnp.ones(B, jnp.float32)}
    theirs = Theirs(params, inputs, final, labels)
    return SimpleNamespace(**locals())


@pytest.mark.parametrize("shift", [-3.0, -1.0, 1.0])
def test_mass_hazard_and_exit_rule(peer, shift):
    """Random gates, from hardly any mass to all of it spent at the first exits."""
    rng = np.random.default_rng(1)
    a = jnp.asarray(shift + 1.5 * rng.normal(size=(Y, 4000)), jnp.float32)
    g = torch.sigmoid(tensor(a))
    hazard = hazards_by_product(g)
    peer.close(exit_mass(jax.nn.sigmoid(a)), masses(g).numpy())
    peer.close(hazards(jax.nn.sigmoid(a)), hazard.numpy(), atol=1e-4)
    leaves = torch.cat([hazard >= 0.5, torch.ones(1, a.shape[1], dtype=torch.bool)])
    first = leaves.long().argmax(0).numpy()
    plan = decide(GateRule(), jnp.zeros((Y, a.shape[1], C)), a, jnp.full((Y,), 0.5))
    sure = (torch.abs(hazard - 0.5) > 1e-5).all(0).numpy()  # not decided by rounding
    assert sure.mean() > 0.99 and len(np.unique(first)) > 2
    np.testing.assert_array_equal(np.asarray(plan.exit)[sure], first[sure])


def test_features_and_gates(peer, case):
    out = case.output(case.params)
    peer.close(gate_features(out["logits"][:-1]), features(case.theirs.logits).detach().numpy())
    peer.close(out["gates"], case.theirs.gates.detach().numpy(), atol=2e-5)


def their_head_loss(theirs, reweight):
    """Classifier phase; only the released code differentiates the ratio."""
    ce = theirs.ce(theirs.logits)
    p = masses(torch.sigmoid(theirs.gates)).detach()
    if reweight == "paper":
        return (p * ce).sum(0).mean()
    ratio = ce.sum(0) / (p * ce).sum(0)
    if reweight == "boosted_sg":
        ratio = ratio.detach()
    return (ratio * p * ce).mean()  # over the batch and the exits


@pytest.mark.parametrize("reweight", REWEIGHTS)
def test_classifier_phase(peer, case, reweight):
    objective = JointExitObjective(reweight=reweight)
    loss_fn = lambda params: objective.heads(case.output(params), case.batch)
    loss, grads = jax.value_and_grad(loss_fn)(case.params)
    expected = their_head_loss(case.theirs, reweight)
    peer.close(loss, expected.detach().numpy())
    peer.close(grads, case.theirs.grads(expected))
    assert not np.any(grads["gates"]["weight"]) and np.any(grads["heads"]["logits_kernel"])


def test_released_weighting_is_uniform_training(peer, case):
    """Torch autograd alone: with the ratio differentiated, value and gradient are those of the mean over exits.

    Hence the gates do not matter; with the ratio held constant they do, though the value stays the same.
    """
    uniform = case.theirs.ce(case.theirs.logits).mean()
    official = their_head_loss(case.theirs, "official_identity")
    held = their_head_loss(case.theirs, "boosted_sg")
    grads = case.theirs.grads(uniform)
    peer.close(official.item(), uniform.item(), rtol=1e-12)
    peer.close(held.item(), uniform.item(), rtol=1e-12)
    peer.close(case.theirs.grads(official), grads, rtol=1e-9, atol=1e-12)
    gap = case.theirs.grads(held)["heads"]["logits_kernel"] - grads["heads"]["logits_kernel"]
    assert np.abs(gap).max() > 0.1 * np.abs(grads["heads"]["logits_kernel"]).max()


@pytest.mark.parametrize("lam", [0.05, 0.7, 4.0])
def test_gate_phase(peer, case, lam):
    """Cumulative targets of argmin CE_l + lambda c_l, the final classifier among them; torch's own weighted BCE."""
    objective = JointExitObjective(lam=lam)
    loss_fn = lambda params: objective.gate(case.output(params), case.batch)
    loss, grads = jax.value_and_grad(loss_fn)(case.params)
    theirs = case.theirs
    ce = theirs.ce(theirs.everything).detach()
    best = (ce + lam * tensor(case.costs)[:, None]).argmin(0)
    targets = (torch.arange(Y)[:, None] >= best[None]).double()
    bce = torch.nn.functional.binary_cross_entropy_with_logits(
        theirs.gates, targets, pos_weight=tensor(case.pos_weight)[:, None]
    )
    np.testing.assert_array_equal(objective.best(case.output(case.params), case.batch), best)
    peer.close(loss, bce.detach().numpy())
    peer.close(grads, theirs.grads(bce))
    assert len(torch.unique(best)) > (1 if lam > 1 else 3)


def test_warm_up(peer, case):
    """CE_final without gradient + sum over l of (y + 2 - l) CE_l: weights y + 1 down to 2."""
    loss_fn = lambda params: MultiExitObjective()(case.output(params), None, case.batch, 0)[0]
    loss, grads = jax.value_and_grad(loss_fn)(case.params)
    ce = case.theirs.ce(case.theirs.everything)
    weights = tensor([5.0, 4.0, 3.0, 2.0])[:, None]
    expected = (ce[-1].detach() + (weights * ce[:-1]).sum(0)).mean()
    peer.close(loss, expected.detach().numpy())
    peer.close(grads, case.theirs.grads(expected))
