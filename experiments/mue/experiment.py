"""Exits by saturation in encoder and decoder (MuE, arXiv 2211.11152) on questions about pictures of shapes.

Two networks of 4 + 4 layers are trained, with the layer-wise loss and without, and one of 2 + 2. Everything else is a
short fine-tuning of one of them (a joint encoder, heads at the decoder's layers) or a choice of thresholds. Questions
want one word: every combination of exits is computed once (tables.py), and thresholds then look answers up.
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

from dyncomp import attention, experts, models
from dyncomp.core.ledger import Ledger
from dyncomp.core.rng import fold
from dyncomp.evidence.seed import load_module
from dyncomp.exits import Decay
from dyncomp.exits.layerwise import layer_losses
from dyncomp.models import saturating_cost
from dyncomp.tasks import ShapeScenes
from dyncomp.tasks.shapes import WORDS

TITLE = "Multiple exits of a vision-language model"
COMPUTE = "reduction"
SEEDS = (5, 6, 7, 8, 9)  # 0 to 2 were run with shorter training, and seen
METRICS = {
    "accuracy": {"text": "percent of the test questions (captions: of whole captions)"},
    "reduction": {"text": "expected time reduction, percent; the encoder is charged to every word"},
    "flops": {"text": "FLOPs over those of the whole network", "minimize": True},
    "image": {"text": "picture layers run", "minimize": True},
    "text": {"text": "text layers run", "minimize": True},
    "decoder": {"text": "decoder layers a word", "minimize": True},
}
PICTURES = Path(__file__).with_name("pictures.py")
WIDTH, DEPTH, HEADS, PATCH, BATCH, RATE = 48, 4, 4, 5, 32, 3e-3
TARGETS = (30, 45, 60)
ARMS = [
    "whole", "plain", "shallow", *(f"{p}layer_{i}" for p in ("", "plain_") for i in (1, 2, 3)),
    *(f"{method}_{target}" for method in ("mue", "plain", "joint", "random") for target in TARGETS),
    "confident_30", "confident_ceiling", "image_first", "text_first", "image_even",
    "caption_whole", "caption_decay", "caption_constant", "caption_recompute",
]  # fmt: skip
TRIALS = dict.fromkeys(ARMS, 1)  # length and rate were found on other seeds, for all networks alike
SHUFFLES = 10
TASK, QUESTIONS, CAPTIONS = (ShapeScenes(kind=kind) for kind in ("both", "answer", "caption"))
tables = load_module(Path(__file__).with_name("tables.py"))


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Steps of each training, and examples of each evaluation."""

    steps: int = 1500
    tuned: int = 200
    heads: int = 200
    held: int = 1000
    test: int = 1500
    captions: int = 250


QUICK = Lengths(steps=4, tuned=2, heads=2, held=20, test=20, captions=4)


@functools.lru_cache  # equal networks are one object, so that jit knows them again
def model(
    depth: int = DEPTH,
    streams: str = "apart",
    layers: str = "scan",
    beta: float = 1.0,
    fill: str = "copy",
):
    """The network, of width 48 on 16 patches and 2 tokens of text."""
    mixer = functools.partial(attention.Attention, heads=HEADS, rope_theta=None, bias=True)
    shared = {"ffn": functools.partial(experts.MLP, hidden=2 * WIDTH), "norm": "layer"}
    whole = functools.partial(mixer, causal=False)
    net = functools.partial(
        models.EncoderDecoder, vocab_size=len(WORDS), d_model=WIDTH, row=TASK.row, patch=PATCH,
        encoder=functools.partial(models.Block, mixer=whole, **shared),
        decoder=functools.partial(models.CrossBlock, mixer=mixer, heads=HEADS, bias=True, **shared),
        encoder_depth=depth, decoder_depth=depth, streams=streams, layers=layers,
    )  # fmt: skip
    return models.SaturatingVLM(net=net, decay=Decay(beta=beta), self_fill=fill)


def of_split(task: ShapeScenes, split: str, count: int) -> dict[str, np.ndarray]:
    """The first examples of a split."""
    return task.source(split).batch(np.arange(count))


def controls_of(net: Any, **thresholds: float) -> dict[str, Any]:
    """Controls; nobody leaves but where a threshold is given."""
    chosen = {**dict.fromkeys((*net.streams, "decoder"), tables.NEVER), **thresholds}
    return {name: jnp.float32(value) for name, value in chosen.items()}


# ---- training


def optimizer(rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, min(50, steps // 2), steps, rate / 50)
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.02)
    )


@functools.partial(jax.jit, static_argnames=("net", "rate", "steps"), donate_argnums=(0, 1))
def _step(
    params: Any, state: Any, batch: Any, weights: Any, *, net: Any, rate: float, steps: int
) -> Any:
    def loss_of(params):
        variables = {"params": params, "controls": controls_of(net)}
        output, _ = net.apply(variables, batch["inputs"], train=True)
        return weights @ layer_losses(output["layers"], batch["targets"], batch["mask"])

    update, state = optimizer(rate, steps).update(jax.grad(loss_of)(params), state, params)
    return optax.apply_updates(params, update), state


def train(net: Any, params: Any, data: Any, rate: float, last: bool = False) -> Any:
    """One pass over ``data``: the loss of every decoder layer, or of the last alone."""
    depth, steps = net.template().decoder_depth, len(data["mask"]) // BATCH
    weights = np.eye(depth)[-1] if last else np.full(depth, 1 / depth)
    params = jax.tree.map(jnp.array, params)
    state = optimizer(rate, steps).init(params)
    for n in range(steps):
        batch = {name: value[n * BATCH : (n + 1) * BATCH] for name, value in data.items()}
        params, state = _step(
            params, state, batch, jnp.asarray(weights, jnp.float32), net=net, rate=rate, steps=steps
        )
    return params


def fresh(net: Any, seed: int) -> Any:
    """Parameters at the start."""
    inputs = jnp.zeros((1, TASK.row.size), jnp.float32)
    return nn.meta.unbox(jax.jit(net.init)(fold(seed, 0, "params"), inputs))["params"]


# ---- other ways to leave


def shuffled(test: Any, exits: Any, seed: int) -> dict[str, float]:
    """The same histograms, each stream's in random order."""
    rng = np.random.default_rng([seed, 7])
    draws = [tables.score(test, tuple(map(rng.permutation, exits))) for _ in range(SHUFFLES)]
    return {key: float(np.mean([draw[key] for draw in draws])) for key in draws[0]}


def picture_at(test: Any, wanted: float) -> dict[str, float]:
    """Exits of the picture alone at a reduction of ``wanted``: on the line between neighbouring thresholds."""
    grid = [
        tables.NEVER,
        *np.quantile(test.streams["image"][:-1], np.linspace(1, 0, 40)),
        tables.ALWAYS,
    ]
    points = [tables.score(test, tables.exits_of(test, {"image": float(value)})) for value in grid]
    above = min((p for p in points if p["reduction"] >= wanted), key=lambda p: p["reduction"])
    below = max((p for p in points if p["reduction"] <= wanted), key=lambda p: p["reduction"])
    gap = above["reduction"] - below["reduction"]
    share = (wanted - below["reduction"]) / gap if gap else 0.0
    return {key: (1 - share) * below[key] + share * above[key] for key in above}


class Confident:
    """Heads [l d v] at the decoder's layers of a frozen network, leaving by the largest probability (DeeBERT)."""

    def __init__(self, net: Any, params: Any, steps: int, seed: int):
        self.net, self.params = net, params
        data = of_split(QUESTIONS, "train", steps * BATCH)
        states, answers = self._states(data), data["targets"][:, 0]
        rows = np.random.default_rng([seed, 9]).integers(0, len(answers), (steps, BATCH))
        heads = jnp.stack([params["inner"]["head"]] * (DEPTH - 1))
        tx = optimizer(RATE, steps)

        def step(carry, chosen):
            heads, state = carry
            x, y = states[:, chosen], answers[chosen]

            def loss_of(heads):
                logits = jnp.einsum("lbd,ldv->lbv", x, heads)
                tiled = jnp.broadcast_to(y, logits.shape[:2])
                return optax.softmax_cross_entropy_with_integer_labels(logits, tiled).mean()

            update, state = tx.update(jax.grad(loss_of)(heads), state, heads)
            return (optax.apply_updates(heads, update), state), None

        states, answers = jnp.asarray(states), jnp.asarray(answers)
        run = jax.jit(lambda heads: jax.lax.scan(step, (heads, tx.init(heads)), rows)[0][0])
        self.heads = np.asarray(run(heads))

    def _states(self, data: Any) -> np.ndarray:
        found = []
        for start in range(0, len(data["mask"]), tables.CHUNK):
            read, _ = tables.read(
                self.net, self.params, data["inputs"][start : start + tables.CHUNK]
            )
            depths = {name: jnp.int32(DEPTH) for name in read}
            found.append(np.asarray(tables.one_word(self.net, self.params, read, depths)[2])[:-1])
        return np.concatenate(found, axis=1)

    def figures(self, table: Any, data: Any, thresholds: Any) -> list[dict[str, float]]:
        """Of every threshold."""
        logits = np.einsum("lbd,ldv->lbv", self._states(data), self.heads)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        sure = (p / p.sum(-1, keepdims=True)).max(-1)
        right = np.concatenate(
            [logits.argmax(-1) == data["targets"][:, 0], table.right[-1, -1, -1:]]
        )
        own, full = (
            dataclasses.replace(table, right=np.broadcast_to(right, table.right.shape)),
            DEPTH - 1,
        )
        found = []
        for threshold in thresholds:
            at = np.where((sure >= threshold).any(0), (sure >= threshold).argmax(0), full)
            found.append(
                tables.score(
                    own, (np.full_like(at, full), np.full_like(at, full), at), False, at + 1
                )
            )
        return found


@functools.partial(jax.jit, static_argnames="net")
def _write(net: Any, params: Any, inputs: Any, thresholds: Any) -> Any:
    return net.apply({"params": params}, inputs, thresholds, method="generate")


class Captions:
    """Free writing of one network: a threshold of the decoder that decays or stays, caches copied or recomputed."""

    def __init__(self, params: Any, streams: dict[str, float], grid: np.ndarray, count: int):
        self.params, self.streams, self.grid = models.layout.unstack(params), streams, grid
        self.data = {s: of_split(CAPTIONS, s, count) for s in ("calibration", "test")}
        self.whole = 0

    def arms(self) -> dict[str, dict[str, float]]:
        """Figures of all arms; the decoder's threshold is the best on held-out captions at 30 percent or more."""
        decay, plain = (model(layers="unroll", beta=beta) for beta in (0.95, 1.0))
        again = model(layers="unroll", beta=0.95, fill="recompute")
        found = {"caption_whole": self.figures(decay, "test", {})}
        theta = self._chosen(decay)
        found["caption_decay"] = self.figures(decay, "test", theta)
        found["caption_recompute"] = self.figures(again, "test", theta)
        found["caption_constant"] = self.figures(plain, "test", self._chosen(plain))
        return found

    def _chosen(self, net: Any) -> dict[str, float]:
        found = []
        for value in self.grid:
            held = self.figures(net, "calibration", {**self.streams, "decoder": float(value)})
            enough = held["reduction"] >= 30.0
            found.append((enough, held["accuracy" if enough else "reduction"], float(value)))
        return {**self.streams, "decoder": max(found)[2]}

    def figures(self, net: Any, split: str, thresholds: dict[str, float]) -> dict[str, float]:
        """Exact match, and what it took."""
        data, names = self.data[split], ("image", "text", "decoder")
        said = _write(net, self.params, data["inputs"], controls_of(net, **thresholds))
        said = jax.device_get(said)
        want = np.where(data["mask"] > 0, data["targets"], 0)
        words, rows = said["decoder_layers"] > 0, len(want)
        real = {"image": jnp.ones((rows, 16), bool), "text": jnp.ones((rows, 1), bool)}
        ran = {**{n: said[f"{n}_layers"] for n in names}, "made": said["made"]}
        ran, fills = jax.tree.map(jnp.asarray, ran), net.self_fill == "recompute"
        events = jax.device_get(saturating_cost.events(net.template(), real, ran, fills=fills))
        spent = Ledger(net.cost(())).record(events).total()
        self.whole = self.whole or spent  # the first call runs everything
        layers = {n: float(said[f"{n}_layers"].mean()) for n in names[:2]}
        return {
            "accuracy": 100.0 * float((said["words"] == want).all(1).mean()),
            "reduction": 100.0 * float(1 - said["time"][words].mean()),
            "flops": spent / self.whole,
            **layers,
            "decoder": float(said["decoder_layers"][words].mean()),
        }


# ---- all arms of a seed


def trained(seed: int, lengths: Lengths) -> dict[str, Any]:
    """Parameters of every network."""
    data, net, small = of_split(TASK, "train", lengths.steps * BATCH), model(), model(depth=2)
    start = fresh(net, seed)
    found = {
        "mue": train(net, start, data, RATE),
        "plain": train(net, start, data, RATE, last=True),
    }
    found["shallow"] = train(small, fresh(small, seed), data, RATE, last=True)
    tuning = {name: value[: lengths.tuned * BATCH] for name, value in data.items()}
    return {**found, "joint": train(model(streams="joint"), found["mue"], tuning, RATE / 3)}


def by_layer(held: dict[str, Any], test: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Whole networks, and everyone leaving the decoder at each layer."""
    results, last = {}, DEPTH - 1
    for arm, name, prefix in (("whole", "mue", ""), ("plain", "plain", "plain_")):
        alone = [tables.at_layers(test[name], last, last, i) for i in range(DEPTH)]
        results |= {f"{prefix}layer_{i + 1}": own for i, own in enumerate(alone[:-1])}
        early = float(np.mean([own["accuracy"] for own in alone[:-1]]))
        results[arm] = {**alone[-1], **tables.ranks(held[name]), "early": early}
    return results


def run_seed(seed: int, quick: bool, workdir: Path) -> dict[str, dict[str, float]]:
    """All arms of one seed; ``_figures`` is for the pictures."""
    lengths = QUICK if quick else Lengths()
    params = trained(seed, lengths)
    nets = {"mue": model(), "plain": model(), "joint": model(streams="joint"), "shallow": model(2)}
    data = {
        "held": of_split(QUESTIONS, "calibration", lengths.held),
        "test": of_split(QUESTIONS, "test", lengths.test),
    }
    make = lambda split: {n: tables.table_of(nets[n], params[n], data[split]) for n in nets}
    held, test = make("held"), make("test")
    results = by_layer(held, test)
    small = tables.at_layers(test["shallow"], 1, 1, 1)
    whole = tables.flops_of(test["mue"], (np.full(lengths.test, DEPTH - 1),) * 3, False)
    small["flops"] = (
        tables.flops_of(test["shallow"], (np.ones(lengths.test, int),) * 3, False) / whole
    )
    results["shallow"] = {**small, "reduction": 100.0 * (1 - (2 + 2) / (2 * DEPTH))}
    exits = {}
    for name in ("mue", "plain", "joint"):
        found = tables.tried(held[name])
        for target in TARGETS:
            thresholds = tables.choose(found, target)
            exits[name, target] = tables.exits_of(test[name], thresholds)
            results[f"{name}_{target}"] = tables.score(test[name], exits[name, target])
            if (name, target) == ("mue", 45):
                chosen = thresholds
    for target in TARGETS:
        results[f"random_{target}"] = shuffled(test["mue"], exits["mue", target], seed)
    results["image_first"] = tables.at_layers(test["mue"], 0, DEPTH - 1, DEPTH - 1)
    results["text_first"] = tables.at_layers(test["mue"], DEPTH - 1, 0, DEPTH - 1)
    results["image_even"] = picture_at(test["mue"], results["text_first"]["reduction"])
    curve, heads = confident(
        nets["plain"], params["plain"], held["plain"], test["plain"], data, lengths.heads, seed
    )
    streams, grid = (
        {n: chosen[n] for n in ("image", "text")},
        tables.candidates(held["mue"].alike()["decoder"])[1::2],
    )
    results |= heads | Captions(params["mue"], streams, grid, lengths.captions).arms()
    more = {
        "confident": curve,
        "alike": {n: s.mean(1).tolist() for n, s in held["mue"].alike().items()},
    }
    shown = load_module(PICTURES).chosen(
        test["mue"], exits["mue", 45], data["test"], QUESTIONS, more
    )
    return {**results, "_figures": shown}


def confident(
    net: Any, params: Any, held: Any, test: Any, data: Any, steps: int, seed: int
) -> tuple[list, dict]:
    """(points of the test curve, arms) of confidence exits in the decoder alone; as many thresholds tried as of MuE."""
    heads = Confident(net, params, steps, seed)
    grid = np.linspace(1.0, 0.0, tables.GRID**2)
    found = [
        (f["accuracy"], -t)
        for f, t in zip(heads.figures(held, data["held"], grid), grid, strict=True)
        if f["reduction"] >= 30.5
    ]
    best = -max(found)[1]
    *curve, chosen, ceiling = heads.figures(
        test, data["test"], [1.01, 0.99, 0.95, 0.9, 0.8, 0.7, 0.6, best, 0.0]
    )
    return [[f["reduction"], f["accuracy"]] for f in (*curve, ceiling)], {
        "confident_30": chosen, "confident_ceiling": ceiling,
    }  # fmt: skip


def figures(results: dict[str, Any], outdir: Path) -> None:
    """Writes the pictures of the page."""
    load_module(PICTURES).draw(results, outdir)
