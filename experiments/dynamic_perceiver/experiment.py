"""Early classifiers on latent tokens beside a CNN (arXiv 2306.11248) on Fashion-MNIST, against exits on the CNN itself.

Seven trainings a seed, of equal length over the same batches: the network with all exits, on its final loss alone and
without self-distillation; with its first exit on the CNN's features; with tokens that read the CNN once; and a wider
plain CNN of equal multiply-adds with and without an exit of its own. Thresholds are solved on the calibration split for
exit shares; test labels only score.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn

from dyncomp.core.rng import fold
from dyncomp.evidence.seed import load_module
from dyncomp.exits import DistilledExitObjective
from dyncomp.exits.budgets import leaves_at
from dyncomp.exits.distilled import combined, exit_terms, soft_targets
from dyncomp.exits.rules import confidence
from dyncomp.exits.shares import SWEEP, share_thresholds, swept_shares
from dyncomp.models import ConvLevel, ExitingConvNet, TwoBranchClassifier
from dyncomp.tasks import FashionMNIST
from dyncomp.training.compile_cache import enable

TITLE = "Early classifiers on a branch of latent tokens"
COMPUTE = "cost"
METRICS = {
    "accuracy": {"text": "percent of the test images, each with the answer it leaves with"},
    "cost": {"text": "mean multiply-adds; the whole two-branch network is 1", "minimize": True},
    "final": {"text": "percent of the test images, last exit"},
    **{f"exit_{i}": {"text": f"percent of the test images, all leaving at exit {i}"} for i in range(1, 5)},
    "change": {"text": "final exit minus that of the same model trained on the final loss alone"},
    "hurt": {"text": "points lost when tokens read the CNN once only", "minimize": True},
    "at_0.8": {"text": "percent of the test images at a mean cost of 0.8, from the sweep of thresholds"},
}  # fmt: skip
PICTURES = Path(__file__).with_name("pictures.py")
PS = (0.5, 1.0, 2.0)
TRAINED = (
    "two_branch", "two_branch_final", "no_distillation", "feature_exit", "read_once", "coupled",
    "coupled_final",
)  # fmt: skip
ARMS = [
    *TRAINED, "read_once_early", "read_once_late",
    *(f"{way}_{p:g}" for way in ("threshold", "random") for p in PS),
]  # fmt: skip
TRIALS = dict.fromkeys(ARMS, 1)  # nothing was tuned, on either side

CLASSES, SHUFFLES, SHAPE = 10, 10, (1, 14, 14, 1)
BRIEF = {"xla_backend_optimization_level": 0}
"""For what runs a few times only: it need not be fast, but compiled soon."""


@dataclasses.dataclass(frozen=True)
class Lengths:
    """How long to train; one pass, every image is new."""

    steps: int = 300
    batch: int = 64
    warm_up: int = 30
    rate: float = 3e-3
    decay: float = 0.05


QUICK = Lengths(steps=3, batch=16, warm_up=1)


def levels(*widths: int) -> tuple[ConvLevel, ...]:
    """A bottleneck each, on 7x7, then 4x4 places."""
    strides = (1, 2, 1, 1)
    return tuple(ConvLevel(width=w, stride=s) for w, s in zip(widths, strides, strict=True))


def two_branch(**options: Any) -> TwoBranchClassifier:
    """A stem of 7x7 places, 16 tokens of width 16 at first, 4x4 keys, a block of self-attention a stage."""
    return TwoBranchClassifier(
        classes=CLASSES, levels=levels(16, 24, 32, 48), stem=16, tokens=16, blocks=(1, 1, 1, 1), side=4, **options
    )  # fmt: skip


def coupled() -> ExitingConvNet:
    """The CNN, wider, with linear exits after stages 3 and 4."""
    return ExitingConvNet(classes=CLASSES, levels=levels(20, 32, 42, 64), stem=20)


def weights(learned: str, exits: int) -> tuple[Any, Any]:
    """Of the terms of the paper's loss: "all"; "labels", without divergences; "final", the last exit alone."""
    hard, soft = DistilledExitObjective().weights(exits)
    if learned == "final":
        hard = np.eye(exits, dtype=np.float32)[-1]
    return hard, soft if learned == "all" else np.zeros_like(soft)


class Trainer:
    """Trains and evaluates one model, under several weightings of its losses with one compiled step."""

    def __init__(self, model: Any, seed: int, lengths: Lengths):
        self.model, self.seed, self.lengths = model, seed, lengths
        self.costs = np.cumsum([price.flops for price in model.cost(SHAPE).values()])
        rate = optax.warmup_cosine_decay_schedule(
            0.0, lengths.rate, lengths.warm_up, lengths.steps, 0.02 * lengths.rate
        )
        matrices = lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)
        adam = optax.adamw(rate, weight_decay=lengths.decay, mask=matrices)
        self.adam = optax.chain(optax.clip_by_global_norm(1.0), adam)
        self.step = jax.jit(self._step, donate_argnums=(0, 1, 2))
        call = lambda variables, x: model.apply(variables, x)[0]["logits"]
        self.run = jax.jit(call, compiler_options=BRIEF)

    def _step(self, params, controls, state, x, y, hard, soft):
        def loss_of(params):
            variables = {"params": params, "controls": controls}
            (output, _), moved = self.model.apply(variables, x, train=True, mutable=["controls"])
            terms = exit_terms(output["logits"], soft_targets(y, CLASSES))
            return combined(terms, hard, soft).mean(), moved["controls"]

        grads, controls = jax.grad(loss_of, has_aux=True)(params)
        update, state = self.adam.update(grads, state, params)
        return optax.apply_updates(params, update), controls, state

    def train(self, images, labels, learned: str) -> Any:
        """Variables after training on the seed's batches, from the seed's initial parameters."""
        init = jax.jit(self.model.init, compiler_options=BRIEF)
        variables = nn.meta.unbox(init(fold(self.seed, 0, "params"), images[:2]))
        params, controls = variables["params"], variables["controls"]
        state, hard_soft = self.adam.init(params), weights(learned, len(self.costs))
        order = np.random.default_rng(self.seed).permutation(len(images))
        for start in range(self.lengths.steps):
            rows = order.take(
                np.arange(self.lengths.batch) + start * self.lengths.batch, mode="wrap"
            )
            params, controls, state = self.step(
                params, controls, state, images[rows], labels[rows], *hard_soft
            )
        return {"params": params, "controls": controls}

    def logits(self, variables: Any, images) -> np.ndarray:
        """[x n c] of every exit, in evaluation."""
        parts = [self.run(variables, images[i : i + 500]) for i in range(0, len(images), 500)]
        return np.concatenate(jax.device_get(parts), axis=1)


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Of all exits on a split: classes said [x n], confidences [n y] of the early ones, labels [n]."""

    said: np.ndarray
    sure: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, logits: np.ndarray, labels: np.ndarray) -> "Outputs":
        """From logits [x n c]; confidences as the runtime computes them."""
        return cls(logits.argmax(-1), np.asarray(confidence(logits[:-1], "max_p")).T, labels)

    def accuracy(self, exits: np.ndarray) -> float:
        """Percent, each example with the answer of its exit."""
        emitted = self.said[exits, np.arange(len(exits))]
        return 100.0 * float((emitted == self.labels).mean())

    def each(self) -> list[float]:
        """Percent of every exit on all examples."""
        return [100.0 * float(share) for share in (self.said == self.labels).mean(-1)]


def leave(held: Outputs, test: Outputs, p: float) -> np.ndarray:
    """Where test examples leave under thresholds for the shares of ``p``, solved on ``held``."""
    shares = swept_shares(p, len(test.said))
    return leaves_at(test.sure, share_thresholds(held.sure, shares))


def sweep(held: Outputs, test: Outputs, costs: np.ndarray, seed: int) -> dict[str, list[Any]]:
    """Cost and accuracy of thresholds for all p, and of random exits with the same histograms."""
    found: dict[str, list[Any]] = {"cost": [], "accuracy": [], "random": []}
    rng = np.random.default_rng([seed, 7])
    for p in sorted(set(SWEEP)):
        exits = leave(held, test, p)
        found["cost"].append(float(costs[exits].mean()))
        found["accuracy"].append(test.accuracy(exits))
        draws = [test.accuracy(rng.permutation(exits)) for _ in range(SHUFFLES)]
        found["random"].append(float(np.mean(draws)))
    return found


def at(curve: dict[str, list[Any]], cost: float) -> float:
    """Accuracy of a sweep at a mean cost, between its neighbours."""
    order = np.argsort(curve["cost"])
    return float(np.interp(cost, np.take(curve["cost"], order), np.take(curve["accuracy"], order)))


def halved(images: np.ndarray) -> np.ndarray:
    """Means of 2x2 pixels: 14x14."""
    n, h, w, c = images.shape
    return images.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))


def load(quick: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images of 14x14 pixels and labels of the splits, in memory."""
    task, limit = FashionMNIST(), 500 if quick else None
    arrays = {}
    for split in ("train", "calibration", "test"):
        source = task.source(split)
        batch = source.batch(np.arange(min(len(source), limit or len(source))))
        arrays[split] = halved(batch["inputs"]), np.asarray(batch["targets"])
    return arrays


def trained(seed: int, lengths: Lengths, arrays: Any) -> dict[str, tuple[Outputs, Outputs, Any]]:
    """Arm -> outputs on calibration and test, and cumulative costs; the whole two-branch network is 1."""
    plans = {
        two_branch: {"two_branch": "all", "two_branch_final": "final", "no_distillation": "labels"},
        functools.partial(two_branch, first_exit="features"): {"feature_exit": "all"},
        functools.partial(two_branch, reads="first"): {"read_once": "all"},
        coupled: {"coupled": "all", "coupled_final": "final"},
    }
    whole = sum(price.flops for price in two_branch().cost(SHAPE).values())
    found = {}
    for make, arms in plans.items():
        trainer = Trainer(make(), seed, lengths)
        for arm, learned in arms.items():
            variables = trainer.train(*arrays["train"], learned)
            split = lambda name, v=variables, t=trainer: Outputs.of(
                t.logits(v, arrays[name][0]), arrays[name][1]
            )
            found[arm] = split("calibration"), split("test"), trainer.costs / whole
    return found


def run_seed(seed: int, quick: bool, workdir: Path) -> dict[str, Any]:
    """All arms of one seed: arm -> metric -> value; ``_figures`` holds what the pictures show."""
    enable()
    arrays = load(quick)
    found = trained(seed, QUICK if quick else Lengths(), arrays)
    results: dict[str, Any] = {}
    for arm, (_, test, costs) in found.items():
        each = test.each()
        results[arm] = {f"exit_{i}": value for i, value in enumerate(each, 1)}
        results[arm] |= {"final": each[-1], "cost": float(costs[-1])}
    curves = {arm: sweep(*found[arm], seed) for arm in ("two_branch", "coupled")}
    for arm, curve in curves.items():
        change = results[arm]["final"] - results[f"{arm}_final"]["final"]
        results[arm] |= {"change": change, "at_0.8": at(curve, 0.8)}
    lost = [
        results["two_branch"][f"exit_{i}"] - results["read_once"][f"exit_{i}"] for i in range(1, 5)
    ]
    results["read_once_early"] = {"hurt": (lost[0] + lost[1]) / 2}
    results["read_once_late"] = {"hurt": (lost[2] + lost[3]) / 2}
    held, test, costs = found["two_branch"]
    for p in PS:
        exits, place = leave(held, test, p), sorted(set(SWEEP)).index(p)
        curve, cost = curves["two_branch"], float(costs[exits].mean())
        results[f"threshold_{p:g}"] = {"accuracy": curve["accuracy"][place], "cost": cost}
        results[f"random_{p:g}"] = {"accuracy": curve["random"][place], "cost": cost}
    exits = leave(held, test, 1.0)
    shown = load_module(PICTURES).chosen(test, exits, arrays["test"][0])
    drawn = {
        "curves": curves,
        "costs": costs.tolist(),
        "coupled_costs": found["coupled"][2].tolist(),
    }
    return {**results, "_figures": {**shown, **drawn}}


def figures(results: dict[str, Any], outdir: Path) -> None:
    """Writes the pictures of the page."""
    load_module(PICTURES).draw(results, outdir)
