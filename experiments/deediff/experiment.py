"""Exits within denoising steps (arXiv 2309.17074) on Fashion-MNIST of 16 x 16 pixels.

A small U-ViT is trained; then it is trained on twice, equally long and on equal noise: with L_simple + L_u ("plain":
its probes never move it) and with L_UAL as well. All ways to stop are then compared on the same initial noise: one
program computes every layer of every step and takes each sample's prediction where the arm says. Images are judged by
the Frechet distance in the features of a small classifier, the same one for all seeds.
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
from dyncomp.diffusion import (
    DDIM,
    CertaintyRule,
    DenoisingObjective,
    Moments,
    frechet_distance,
    sample_scanned,
)
from dyncomp.diffusion.certainty import squared_errors
from dyncomp.evidence.seed import load_module
from dyncomp.exits import decide
from dyncomp.experts import MLP
from dyncomp.models import Block, ExitingDenoiser, UViT
from dyncomp.models.denoising import emitted_at, exit_inputs
from dyncomp.tasks import Denoising, FashionMNIST

TITLE = "Exits within denoising steps"
COMPUTE = "cost"
SEEDS = (5, 6, 7, 8, 9)  # 0 to 4 were run with shorter training, and seen
METRICS = {
    "frechet": {"text": "Frechet distance of samples to the test images", "minimize": True},
    "cost": {"text": "FLOPs of an image; all layers at all steps are 1", "minimize": True},
    "layers": {"text": "share of the network's blocks that ran", "minimize": True},
}
PICTURES = Path(__file__).with_name("pictures.py")
layers = load_module(Path(__file__).with_name("layers.py"))
THRESHOLDS = (0.75, 0.85, 0.92)
CONTROLLED = (0.75, 0.85)
CONTROLS = ("random", "within", "schedule", "no_ual")
ARMS = [
    *("full", "plain", "small", "steps_10", "static_2", "static_4", "patience_0.75", "data"),
    *(f"exit_{tau:g}" for tau in THRESHOLDS),
    *(f"{name}_{tau:g}" for name in CONTROLS for tau in CONTROLLED),
]
TRIALS = dict.fromkeys(ARMS, 1)

BLOCKS, SMALL = 7, 3
GIVEN = 2
"""What the sampling program follows where exits are given; 0 and 1 are the rules."""
RULES = (CertaintyRule(), CertaintyRule(patience=2, patient_exits=BLOCKS // 2))


@dataclasses.dataclass(frozen=True)
class Lengths:
    """How long to train, and how much to draw."""

    steps: int = 6000
    tuned: int = 1500
    judge: int = 400
    batch: int = 32
    samples: int = 256
    denoising: int = 20
    draws: int = 2048


QUICK = Lengths(steps=3, tuned=2, judge=3, batch=8, samples=8, denoising=4, draws=16)


@functools.lru_cache  # programs are compiled once a model object
def model(blocks: int) -> ExitingDenoiser:
    """A U-ViT of width 64 on patches of 4 x 4: 17 tokens."""
    mixer = functools.partial(Attention, heads=4, rope_theta=None, causal=False)
    block = functools.partial(
        Block, mixer=mixer, ffn=functools.partial(MLP, hidden=128), norm="layer"
    )
    net = functools.partial(
        UViT, size=16, channels=1, patch=4, d_model=64, depth=blocks - 1, block=block
    )
    return ExitingDenoiser(backbone=net)


# ---- training


def start(net: ExitingDenoiser, seed: int, images: np.ndarray) -> Any:
    """Random parameters."""
    keys = {"params": fold(seed, 0, "params"), "dropout": fold(seed, 0, "dropout")}
    return nn.meta.unbox(jax.jit(net.init)(keys, images[:2]))["params"]


class Trainer:
    """AdamW on one network; the weights of L_u and L_UAL and the rate are arguments, so that it compiles once.

    No clipping: a norm over all parameters would let the probes' gradients move the network.
    """

    def __init__(self, net: ExitingDenoiser, images: np.ndarray, batch: int):
        self.net, self.images, self.batch = net, images, batch
        self.adam = optax.chain(
            optax.scale_by_adam(0.9, 0.99), optax.add_decayed_weights(0.01, _matrices)
        )
        self._step = jax.jit(self._update, donate_argnums=(0, 1))

    def _update(self, params, state, images, key, rate, weights):
        def loss_of(params):
            output, _ = self.net.apply(
                {"params": params}, images, train=True, rngs={"dropout": key}, mutable=["controls"]
            )[0]
            objective, mask = DenoisingObjective(), jnp.ones(len(images))
            simple = jnp.mean(squared_errors(output["inner"][-1:], output["noise"]))
            probes, layers = objective.probes(output, mask), objective.layers(output, mask)
            return simple + weights[0] * probes + weights[1] * layers

        update, state = self.adam.update(jax.grad(loss_of)(params), state, params)
        return jax.tree.map(lambda p, u: p - rate * u, params, update), state

    def __call__(self, params, steps: int, seed: int, name: str, peak: float, weights) -> Any:
        """Trained on for so many steps; linear warm-up over a tenth, then cosine to nothing."""
        rng = np.random.default_rng([seed, len(name)])
        rate = optax.warmup_cosine_decay_schedule(0.0, peak, max(steps // 10, 1), steps + 1)
        rates = np.asarray(rate(jnp.arange(1, steps + 1)), np.float32)
        params, weights = jax.tree.map(jnp.array, params), jnp.float32(weights)
        state = self.adam.init(params)
        for step in range(steps):
            rows = self.images[rng.integers(len(self.images), size=self.batch)]
            key = fold(seed, step, name)
            params, state = self._step(params, state, rows, key, rates[step], weights)
        return params


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def train_all(seed: int, images: np.ndarray, lengths: Lengths) -> dict[str, Any]:
    """Parameters: ``full`` with the three losses, ``plain`` equally long without L_UAL, and the ``small`` network."""
    trainer = Trainer(model(BLOCKS), images, lengths.batch)
    fresh = start(trainer.net, seed, images)
    base = trainer(fresh, lengths.steps, seed, "base", 2e-3, (0, 0))
    ready = {**base, "probes": fresh["probes"]}
    tune = lambda weights: trainer(ready, lengths.tuned, seed, "tuned", 1e-3, weights)
    found = {"full": tune((1, 1)), "plain": tune((1, 0))}
    trainer = Trainer(model(SMALL), images, lengths.batch)
    small = trainer(start(trainer.net, seed, images), lengths.steps, seed, "base", 2e-3, (0, 0))
    return {**found, "small": trainer(small, lengths.tuned, seed, "tuned", 1e-3, (0, 0))}


# ---- the judge


def make_judge(arrays: Any, lengths: Lengths) -> Any:
    """A function from images to features [n 64] of a classifier, and its parameters' test accuracy."""
    flat = lambda x: x.reshape(len(x), -1)
    body = nn.Sequential([
        nn.Conv(16, (3, 3), (2, 2)), nn.relu, nn.Conv(32, (3, 3), (2, 2)), nn.relu, flat,
        nn.Dense(64), nn.relu,
    ])  # fmt: skip
    head, adam = nn.Dense(10), optax.adam(2e-3)
    images, labels = arrays["train"]["inputs"], arrays["train"]["targets"]
    first, second = jax.random.split(jax.random.key(0))
    params = (body.init(first, images[:2]), head.init(second, jnp.zeros((1, 64))))

    def loss_of(params, x, y):
        logits = head.apply(params[1], body.apply(params[0], x))
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(params, state, x, y):
        update, state = adam.update(jax.grad(loss_of)(params, x, y), state)
        return optax.apply_updates(params, update), state

    state, rng = adam.init(params), np.random.default_rng(0)
    for _ in range(lengths.judge):
        rows = rng.integers(len(images), size=128)
        params, state = step(params, state, images[rows], labels[rows])
    features = jax.jit(lambda x: body.apply(params[0], x))
    test = arrays["test"]
    said = head.apply(params[1], features(test["inputs"])).argmax(-1)
    return features, 100.0 * float((said == test["targets"]).mean())


# ---- sampling


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sampled(net, sampler, params, x, threshold, which, given):
    def denoise(x, times, index):
        inner, certainty = net.apply({"params": params}, x, times, method="denoise")
        rows, means = exit_inputs(certainty[:-1])
        thresholds = jnp.full((len(rows),), threshold)
        decided = [decide(rule, rows, means, thresholds).exit for rule in RULES]
        exits = jnp.stack([*decided, given[index]])[which]
        return emitted_at(inner, exits), exits

    return sample_scanned(sampler, denoise, x)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Images [b h w c] and where every step of each stopped [s b]."""

    images: np.ndarray
    exits: np.ndarray


class Studio:
    """Samples every arm from the same noise and judges it."""

    def __init__(self, seed: int, arrays: Any, lengths: Lengths):
        self.seed, self.lengths = seed, lengths
        self.noise = np.random.default_rng([seed, 6]).normal(size=(lengths.samples, 16, 16, 1))
        self.features, self.accuracy = make_judge(arrays, lengths)
        self.real = Moments.of(self.features(arrays["test"]["inputs"]))
        self.price = {
            blocks: [cost.flops for cost in model(blocks).cost((1, 16, 16, 1)).values()]
            for blocks in (BLOCKS, SMALL)
        }

    def frechet(self, images: Any) -> float:
        return frechet_distance(Moments.of(self.features(images)), self.real)

    def draw(self, params, tau=1.0, which=0, given=None, blocks=BLOCKS, steps=0) -> Drawn:
        """Samples with exits by a rule at ``tau`` (1: none), or as ``given`` [s b]."""
        steps = steps or self.lengths.denoising
        shape = (steps, self.lengths.samples)
        which = which if given is None else GIVEN
        given = np.zeros(shape, np.int32) if given is None else np.broadcast_to(given, shape)
        sampler = DDIM(steps=steps, clip=1.0)
        images, exits = _sampled(
            model(blocks), sampler, params, jnp.float32(self.noise), jnp.float32(tau),
            np.int32(which), jnp.asarray(given, jnp.int32),
        )  # fmt: skip
        return Drawn(np.asarray(images), np.asarray(exits))

    def judged(self, drawn: Drawn, blocks: int = BLOCKS) -> dict[str, float]:
        """Frechet distance, cost against all layers at all steps, share of blocks."""
        spent = np.cumsum(self.price[blocks])[drawn.exits].mean(axis=1).sum()
        whole = sum(self.price[BLOCKS]) * self.lengths.denoising
        layers = (drawn.exits + 1.0).mean() / blocks
        return {
            "frechet": self.frechet(drawn.images),
            "cost": spent / whole,
            "layers": layers,
        }


def schedule_like(exits: np.ndarray) -> np.ndarray:
    """Exits [s 1] of equal mean depth: the first layer at first, all layers at last, one step in between."""
    steps, last = len(exits), BLOCKS - 1
    total = exits.mean() * steps
    early = min(int((steps * last - total) / last), steps - 1)
    between = round(total - (steps - early - 1) * last)
    return np.asarray([0] * early + [between] + [last] * (steps - early - 1))[:, None]


def controls(studio: Studio, params: Any, tau: float, exits: np.ndarray) -> dict[str, Drawn]:
    """The same mean depth, decided otherwise; and the same decisions in the network without L_UAL."""
    rng = np.random.default_rng([studio.seed, 7])
    random = rng.permutation(exits.ravel()).reshape(exits.shape)
    within = rng.permuted(exits, axis=1)
    draw = lambda given: studio.draw(params["full"], given=given)
    return {
        f"random_{tau:g}": draw(random),
        f"within_{tau:g}": draw(within),
        f"schedule_{tau:g}": draw(schedule_like(exits)),
        f"no_ual_{tau:g}": studio.draw(params["plain"], given=exits),
    }


def sample_all(studio: Studio, params: Any, lengths: Lengths) -> dict[str, Drawn]:
    """Every arm of the large network at all steps."""
    full = params["full"]
    drawn = {
        "full": studio.draw(full),
        "plain": studio.draw(params["plain"]),
        "static_2": studio.draw(full, given=1),
        "static_4": studio.draw(full, given=3),
        "patience_0.75": studio.draw(full, 0.75, which=1),
    }
    for tau in THRESHOLDS:
        drawn[f"exit_{tau:g}"] = one = studio.draw(full, tau)
        if tau in CONTROLLED:
            drawn |= controls(studio, params, tau, one.exits)
    return drawn


def run_seed(seed: int, quick: bool, workdir: Path) -> dict[str, dict[str, float]]:
    """All arms of one seed: arm -> metric -> value; shown_SEED.npz in ``workdir`` is for the pictures."""
    lengths = QUICK if quick else Lengths()
    task = Denoising(images=FashionMNIST(), pad=2, shrink=2)
    arrays = {split: task.source(split).arrays for split in ("train", "validation", "test")}
    params = train_all(seed, arrays["train"]["inputs"], lengths)
    studio, net = Studio(seed, arrays, lengths), model(BLOCKS)
    drawn = sample_all(studio, params, lengths)
    results = {name: studio.judged(one) for name, one in drawn.items()}
    few = studio.draw(params["full"], steps=max(lengths.denoising // 2, 1))
    small = studio.draw(params["small"], blocks=SMALL)
    results["steps_10"], results["small"] = studio.judged(few), studio.judged(small, SMALL)
    held = arrays["validation"]["inputs"][: lengths.samples]
    results["data"] = {"frechet": studio.frechet(held), "judge_accuracy": studio.accuracy}
    test = arrays["test"]["inputs"]
    found, plain = (
        layers.errors_of(net, params[name], test, seed, lengths.draws) for name in ("full", "plain")
    )
    results["full"] |= layers.layer_figures(found, plain)
    for tau in THRESHOLDS:
        results[f"exit_{tau:g}"] |= layers.depths_by_time(found, tau)
    workdir.mkdir(parents=True, exist_ok=True)
    shown = load_module(PICTURES).chosen(net, params["full"], test, found, plain, drawn, small)
    np.savez_compressed(workdir / f"shown_{seed}.npz", **shown)
    return results


def figures(results: dict[str, Any], outdir: Path) -> None:
    """Writes the pictures of the page."""
    load_module(PICTURES).draw(results, outdir)
