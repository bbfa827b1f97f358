"""training.AdamW and training.SGD against torch.optim, with torch's own schedulers and clipping, over twenty steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dyncomp.training.optimizers import SGD, AdamW

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.peers

STEPS, WARMUP, FINAL = 20, 5, 0.1
RNG = np.random.default_rng(0)
SHAPES = {"w1": (4, 8), "b1": (8,), "w2": (8, 3), "b2": (3,)}
START = {k: jnp.asarray(RNG.normal(size=s), jnp.float32) for k, s in SHAPES.items()}
X = np.asarray(RNG.normal(size=(STEPS, 16, 4)), np.float32)
Y = np.asarray(3 * RNG.normal(size=(STEPS, 16, 3)), np.float32)


def train_ours(optimizer):
    """Parameters after each step of a two-layer regression, and the gradient norms."""

    def loss(p, x, y):
        return jnp.mean((jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"] - y) ** 2)

    tx, params, norms, path = optimizer.build(STEPS), START, [], []
    state = tx.init(params)

    @jax.jit
    def step(params, state, x, y):
        grads = jax.grad(loss)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, optax.tree.norm(grads)

    for x, y in zip(X, Y, strict=True):
        params, state, norm = step(params, state, x, y)
        path.append(params)
        norms.append(float(norm))
    return path, norms


def train_theirs(make, clip, scheduler):
    """The same in torch; ``make`` builds the optimizer from named parameters."""
    p = {k: torch.from_numpy(np.array(v)).requires_grad_() for k, v in START.items()}
    optimizer, path = make(p), []
    rates = scheduler(optimizer)
    for x, y in zip(map(torch.from_numpy, X), map(torch.from_numpy, Y), strict=True):
        optimizer.zero_grad()
        loss = ((torch.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"] - y) ** 2).mean()
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(p.values(), clip)
        optimizer.step()
        rates.step()
        path.append({k: jnp.asarray(v.detach().numpy().copy()) for k, v in p.items()})
    return path


def scheduler(kind, peak):
    """Linear warm-up from 1/WARMUP of the peak, then torch's cosine or linear decay, or nothing."""
    schedules, rest = torch.optim.lr_scheduler, STEPS - WARMUP

    def make(optimizer):
        ramp = schedules.LinearLR(optimizer, 1 / WARMUP, 1.0, WARMUP)
        after = {
            "cosine": lambda: schedules.CosineAnnealingLR(optimizer, rest, peak * FINAL),
            "linear": lambda: schedules.LinearLR(optimizer, 1.0, FINAL, rest),
            "constant": lambda: schedules.ConstantLR(optimizer, 1.0, 1),
        }[kind]()
        return schedules.SequentialLR(optimizer, [ramp, after], [WARMUP])

    return make


OPTIONS = {"warmup_steps": WARMUP, "final_fraction": FINAL}


@pytest.mark.parametrize("clip", [0.0, 4.0])
@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_adamw(peer, kind, clip):
    """Decay on matrices only, by torch's parameter groups; some steps clip, some do not."""
    rate, decay = 0.02, 0.3
    ours, norms = train_ours(
        AdamW(learning_rate=rate, schedule=kind, weight_decay=decay, clip_norm=clip, **OPTIONS)
    )

    def make(p):
        groups = [
            {"params": [p["w1"], p["w2"]], "weight_decay": decay},
            {"params": [p["b1"], p["b2"]], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8)

    theirs = train_theirs(make, clip, scheduler(kind, rate))
    peer.close(ours, theirs)
    if clip:
        assert min(norms) < clip < max(norms)


@pytest.mark.parametrize(
    "momentum, decay, clip", [(0.9, 5e-2, 4.0), (0.0, 0.0, 0.0), (0.9, 0.0, 0.0)]
)
def test_sgd(peer, momentum, decay, clip):
    """Momentum without dampening; decay is added to every leaf's clipped gradient (coupled)."""
    rate = 0.05
    ours, _ = train_ours(
        SGD(learning_rate=rate, momentum=momentum, weight_decay=decay, clip_norm=clip, **OPTIONS)
    )

    def make(p):
        return torch.optim.SGD(p.values(), lr=rate, momentum=momentum, weight_decay=decay)

    peer.close(ours, train_theirs(make, clip, scheduler("cosine", rate)))
