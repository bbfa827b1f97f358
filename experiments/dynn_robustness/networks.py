"""The networks of the experiment, what is done to them and what they say; `experiment` puts the arms together."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dyncomp.core.rng import fold
from dyncomp.exits import (
    ConfidenceRule,
    MapExits,
    MultiExitObjective,
    RampedExitObjective,
    budgets,
)
from dyncomp.exits import attacks as box
from dyncomp.exits import attacks_l2 as near
from dyncomp.exits.oracle import cross_entropy
from dyncomp.models import ConvNet, ExitingClassifier
from dyncomp.tasks import FashionMNIST
from dyncomp.tasks.images import FASHION_MEAN, FASHION_STD
from dyncomp.training.optimizers import AdamW, freeze, hold

MAIN = 8 / 255
PGD_STEPS = 20
CHUNK = 100  # images of an attack that run together, and those of a batch that shares a quota
SHAPE = (1, 28, 28, 1)


@dataclasses.dataclass(frozen=True)
class Lengths:
    """How long to train and on how many images to attack."""

    steps: int = 1200
    head_steps: int = 200
    images: int = 400
    cw_images: int = 60
    cw_steps: int = 50
    early_images: int = 40
    early_most: int = 500
    early_least: int = 200


QUICK = Lengths(4, 4, CHUNK, 20, 4, 10, 6, 2)


def exiting(blocks: Any, halved: Any) -> ExitingClassifier:
    """Six convolutions in some blocks, with an internal classifier after every block but the last."""
    backbone = functools.partial(ConvNet, classes=10, blocks=blocks, halved=halved)
    return ExitingClassifier(backbone=backbone, exits=MapExits, rule=ConfidenceRule())


FOUR = exiting(((16, 16), (32,), (32,), (48, 48)), (0, 1, 3))
SIX = exiting(((16,), (16,), (32,), (32,), (48,), (48,)), (0, 2, 4))
MODELS = {"static": FOUR, "four": FOUR, "six": SIX}


def logits_of(kind: str, params: Any, inputs: Any) -> Any:
    """[x b c] of normalised images; "static" is the backbone of four alone, with one exit, its end."""
    model = MODELS[kind]
    if kind == "static":
        return model.backbone().apply({"params": params["net"]}, inputs)[0][None]
    ones = jnp.ones((model.depth - 1,))
    variables = {"params": params, "controls": {"thresholds": ones, "pos_weight": ones}}
    return model.apply(variables, inputs)[0]["logits"]


def on_pixels(kind: str, params: Any) -> Any:
    """The same of pixels in 0..1."""
    scale = (FASHION_MEAN / 255, FASHION_STD / 255)
    return box.on_pixels(functools.partial(logits_of, kind, params), *scale)


# ---- training


@functools.partial(jax.jit, static_argnames=("kind", "objective", "trainable"))
def train(params, images, labels, rows, rate, *, kind, objective, trainable=".*"):
    """Steps of AdamW on the batches ``rows`` [steps, batch]."""
    tx = AdamW(learning_rate=1.0, warmup_steps=20, weight_decay=1e-4, b2=0.99)
    tx = freeze(tx.build(len(rows)), trainable)
    costs = jnp.asarray(MODELS[kind].cumulative_costs(SHAPE), jnp.float32)
    costs = costs[-1:] if kind == "static" else costs

    def loss(params, step, row):
        logits = logits_of(kind, hold(params, trainable), images[row])
        batch = {"targets": labels[row], "mask": jnp.ones(row.shape)}
        return objective({"logits": logits, "costs": costs}, None, batch, step)[0]

    def one(state, xs):
        params, moments = state
        update, moments = tx.update(jax.grad(loss)(params, *xs), moments, params)
        params = jax.tree.map(lambda p, u: p + rate * u, params, update)
        return (params, moments), None

    xs = (jnp.arange(len(rows)), rows)
    return jax.lax.scan(one, (params, tx.init(params)), xs)[0][0]


def networks(seed: int, images: Any, labels: Any, lengths: Lengths) -> dict[str, Any]:
    """Parameters: static; four and six exits trained jointly; heads on the frozen static network."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(images), (lengths.steps, 128))
    ramp = RampedExitObjective(steps=lengths.steps)
    init = lambda model: jax.jit(model.init)(fold(seed, 0, "params"), images[:2])
    fresh = lambda model: nn.meta.unbox(init(model))["params"]
    start = fresh(FOUR)
    run = lambda kind, p: train(p, images, labels, rows, 2e-3, kind=kind, objective=ramp)
    static = {**start, "net": run("static", {"net": start["net"]})["net"]}
    heads = train(
        static, images, labels, rows[: lengths.head_steps], 2e-3,
        kind="four", objective=MultiExitObjective(weights="uniform"), trainable="^bank/",
    )  # fmt: skip
    return {"static": static, "four": run("four", start), "six": run("six", fresh(SIX)), "heads": heads}  # fmt: skip


# ---- attacks, compiled once a network and kind


AIMS = ("last", "mean", "taken")


@functools.partial(jax.jit, static_argnames=("kind",))
def pgd(params, bars, images, labels, eps, aim, *, kind):
    """Accuracy attack on a chunk; ``bars`` are the thresholds.

    ``aim`` [3] weighs the three aims with one 1 and two 0, so that one compiled program serves all.
    """
    victims = [victim(kind, params, bars, name) for name in AIMS]

    def value(logits):
        ce = cross_entropy(logits, labels)
        return sum(w * one.aimed(ce, logits) for w, one in zip(aim, victims, strict=True))

    wrong = lambda logits: victims[0].answer(logits) != labels
    logits = victims[0].logits
    return box.ascend(logits, value, wrong, images, eps=eps, step=eps / 4, steps=PGD_STEPS)


def victim(kind: str, params: Any, bars: Any, aim: str = "last") -> box.Victim:
    """A network with exits at its thresholds, or the static one."""
    leave = box.last_exit if kind == "static" else box.leaving(ConfidenceRule(), bars)
    return box.Victim(on_pixels(kind, params), leave, aim)


@jax.jit
def slow_down(params, bars, images, keep):
    """Compute attack on a chunk."""
    who = victim("four", params, bars)
    return box.slow_down(who, images, eps=MAIN, step=MAIN / 4, steps=PGD_STEPS, keep=keep)


@functools.partial(jax.jit, static_argnames=("kind", "steps"))
def carlini(params, bars, images, labels, *, kind, steps):
    """Nearest image with another answer."""
    who = victim(kind, params, bars, "last" if kind == "static" else "taken")
    return near.cw_l2(who, images, labels, steps=steps, rounds=3, rate=0.02)


@functools.partial(jax.jit, static_argnames=("start", "most", "least"))
def early(params, images, keys, alpha, *, start, most, least):
    """Early attack on a network with four exits."""
    return near.early_attack(
        on_pixels("four", params), images, keys,
        alpha=alpha, std=FASHION_STD / 255, most=most, least=least, start=start,
    )  # fmt: skip


def in_chunks(run: Any, *arrays: Any) -> Any:
    """``run`` over chunks of images; numpy trees, joined."""
    size = min(CHUNK, len(arrays[0]))
    parts = [
        jax.device_get(run(*(array[at : at + size] for array in arrays)))
        for at in range(0, len(arrays[0]), size)
    ]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


@functools.partial(jax.jit, static_argnames=("kind",))
def _forward(params, pixels, *, kind):
    return jnp.swapaxes(on_pixels(kind, params)(pixels), 0, 1)


# ---- what a network says


@dataclasses.dataclass(frozen=True)
class Said:
    """Of n images: logits [x n c], largest probabilities of early exits [n y], where they leave, the answers."""

    logits: np.ndarray
    scores: np.ndarray
    exits: np.ndarray

    @property
    def answers(self) -> np.ndarray:
        """Class at the exit that is taken."""
        return self.logits[self.exits, np.arange(len(self.exits))].argmax(-1)


@dataclasses.dataclass(frozen=True)
class Net:
    """A trained network at its thresholds."""

    kind: str
    params: Any
    bars: np.ndarray

    @property
    def costs(self) -> np.ndarray:
        """Cumulative, the last is 1."""
        return np.asarray(
            [1.0] if self.kind == "static" else MODELS[self.kind].cumulative_costs(SHAPE)
        )

    def says(self, pixels: np.ndarray) -> Said:
        """Logits, and the exits at the thresholds."""
        logits = in_chunks(functools.partial(_forward, self.params, kind=self.kind), pixels)
        p = np.asarray(jax.nn.softmax(logits[:, :-1], axis=-1)) if logits.shape[1] > 1 else logits[:, :0]  # fmt: skip
        scores = p.max(-1)
        return Said(logits.swapaxes(0, 1), scores, budgets.leaves_at(scores, self.bars))

    def at(self, bars: Any) -> "Net":
        """The same weights at other thresholds."""
        return dataclasses.replace(self, bars=np.asarray(bars, np.float32))


def figures_of(net: Net, said: Said, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, cost, mean exit, shares of exits."""
    depth = len(net.costs)
    shares = np.bincount(said.exits, minlength=depth) / len(labels)
    return {
        "accuracy": 100.0 * float((said.answers == labels).mean()),
        "cost": float(net.costs[said.exits].mean()),
        "exit": float(said.exits.mean() + 1.0),
        "efficacy": box.efficacy(said.exits, net.costs),
        **{f"share_{i + 1}": float(share) for i, share in enumerate(shares)},
    }


def changed(net: Net, pixels: np.ndarray, labels: np.ndarray, counted: np.ndarray) -> dict:
    """Success among the counted images, with the figures over all of them."""
    said = net.says(pixels)
    wrong = said.answers != labels
    return {"success": 100.0 * float(wrong[counted].mean()), **figures_of(net, said, labels)}


def pixels_of(inputs: np.ndarray) -> np.ndarray:
    """Standardised images back to 0..1."""
    return np.clip((inputs * FASHION_STD + FASHION_MEAN) / 255, 0.0, 1.0).astype(np.float32)


def load(quick: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images and labels."""
    sizes, found = {"train": 50_000, "calibration": 2_000, "test": 10_000}, {}
    for split, size in sizes.items():
        batch = FashionMNIST().source(split).batch(np.arange(CHUNK if quick else size))
        found[split] = np.asarray(batch["inputs"]), np.asarray(batch["targets"])
    return found
