"""Jointly learned exits and heads (arXiv 2310.09163) on Fashion-MNIST, against thresholds and random exits.

A tiny vision transformer is trained and frozen, the pooled features after all its blocks are computed once, and every
arm then trains or evaluates heads and gates on them. Positive weights come from the validation split, thresholds and
conformal quantiles from the calibration split; test labels only score (and serve the oracle, which is a bound).
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from dyncomp.attention import Attention
from dyncomp.core.rng import fold
from dyncomp.evidence.seed import load_module
from dyncomp.exits import ExitBank, GateRule, JointExitObjective, MultiExitObjective, decide
from dyncomp.exits import calibration as cal
from dyncomp.exits.controllers import HeadPatience, positive_weights
from dyncomp.exits.oracle import best_exit, cross_entropy
from dyncomp.experts import MLP
from dyncomp.models import Block, Group, VisionTransformer
from dyncomp.models.exiting import ExitingClassifier
from dyncomp.tasks import FashionMNIST

TITLE = "Jointly learned exits and heads"
COMPUTE = "cost"
METRICS = {
    "accuracy": {"text": "percent of the test images"},
    "cost": {"text": "mean FLOPs of a test image; the whole network is 1", "minimize": True},
    "ece": {"text": "expected calibration error of the emitted probability", "minimize": True},
    "set_size": {"text": "classes in the conformal set at 95%", "minimize": True},
    "coverage": {"text": "share of test images whose conformal set holds their class"},
}
PICTURES = Path(__file__).with_name("pictures.py")
LAMBDAS = (0.05, 0.2, 0.5, 1.0, 2.0)
METHODS = ("jei", "threshold", "random", "oracle", "uniform", "official")
ARMS = ["static", *METHODS, *(f"{method}_{lam:g}" for method in METHODS for lam in LAMBDAS)]
TRIALS = dict.fromkeys(ARMS, 1)  # nothing was tuned, on either side

DEPTH, CLASSES, PERIOD, ALPHA, SHUFFLES = 6, 10, 200, 0.05, 10
RATES = {"heads": 1e-3, "gates": 1e-2}


@dataclasses.dataclass(frozen=True)
class Lengths:
    """How long to train; an epoch of heads and gates is 800 batches of 64 (51,200 images)."""

    backbone_steps: int = 1500
    backbone_batch: int = 128
    warm_epochs: int = 6
    epochs: int = 3
    phases: int = 4
    batch: int = 64

    @property
    def joint_steps(self) -> int:
        """Steps of each group over the joint stage."""
        return self.epochs * self.phases * PERIOD // 2


QUICK = Lengths(backbone_steps=30, warm_epochs=1, epochs=1, phases=2, batch=16)


def model() -> ExitingClassifier:
    """Six blocks of width 64 on patches of 7x7; exits with linear heads and gates after the first five."""
    block = functools.partial(
        Block, mixer=functools.partial(Attention, heads=4, rope_theta=None, causal=False, bias=True),
        ffn=functools.partial(MLP, hidden=128), norm="layer",
    )  # fmt: skip
    backbone = functools.partial(
        VisionTransformer, classes=CLASSES, patch=7, d_model=64, groups=(Group((block,), DEPTH),)
    )
    return ExitingClassifier(backbone=backbone, exits=ExitBank, rule=GateRule())


def bank() -> ExitBank:
    """The exits alone."""
    return ExitBank(exits=DEPTH - 1, classes=CLASSES)


# ---- the frozen backbone and its features


def train_backbone(net: nn.Module, seed: int, images, labels, lengths: Lengths) -> Any:
    """Ordinary training of the network that the exits are added to; returns its parameters."""
    rng = np.random.default_rng(seed)
    total = lengths.backbone_steps
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, min(100, total // 10), total)
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.05))
    params = nn.meta.unbox(net.init(fold(seed, 0, "params"), images[:2]))["params"]

    def loss_of(params, x, y):
        logits, _ = net.apply({"params": params}, x, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, x, y):
        update, state = adam.update(jax.grad(loss_of)(params, x, y), state, params)
        return optax.apply_updates(params, update), state

    state, size = adam.init(params), lengths.backbone_batch
    for start in range(total):
        place = start * size % (len(images) - size)
        if place < size:
            order = rng.permutation(len(images))
        rows = order[place : place + size]
        params, state = step(params, state, images[rows], labels[rows])
    return params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cached:
    """One split after the frozen backbone: features [y n d] before each exit, the final logits [n c], labels [n]."""

    features: Any
    final: Any
    labels: Any

    def __len__(self) -> int:
        return len(self.labels)


def cache(net: nn.Module, params: Any, images, labels) -> Cached:
    """Runs the backbone once over a split."""

    def run(params, x):
        features, _ = net.apply({"params": params}, x, method="features")
        bound = net.bind({"params": params})
        return features[:-1], bound.head(features[-1])

    run = jax.jit(run)
    parts = [jax.device_get(run(params, images[i : i + 500])) for i in range(0, len(images), 500)]
    features = np.concatenate([part[0] for part in parts], axis=1)
    final = np.concatenate([part[1] for part in parts])
    return Cached(*map(jnp.asarray, (features, final, labels)))


def output_of(params: Any, data: Cached, rows: Any, **rest: Any) -> dict[str, jax.Array]:
    """What an `ExitingClassifier` would return for the examples ``rows``; ``rest``: costs, pos_weight."""
    early, gates = bank().apply({"params": params}, data.features[:, rows])
    logits = jnp.concatenate([early, data.final[rows][None]])
    return {"logits": logits, "gates": gates, **rest}


# ---- heads and gates


def optimizer(group: str, steps: int) -> optax.GradientTransformation:
    """Adam with cosine decay; a gate has five parameters and takes ten times the heads' rate."""
    return optax.adam(optax.cosine_decay_schedule(RATES[group], steps, 0.02))


@functools.partial(jax.jit, static_argnames=("objective", "group", "steps"))
def train(params, state, data: Cached, rows, rest, *, objective, group: str, steps: int):
    """Runs one phase over ``rows`` [n batch]; nothing of the other group moves, moments included."""

    def loss_of(own, params, chosen):
        output = output_of({**params, group: own}, data, chosen, **rest)
        batch = {"targets": data.labels[chosen], "mask": jnp.ones(chosen.shape, jnp.float32)}
        if isinstance(objective, MultiExitObjective):
            return objective(output, None, batch, 0)[0]
        return (objective.gate if group == "gates" else objective.heads)(output, batch)

    def step(carry, chosen):
        params, state = carry
        grad = jax.grad(loss_of)(params[group], params, chosen)
        update, own = optimizer(group, steps).update(grad, state[group])
        params = {**params, group: optax.apply_updates(params[group], update)}
        return (params, {**state, group: own}), None

    return jax.lax.scan(step, (params, state), rows)[0]


class Trainer:
    """Trains heads and gates of one seed on cached features.

    Objectives get lambda = 1 and costs that are multiplied by it, so that a sweep compiles once.
    """

    def __init__(self, seed: int, data: dict[str, Cached], costs: np.ndarray, lengths: Lengths):
        self.seed, self.data, self.costs, self.lengths = seed, data, costs, lengths
        start = bank().init(fold(seed, 0, "exits"), data["train"].features[:, :2])
        self.start = nn.meta.unbox(start)["params"]

    def _rows(self, name: str, epoch: int, steps: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch, len(name)])
        wanted = steps * self.lengths.batch
        total = len(self.data["train"])
        order = np.concatenate([rng.permutation(total) for _ in range(-(-wanted // total))])
        return order[:wanted].reshape(steps, self.lengths.batch)

    def _moments(self, params: Any, steps: int) -> Any:
        return {group: optimizer(group, steps).init(params[group]) for group in RATES}

    def warm_up(self) -> Any:
        """Stage 0: heads alone, weights y+1 .. 2; every head stops and goes back to its best by itself."""
        steps = self.lengths.phases * PERIOD
        params, patience = self.start, HeadPatience(DEPTH - 1, 2)
        state = self._moments(params, steps * self.lengths.warm_epochs)
        total = steps * self.lengths.warm_epochs
        for epoch in range(self.lengths.warm_epochs):
            rows = self._rows("warm", epoch, steps)
            params, state = train(
                params, state, self.data["train"], rows, {},
                objective=MultiExitObjective(), group="heads", steps=total,
            )  # fmt: skip
            losses = self.losses(params, self.data["validation"])
            params = {**params, "heads": patience.update(losses[:-1].mean(axis=1), params["heads"])}
            if patience.frozen.all():
                break
        return {**params, "heads": patience.restore()}

    def losses(self, params: Any, data: Cached) -> np.ndarray:
        """Cross-entropy [x n] of every exit."""
        output = output_of(params, data, np.arange(len(data)))
        return np.asarray(cross_entropy(output["logits"], data.labels))

    def joint(self, params: Any, lam: float, reweight: str = "paper") -> Any:
        """Stage 1: gate and classifier phases in turn, positive weights renewed after every epoch."""
        lengths, rest = self.lengths, self._rest(lam)
        state = self._moments(params, lengths.joint_steps)
        for epoch in range(lengths.epochs):
            rows = self._rows("joint", epoch, lengths.phases * PERIOD)
            for phase in range(lengths.phases):
                part = rows[phase * PERIOD : (phase + 1) * PERIOD]
                group = "gates" if phase % 2 == 0 else "heads"
                params, state = self._phase(params, state, part, rest, group, reweight)
            rest["pos_weight"] = self.weights(params, lam)
        return params

    def gates_only(self, params: Any, lam: float) -> Any:
        """Gates on heads that no longer change, for as many steps as the joint stage gives the gates."""
        lengths, rest = self.lengths, self._rest(lam)
        state = self._moments(params, lengths.joint_steps)
        for epoch in range(lengths.epochs):
            rows = self._rows("gates", epoch, lengths.phases * PERIOD // 2)
            for part in rows.reshape(-1, PERIOD, lengths.batch):
                params, state = self._phase(params, state, part, rest, "gates")
            rest["pos_weight"] = self.weights(params, lam)
        return params

    def _rest(self, lam: float) -> dict[str, np.ndarray]:
        return {"costs": np.float32(lam) * self.costs, "pos_weight": np.ones(DEPTH - 1, np.float32)}

    def _phase(self, params, state, rows, rest, group: str, reweight: str = "paper"):
        # Gates do not see the heads' weighting: naming one there would only compile the same phase twice.
        objective = JointExitObjective(lam=1.0, reweight=reweight if group == "heads" else "paper")
        return train(
            params, state, self.data["train"], rows, rest,
            objective=objective, group=group, steps=self.lengths.joint_steps,
        )  # fmt: skip

    def weights(self, params: Any, lam: float) -> np.ndarray:
        """Positive weights from where t* falls on the validation split."""
        losses = self.losses(params, self.data["validation"])
        best = best_exit(jnp.asarray(losses), jnp.asarray(self.costs), lam)
        return positive_weights(np.asarray(best), DEPTH - 1)

    def uniform_heads(self, params: Any) -> Any:
        """Plain multi-exit training for as many steps as the joint stage gives the heads."""
        half = self.lengths.joint_steps
        rows, state = self._rows("uniform", 0, half), self._moments(params, half)
        objective = MultiExitObjective(weights="uniform")
        return train(
            params, state, self.data["train"], rows, {},
            objective=objective, group="heads", steps=half,
        )[0]  # fmt: skip


# ---- evaluation


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Probabilities [x n c] of all exits on a split, the gates' exits [n], labels [n]."""

    probabilities: np.ndarray
    exits: np.ndarray
    labels: np.ndarray


def outputs(params: Any, data: Cached) -> Outputs:
    """Evaluates heads and gates on a whole split."""
    out = output_of(params, data, np.arange(len(data)))
    plan = decide(GateRule(), out["logits"][:-1], out["gates"], jnp.full((DEPTH - 1,), 0.5))
    probabilities = np.asarray(jax.nn.softmax(out["logits"], axis=-1))
    return Outputs(probabilities, np.asarray(plan.exit), np.asarray(data.labels))


def score(test: Outputs, exits, held: Outputs, held_exits, costs) -> dict[str, float]:
    """All figures of one way to leave; ``held`` is the calibration split, left at ``held_exits``."""
    emitted = test.probabilities[exits, np.arange(len(exits))]
    tau = cal.conformal_thresholds(held.probabilities, held.labels, held_exits, ALPHA)
    sets = cal.prediction_sets(test.probabilities, exits, tau)
    return {
        "accuracy": 100.0 * float((emitted.argmax(-1) == test.labels).mean()),
        "cost": float(np.asarray(costs)[exits].mean()),
        "ece": cal.ece(emitted, test.labels),
        "brier": cal.brier(emitted, test.labels),
        "set_size": float(sets.sum(-1).mean()),
        "coverage": cal.coverage(sets, test.labels),
    }


def leave_by(confidence: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """First exit whose top probability reaches its threshold."""
    leave = confidence[:-1] >= thresholds[:, None]
    return np.where(leave.any(axis=0), leave.argmax(axis=0), len(leave))


def arms_of(params: Any, data: dict[str, Cached], costs, lam: float, seed: int) -> dict[str, dict]:
    """The learned gates, and the three other ways to leave on the very same heads."""
    test, held = outputs(params, data["test"]), outputs(params, data["calibration"])
    arms = {"jei": score(test, test.exits, held, held.exits, costs)}
    share = np.bincount(held.exits, minlength=DEPTH) / len(held.exits)
    tau = cal.chain_thresholds(held.probabilities[:-1].max(-1), share)
    by_test, by_held = (leave_by(o.probabilities.max(-1), tau) for o in (test, held))
    arms["threshold"] = score(test, by_test, held, by_held, costs)
    rng = np.random.default_rng([seed, 7])
    draws = [
        score(test, rng.permutation(test.exits), held, rng.permutation(held.exits), costs)
        for _ in range(SHUFFLES)
    ]
    arms["random"] = {key: float(np.mean([draw[key] for draw in draws])) for key in draws[0]}
    hindsight = [_hindsight(o, costs, lam) for o in (test, held)]
    arms["oracle"] = score(test, hindsight[0], held, hindsight[1], costs)
    return arms


def _hindsight(out: Outputs, costs: np.ndarray, lam: float) -> np.ndarray:
    label = out.probabilities[:, np.arange(len(out.labels)), out.labels]
    return np.asarray(best_exit(-jnp.log(jnp.maximum(label, 1e-30)), jnp.asarray(costs), lam))


def load(quick: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images and labels of the four splits, in memory."""
    task, limit = FashionMNIST(), 600 if quick else None
    arrays = {}
    for split in ("train", "validation", "calibration", "test"):
        source = task.source(split)
        batch = source.batch(np.arange(min(len(source), limit or len(source))))
        arrays[split] = np.asarray(batch["inputs"]), np.asarray(batch["targets"])
    return arrays


def run_seed(seed: int, quick: bool, workdir: Path) -> dict[str, dict[str, float]]:
    """All arms of one seed: arm -> metric -> value; decisions_SEED.npz in ``workdir`` is for the pictures."""
    lengths, arrays, whole = QUICK if quick else Lengths(), load(quick), model()
    net = whole.backbone()
    costs = np.asarray(whole.cumulative_costs((1, *arrays["test"][0].shape[1:])), np.float32)
    params = train_backbone(net, seed, *arrays["train"], lengths)
    data = {split: cache(net, params, *pair) for split, pair in arrays.items()}
    trainer = Trainer(seed, data, costs, lengths)
    warm = trainer.warm_up()
    uniform, results, shown = trainer.uniform_heads(warm), {}, {}
    for lam in LAMBDAS:
        joint, apart = trainer.joint(warm, lam), trainer.gates_only(uniform, lam)
        identity = trainer.joint(warm, lam, "official_identity")
        found = arms_of(joint, data, costs, lam, seed)
        found["uniform"] = arms_of(apart, data, costs, lam, seed)["jei"]
        found["official"] = arms_of(identity, data, costs, lam, seed)["jei"]
        results |= {f"{method}_{lam:g}": found[method] for method in METHODS}
        if lam == 0.5:
            left = outputs(joint, data["test"])
            shown = load_module(PICTURES).chosen(left, arrays["test"][0], costs)
    for method in METHODS:
        sweep = [results[f"{method}_{lam:g}"] for lam in LAMBDAS]
        results[method] = {key: float(np.mean([one[key] for one in sweep])) for key in sweep[0]}
    test, held = outputs(warm, data["test"]), outputs(warm, data["calibration"])
    last = lambda out: np.full(len(out.labels), DEPTH - 1)
    results["static"] = score(test, last(test), held, last(held), costs)
    right = (test.probabilities.argmax(-1) == test.labels).mean(-1)
    results["static"] |= {f"head_{i}": 100.0 * float(share) for i, share in enumerate(right)}
    workdir.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(workdir / f"decisions_{seed}.npz", **shown)
    return results


def figures(results: dict[str, Any], outdir: Path) -> None:
    """Writes the pictures of the page."""
    load_module(PICTURES).draw(results, outdir)
