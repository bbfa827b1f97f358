"""Spiking networks that stop when they are sure (arXiv 2303.10276), on Fashion-MNIST at 14 x 14 pixels.

Two networks a seed: one is trained with activations of 2 bits and converted, one is trained through time. Each is run
for all its steps once on the test images and once on held-out training images (the calibration split); every arm is a
way to stop on those traces. Thresholds come from the calibration split; test labels only score, and serve the oracle.
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

from dyncomp.core.rng import fold
from dyncomp.evidence.seed import load_module
from dyncomp.exits import MultiExitObjective, cheapest_threshold, leaves_above, threshold_front
from dyncomp.exits import calibration as cal
from dyncomp.exits.oracle import first_right
from dyncomp.exits.selection import threshold_for_cost
from dyncomp.models import SpikingClassifier
from dyncomp.recurrent import Neuron
from dyncomp.tasks import ClassificationObjective, FashionMNIST

TITLE = "Dynamic confidence of spiking networks"
COMPUTE = "steps"
METRICS = {
    "accuracy": {"text": "percent of the test images"},
    "steps": {"text": "mean steps of time", "minimize": True},
    "share": {"text": "steps over T_max", "minimize": True},
    "spikes": {"text": "mean spikes a neuron", "minimize": True},
    "spikes_share": {"text": "spikes over those of all steps", "minimize": True},
    "flops_share": {"text": "FLOPs over those of all steps", "minimize": True},
    "ece": {"text": "expected calibration error of the confidence that stopped", "minimize": True},
    "spread": {"text": "best minus worst accuracy over thresholds 0.3 to 0.95", "minimize": True},
}
PICTURES = Path(__file__).with_name("pictures.py")
ALPHAS = (1.0, 10.0, 30.0, 100.0)
GRID = np.arange(0.3, 0.951, 0.05)
SHUFFLES = 10
CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Setup:
    """A network and how it is trained.

    Attributes:
      net: T_max is its ``steps``.
      objective: of its training.
      rate: peak of the learning rate; the cosine ends at 0.
      steps, batch: of training.
      prefix: of its arms.
      early: mean steps of the arms that stop early, set on the calibration images.
      shown: steps at which all images are stopped.
    """

    net: SpikingClassifier
    objective: Any
    rate: float
    steps: int
    batch: int
    prefix: str
    early: float
    shown: tuple[int, ...]


CONVERTED = Setup(
    net=SpikingClassifier(classes=CLASSES, widths=(16, 32, 64), convs=(1, 2, 2), steps=24),
    objective=ClassificationObjective(answer="final"),
    rate=4e-3,
    steps=800,
    batch=128,
    prefix="",
    early=2.5,
    shown=(1, 2, 3, 4, 5, 6, 8, 12, 16, 24),
)
DIRECT = Setup(
    net=SpikingClassifier(
        classes=CLASSES, widths=(12, 24, 48), convs=(1, 1, 2), steps=4, training="spiking",
        neuron=Neuron(leak=0.5, start=0.0), scale_init=1 / 3,
    ),
    objective=MultiExitObjective(weights="uniform", final=True),
    rate=4e-3,
    steps=800,
    batch=64,
    prefix="direct_",
    early=1.5,
    shown=(1, 2, 3, 4),
)  # fmt: skip
SETUPS = (CONVERTED, DIRECT)


def arms_of(setup: Setup) -> list[str]:
    """The names of a network's arms."""
    dynamic = [*(f"{alpha:g}" for alpha in ALPHAS), "mean"]
    names = ["full", "enough", "oracle"]
    for way in dynamic:
        names += [f"dynamic_{way}", f"early_{way}", f"random_dynamic_{way}", f"random_early_{way}"]
    return [setup.prefix + name for name in names + [f"fixed_{step}" for step in setup.shown]]


ARMS = ["source", *(name for setup in SETUPS for name in arms_of(setup))]
TRIALS = dict.fromkeys(ARMS, 1)  # on seed 100; all arms of a network share it


# ---- training


def train(setup: Setup, seed: int, images: np.ndarray, labels: np.ndarray) -> Any:
    """Trains a network; returns its variables."""
    net = setup.net
    variables = nn.meta.unbox(jax.jit(net.init)(fold(seed, 0, "params"), images[:2]))
    rate = optax.warmup_cosine_decay_schedule(0.0, setup.rate, setup.steps // 10, setup.steps)
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

    def loss_of(params, controls, x, y):
        variables = {"params": params, "controls": controls}
        (output, aux), moved = net.apply(variables, x, train=True, mutable=["controls"])
        batch = {"targets": y, "mask": jnp.ones(y.shape, jnp.float32)}
        return setup.objective(output, aux, batch, 0)[0], moved["controls"]

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params, controls, state, x, y):
        grad, controls = jax.grad(loss_of, has_aux=True)(params, controls, x, y)
        update, state = adam.update(grad, state, params)
        return optax.apply_updates(params, update), controls, state

    params, controls = variables["params"], variables["controls"]
    state, rng, order = adam.init(params), np.random.default_rng(seed), np.zeros(0, int)
    for _ in range(setup.steps):
        if len(order) < setup.batch:
            order = rng.permutation(len(images))
        rows, order = order[: setup.batch], order[setup.batch :]
        params, controls, state = step(params, controls, state, images[rows], labels[rows])
    return {"params": params, "controls": controls}


# ---- traces


@dataclasses.dataclass(frozen=True)
class Trace:
    """A network on a split: sums of logits [x n c] and spikes a neuron [x n] after each step, labels [n]."""

    sums: np.ndarray
    spikes: np.ndarray
    labels: np.ndarray

    @functools.cached_property
    def right(self) -> np.ndarray:
        """bool [n x]."""
        return (self.sums.argmax(-1) == self.labels).T

    def confidences(self, way: str) -> np.ndarray:
        """Softmax [x n c] of the sum over a temperature (``"30"``), or of the mean (``"mean"``)."""
        steps = np.arange(1.0, len(self.sums) + 1.0)[:, None, None]
        z = self.sums / (steps if way == "mean" else float(way))
        z = np.exp(z - z.max(-1, keepdims=True))
        return z / z.sum(-1, keepdims=True)


def traces(setup: Setup, variables: Any, data: dict[str, Any]) -> dict[str, Trace]:
    """All steps on the calibration and the test images, 500 at once."""
    net = setup.net
    weights = jax.jit(lambda v: net.apply(v, method="folded"))(variables)
    run = jax.jit(lambda x: net.simulate(weights, x, jnp.float32(2.0)))
    neurons, found = sum(net.neurons(data["test"][0].shape)), {}
    for split in ("calibration", "test"):
        images, labels = data[split]
        parts = [jax.device_get(run(images[i : i + 500])) for i in range(0, len(images), 500)]
        sums = np.concatenate([part.sums for part in parts], axis=1)
        spikes = np.concatenate([part.spikes.sum(-1) for part in parts], axis=1) / neurons
        found[split] = Trace(sums, spikes, labels)
    return found


def source_accuracy(setup: Setup, variables: Any, images: np.ndarray, labels: np.ndarray) -> float:
    """Percent of the images that the quantised network gets right."""
    net = setup.net
    weights = jax.jit(lambda v: net.apply(v, method="folded"))(variables)
    run = jax.jit(lambda x: net.quantised(weights, x))
    said = [np.asarray(run(images[i : i + 500])).argmax(-1) for i in range(0, len(images), 500)]
    return 100.0 * float((np.concatenate(said) == labels).mean())


# ---- ways to stop


class Judge:
    """Scores ways to stop on one network's traces."""

    def __init__(self, setup: Setup, found: dict[str, Trace], shape: tuple[int, ...], seed: int):
        self.setup, self.held, self.test = setup, found["calibration"], found["test"]
        self.rng = np.random.default_rng([seed, 7])
        self.steps = np.arange(1.0, len(self.test.sums) + 1.0)
        self.costs = np.asarray(setup.net.cumulative_costs(shape))

    def score(self, stops: np.ndarray, way: str | None = None) -> dict[str, float]:
        """All figures of stopping image n after step ``stops[n]`` (counted from 0)."""
        test, rows = self.test, np.arange(len(stops))
        spikes = test.spikes[stops, rows]
        figures = {
            "accuracy": 100.0 * float(test.right[rows, stops].mean()),
            "steps": float(self.steps[stops].mean()),
            "share": float(self.steps[stops].mean() / self.steps[-1]),
            "spikes": float(spikes.mean()),
            "spikes_share": float(spikes.sum() / test.spikes[-1].sum()),
            "flops_share": float(self.costs[stops].mean()),
        }
        if way is not None:
            figures["ece"] = cal.ece(test.confidences(way)[stops, rows], test.labels)
        return figures

    def random(self, stops: np.ndarray) -> dict[str, float]:
        """The same histogram of steps, dealt out at random; the mean of some draws."""
        draws = [self.score(self.rng.permutation(stops)) for _ in range(SHUFFLES)]
        return {name: float(np.mean([draw[name] for draw in draws])) for name in draws[0]}

    def fixed(self) -> dict[str, dict[str, float]]:
        """All images after one step number; the smallest that is enough on the calibration images; the oracle."""
        everyone = lambda step: np.full(len(self.test.labels), step - 1)
        share = self.held.right.mean(axis=0)
        enough = int(np.flatnonzero(share >= share[-1] - 1e-9)[0]) + 1
        first = np.asarray(first_right(jnp.asarray(self.test.right.T)))
        return {
            "full": self.score(everyone(len(self.steps))),
            "enough": self.score(everyone(enough)),
            "oracle": self.score(first),
            **{f"fixed_{step}": self.score(everyone(step)) for step in self.setup.shown},
        }

    def dynamic(self, way: str) -> dict[str, dict[str, float]]:
        """Confidence at one temperature: its threshold for the whole accuracy, and the one for few steps."""
        held, test = (trace.confidences(way).max(-1).T for trace in (self.held, self.test))
        keep = cheapest_threshold(held, self.held.right, self.steps).threshold
        early = threshold_for_cost(held, self.steps, self.setup.early)
        found = {}
        for name, threshold in (("dynamic", keep), ("early", early)):
            stops = leaves_above(test, threshold)
            found[f"{name}_{way}"] = {**self.score(stops, way), "threshold": threshold}
            found[f"random_{name}_{way}"] = self.random(stops)
        swept = self.sweep(way)[:, 1]
        found[f"dynamic_{way}"]["spread"] = float(swept.max() - swept.min())
        return found

    def sweep(self, way: str) -> np.ndarray:
        """(mean steps, accuracy) on the test images at each threshold of `GRID`."""
        scores = self.test.confidences(way).max(-1).T
        return np.asarray([self._point(leaves_above(scores, threshold)) for threshold in GRID])

    def front(self, way: str) -> np.ndarray:
        """(mean steps, accuracy) on the test images of the calibration images' best thresholds."""
        held, test = (trace.confidences(way).max(-1).T for trace in (self.held, self.test))
        best = threshold_front(held, self.held.right, self.steps)
        return np.asarray([self._point(leaves_above(test, one.threshold)) for one in best])

    def _point(self, stops: np.ndarray) -> tuple[float, float]:
        right = self.test.right[np.arange(len(stops)), stops]
        return self.steps[stops].mean(), 100.0 * right.mean()

    def all(self) -> dict[str, dict[str, float]]:
        """Every arm of the network."""
        found = self.fixed()
        for way in (*(f"{alpha:g}" for alpha in ALPHAS), "mean"):
            found |= self.dynamic(way)
        return {self.setup.prefix + name: figures for name, figures in found.items()}


def load(quick: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images and labels, in memory."""
    task, limit = FashionMNIST(shrink=2), 500 if quick else None
    found = {}
    for split in ("train", "calibration", "test"):
        source = task.source(split)
        batch = source.batch(np.arange(min(len(source), limit or len(source))))
        found[split] = batch["inputs"], batch["targets"]
    return found


def run_seed(seed: int, quick: bool, workdir: Path) -> dict[str, dict[str, float]]:
    """All arms of one seed: arm -> metric -> value; decisions_SEED.npz in ``workdir`` is for the pictures."""
    data, results, shown = load(quick), {}, {}
    for setup in SETUPS:
        setup = dataclasses.replace(setup, steps=4) if quick else setup
        variables = train(setup, seed, *data["train"])
        if setup.net.training == "quantised":
            results["source"] = {"accuracy": source_accuracy(setup, variables, *data["test"])}
        judge = Judge(setup, traces(setup, variables, data), data["test"][0].shape, seed)
        results |= judge.all()
        shown |= load_module(PICTURES).chosen(judge, data["test"][0], results)
    workdir.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(workdir / f"decisions_{seed}.npz", **shown)
    return results


def figures(results: dict[str, Any], outdir: Path) -> None:
    """Writes the pictures of the page."""
    load_module(PICTURES).draw(results, outdir)
