"""Networks as segments with decisions between them (DyCL, arXiv 2307.04963): do executors agree, and what do they save?

Three small networks are trained: the two of the config `dycl` (six exits; gates that skip blocks) on Fashion-MNIST, and
a decoder with an exit for each token, on source code. Everything else runs them: all executors, one
operation at a time, traced with one example, with parts of the runtime switched off. Times are processor time of one
pinned thread: of every image the median of its repeats, taken in turns.
"""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from dyncomp import config
from dyncomp.attention import Attention
from dyncomp.core.rng import fold
from dyncomp.evidence.seed import load_module
from dyncomp.exits import solve_thresholds
from dyncomp.experts import SwiGLU
from dyncomp.models import Block, DecoderLM, Group, NestedLM, apply
from dyncomp.runtime import (
    CompactExecutor,
    HostExecutor,
    LaxExecutor,
    MaskedExecutor,
    Segmented,
    agreement,
    from_model,
    greedy,
    resolve,
)
from dyncomp.tasks import CodeLM, FashionMNIST, NestedObjective
from dyncomp.tasks.loader import Loader

TITLE = "Networks as segments: compiled once, run as far as needed"
COMPUTE = "ms"
METRICS = {
    "error": {"text": "largest difference between executors, over the largest output"},
    "differ": {"text": "examples that took another way under some executor, none near a threshold"},
    "near": {"text": "examples within 1e-5 of a threshold (left out of error and differ)"},
    "ms": {"text": "CPU milliseconds an image (or completion) at batch 1", "minimize": True},
    "p95": {"text": "the same, 95th percentile over images", "minimize": True},
    "depth": {"text": "segments that the mean image runs"},
    "needed": {"text": "FLOPs needed over those of all segments", "minimize": True},
    "times": {"text": "time of one operation after the other over the host executor's"},
    "wrong": {"text": "percent of other images with a wrong output"},
    "raises": {"text": "of jit and make_jaxpr, how many raise"},
    "programs": {"text": "programs compiled", "minimize": True},
    "extra": {"text": "programs beyond segments x buckets, or beyond one each"},
    "seconds": {"text": "CPU seconds that compiling took", "minimize": True},
    "kb": {"text": "kilobytes an image across boundaries", "minimize": True},
    "vain": {"text": "segments run in vain for an image, at most"},
    "images_s": {"text": "images a CPU second at batch 64"},
    "accuracy": {"text": "percent of 1,000 test images"},
    "final": {"text": "percent, all segments run"},
}
PICTURES = Path(__file__).with_name("pictures.py")
RATES = (0, 25, 50, 75, 100)
ARMS = [
    "exits", "skips", "decoder", "baked", "folded", *(f"host_{r}" for r in RATES), "masked", "fused",
    "op_by_op", "ahead_0", "ahead_50", "host_64", "masked_64", "programs_host", "programs_one", "live",
    "everything", "buckets", "no_buckets", "skips_host", "skips_masked", "decoder_host",
    "decoder_masked",
]  # fmt: skip
TRIALS = dict.fromkeys(ARMS, 1)  # nothing was tuned

SEGMENTS, BATCH = 6, 64  # of the configuration's network with exits
PROMPT, NEW, RATE = 16, 8, 5e-3
TOKEN_CONFIDENCE = 0.35
MEAN_DEPTH = 3.0
"""Segments that the mean validation image runs under the thresholds of `budgeted`."""
LENGTHS = {"steps": 150, "lm_steps": 120, "images": 40, "repeats": 5, "batches": 100}
QUICK = {"steps": 2, "lm_steps": 2, "images": 4, "repeats": 1, "batches": 3}


# ---- the networks


def decoder_model() -> NestedLM:
    """Four blocks of width 64 over bytes, exits after one, two and all."""
    mixer = functools.partial(Attention, heads=4)
    block = functools.partial(Block, mixer=mixer, ffn=functools.partial(SwiGLU, hidden=128))
    backbone = functools.partial(DecoderLM, vocab_size=256, d_model=64, groups=[Group([block], 4)])
    return NestedLM(backbone=backbone, depths=(1, 2, 4))


def fit(
    model: nn.Module,
    objective: Any,
    task: Any,
    seed: int,
    steps: int,
    batch: int,
    rate: float = RATE,
) -> Any:
    """Variables after some steps of AdamW."""
    loader = Loader(task.source("train"), seed=seed, batch_size=batch)
    first = loader.batch(0)
    variables = nn.meta.unbox(jax.jit(model.init)(fold(seed, 0, "params"), first["inputs"][:2]))
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 10), steps + 1)
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
    controls = variables["controls"]

    def loss_of(params: Any, batch: Any) -> Any:
        own = {"params": params, "controls": controls}
        output, aux = apply(model, own, batch["inputs"], train=True)
        return objective(output, aux, batch, 0)[0]

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: Any) -> Any:
        update, state = adam.update(jax.grad(loss_of)(params, batch), state, params)
        return optax.apply_updates(params, update), state

    params, state = variables["params"], adam.init(variables["params"])
    for index in range(steps):
        own = {k: loader.batch(index)[k] for k in ("inputs", "targets", "mask")}
        params, state = step(params, state, own)
    return {"params": params, "controls": controls}


def with_thresholds(net: Segmented, value: float, only: int | None = None) -> Segmented:
    """Exits at ``value``, or only one of them and the others never."""
    net.thresholds[:] = [value if only in (None, n) else np.inf for n in range(len(net.thresholds))]
    return net


def budgeted(net: Segmented, task: Any) -> Segmented:
    """Confidence thresholds under which the mean validation image runs half of the segments, every exit being used."""
    images = task.source("validation").batch(np.arange(256))["inputs"]
    scores = MaskedExecutor(with_thresholds(net, np.inf))(images).scores[:, :-1]
    costs = np.arange(1.0, SEGMENTS + 1)
    found = solve_thresholds(scores.astype(np.float64), costs, MEAN_DEPTH, shape="geometric")
    net.thresholds[:] = found.astype(np.float32).tolist()
    return net


# ---- measuring


def timed(calls: dict[str, Callable[[Any], Any]], inputs: Any, repeats: int) -> dict[str, Any]:
    """CPU milliseconds at batch 1 of each call, in turns: mean over inputs of the median of repeats, and p95."""
    spent = {name: np.zeros((len(inputs), repeats)) for name in calls}
    for call in calls.values():
        call(inputs[:1]), call(inputs[1:2])
    for n in range(len(inputs)):
        for repeat in range(repeats):
            for name, call in calls.items():
                begin = time.process_time()
                call(inputs[n : n + 1])
                spent[name][n, repeat] = 1e3 * (time.process_time() - begin)
    each = {name: np.median(values, axis=1) for name, values in spent.items()}
    return {
        name: {"ms": float(values.mean()), "p95": float(np.percentile(values, 95))}
        for name, values in each.items()
    }


def one_by_one(net: Segmented, x: Any) -> tuple[Any, list[int]]:
    """The network as plain Python writes it: an `if` after every segment. Output, and the segments that ran."""
    carry, ran = net.begin(net.begin_weights, x), []
    for index, segment in enumerate(net.segments):
        ran.append(index)
        tau = np.float32(([*net.thresholds, 0.0])[index])
        carry, output, leave, _ = segment.run(segment.weights, carry, tau)
        if index + 1 == len(net.segments) or leave[0]:
            return output, ran
    raise AssertionError("unreachable")


def straight(net: Segmented) -> Callable[[Any], Any]:
    """A network without decisions as one jitted program."""
    run = MaskedExecutor(net)
    assert len(net.segments) == 1
    return lambda x: run(x).outputs


def tracing(net: Segmented, images: Any) -> dict[str, float]:
    """What tracing with one example gives on others, in both forms."""
    raised = 0
    for trace in (jax.jit, jax.make_jaxpr):
        try:
            trace(functools.partial(one_by_one, net))(images[:1])
        except jax.errors.TracerBoolConversionError:
            raised += 1
    _, ran = one_by_one(net, images[:1])
    routes = {f"segment_{n}": int(n == ran[-1]) for n in ran if n + 1 < len(net.segments)}
    baked = MaskedExecutor(resolve(net, routes))(images[1:]).outputs
    right = MaskedExecutor(net)(images[1:]).outputs
    gap = np.abs(baked - right).max(axis=1) / np.abs(right).max()
    return {
        "wrong": 100.0 * float((gap > 1e-3).mean()),
        "error": float(gap.max()),
        "raises": raised,
    }


def host(net: Segmented, images: Any, **options: Any) -> HostExecutor:
    """For one image at a time, segment by segment."""
    return HostExecutor(net, images[:1], capacity=1, speculate=False, **options).warm_up()


def at_rates(net: Segmented, images: Any, plain: Any, lengths: Any) -> dict[str, Any]:
    """Latency at batch 1 over exit rates, and its rivals. One executor serves all rates: thresholds are arguments."""
    every = MaskedExecutor(with_thresholds(net, np.inf))
    scores = np.sort(every(images).scores[:, 0])[::-1]
    edges = [np.inf, *((scores[:-1] + scores[1:]) / 2), -np.inf]
    run, last = host(net, images), len(net.segments) - 1

    def at(rate: int, ahead: bool = False) -> Callable[[Any], Any]:
        tau = np.full(last + 1, np.inf, np.float32)
        tau[0] = edges[round(rate / 100 * len(images))]

        def call(x: Any) -> Any:
            run.thresholds[:], run.speculate = tau, ahead
            return run(x)

        return call

    calls: dict[str, Any] = {f"host_{rate}": at(rate) for rate in RATES}
    calls |= {"ahead_0": at(0, True), "ahead_50": at(50, True)}
    found = timed({**calls, "masked": every, "fused": plain}, images, lengths["repeats"])
    whole = len(images) * sum(part.cost.flops for part in net.segments)
    for name, call in calls.items():
        ran = [call(images[n : n + 1]) for n in range(len(images))]
        depth = np.asarray([one.visits.sum() for one in ran])
        rows = np.asarray([one.executed.sum() for one in ran])
        needed = sum(one.ledger.total("needed") for one in ran)
        found[name] |= {"depth": float(depth.mean()), "needed": needed / whole}
        found[name]["vain"] = float((rows - depth).max())
    return {**found, "op_by_op": naively(net, run, images[: max(2, len(images) // 10)], lengths)}


def naively(net: Segmented, run: HostExecutor, few: Any, lengths: Any) -> dict[str, float]:
    """One operation after the other, no exit taken, against the host executor."""
    run.thresholds[:], run.speculate = np.inf, False
    with jax.disable_jit():
        slow = timed({"op": lambda x: np.asarray(one_by_one(net, x)[0])}, few, 1)["op"]
    return {
        **slow,
        "times": slow["ms"] / timed({"host": run}, few, lengths["repeats"])["host"]["ms"],
    }


def rate_of(run: Any, images: Any, repeats: int) -> float:
    """Images a CPU second, by the median."""
    run(images)
    spent = []
    for _ in range(repeats):
        begin = time.process_time()
        run(images)
        spent.append(time.process_time() - begin)
    return len(images) / float(np.median(spent))


def batches(net: Segmented, images: Any, lengths: Any, seed: int) -> dict[str, Any]:
    """Throughput at batch 64, and what streams of batches compile."""
    rng, found = np.random.default_rng(seed), {}
    run = HostExecutor(net, images, capacity=BATCH, buckets=(1, 4, 16, 64)).warm_up()
    all_of_it = MaskedExecutor(net)
    wanted = len(net.segments) * len(run.buckets)
    for size in rng.integers(1, BATCH + 1, lengths["batches"]):
        run(images[:size])
    found["programs_host"] = {"programs": run.compilations, "extra": run.compilations - wanted}
    pairs = {"host_64": [], "masked_64": []}
    for _ in range(3):
        pairs["host_64"].append(rate_of(run, images[:BATCH], lengths["repeats"]))
        pairs["masked_64"].append(rate_of(all_of_it, images[:BATCH], lengths["repeats"]))
    for name, rates in pairs.items():
        found[name] = {"images_s": float(np.median(rates))}
    found["host_64"]["depth"] = float(run(images[:BATCH]).visits.sum(1).mean())
    ones = [MaskedExecutor(net), LaxExecutor(net), CompactExecutor(net, (2,))]
    for n in range(lengths["batches"]):
        for one in ones:
            one(np.roll(images, n, axis=0)[:4])
    total = sum(one.compilations for one in ones)
    found["programs_one"] = {"programs": total, "extra": total - len(ones)}
    return found | storm(net, images, rng, lengths["batches"] // 4)


def storm(net: Segmented, images: Any, rng: Any, count: int) -> dict[str, Any]:
    """What a stream of random sizes compiles with buckets, and with a program for every row count that comes."""
    found, sizes = {}, rng.integers(1, 17, count)
    for name, buckets in (("buckets", None), ("no_buckets", tuple(range(1, 17)))):
        run = HostExecutor(net, images, capacity=16, buckets=buckets, launch=64)
        begin = time.process_time()
        for size in sizes:
            run(images[:size])
        seconds = time.process_time() - begin
        found[name] = {"programs": run.compilations, "seconds": seconds}
    return found


def skipped(net: Segmented, images: Any, lengths: Any) -> dict[str, Any]:
    """The skipping network at batch 1: against masked execution, and with liveness off."""
    runs: dict[str, Any] = {"live": host(net, images)}
    runs |= {"everything": host(net, images, liveness=False), "skips_masked": MaskedExecutor(net)}
    found = timed(runs, images, lengths["repeats"])
    for name in ("live", "everything"):
        rows = sum(runs[name](images[n : n + 1]).executed for n in range(len(images)))
        found[name]["kb"] = float((rows @ runs[name].moved).sum() / len(images) / 1e3)
    return {**found, "skips_host": dict(found["live"])}


def same(net: Segmented, inputs: Any) -> tuple[dict[str, float], Any]:
    """Agreement of all executors as figures, and what they did."""
    found = agreement(net, inputs)
    return {"error": found.error, "differ": found.differ, "near": found.near}, found


def judged(
    model: Any, variables: Any, task: Any, net: Segmented | None, count: int
) -> dict[str, float]:
    """Accuracy on test images, with exits and without."""
    batch = task.source("test").batch(np.arange(count))
    controls = dict(variables["controls"])
    if net is not None:
        controls["thresholds"] = jnp.asarray(net.thresholds, jnp.float32)
    call = jax.jit(functools.partial(apply, model))
    output, _ = call({**variables, "controls": controls}, batch["inputs"])
    right = lambda y: 100.0 * float((np.argmax(y, -1) == batch["targets"]).mean())
    if net is None:
        return {"accuracy": right(output)}
    return {"accuracy": right(output["emitted"]), "final": right(output["final"])}


def run_seed(seed: int, quick: bool, workdir: Path) -> dict[str, Any]:
    """All arms of one seed: arm -> metric -> value."""
    lengths, task = QUICK if quick else LENGTHS, FashionMNIST()
    images = task.source("test").batch(np.arange(200) + seed % 50 * 200)["inputs"]
    few, found = images[: lengths["images"]], {}
    shape, count = images.shape, 64 if quick else 1000
    runs = config.load("dycl").runs
    model = runs["leaving"].model
    own = fit(model, runs["leaving"].objective, task, seed, lengths["steps"], 64)
    make = lambda: from_model(model, own, shape)
    net = budgeted(make(), task)
    found["exits"], exits = same(net, images[:BATCH])
    found["exits"] |= judged(model, own, task, net, count)
    whole = resolve(make(), {f"segment_{n}": 0 for n in range(SEGMENTS - 1)})
    backbone = model.backbone()
    plain = jax.jit(lambda v, x: backbone.apply(v, x)[0])
    fused = lambda x: np.asarray(plain({"params": own["params"]["net"]}, x))
    gap = np.abs(straight(whole)(images) - fused(images)).max() / np.abs(fused(images)).max()
    found["folded"] = {"error": float(gap)}
    found["baked"] = tracing(net, images)
    found |= at_rates(make(), few, fused, lengths) | batches(net, images[:BATCH], lengths, seed)
    model = runs["skipping"].model
    own = fit(model, runs["skipping"].objective, task, seed, lengths["steps"], 64)
    net = from_model(model, own, shape)
    found["skips"], skips = same(net, images[:BATCH])
    found["skips"] |= {
        **judged(model, own, task, None, count),
        "depth": float(skips.visits.sum(1).mean()),
    }
    found |= skipped(net, few, lengths)
    found |= decoding(seed, lengths)
    shown = load_module(PICTURES).chosen(images[:BATCH], exits, skips)
    return {**found, "_figures": shown}


def decoding(seed: int, lengths: Any) -> dict[str, Any]:
    """The decoder: agreement, and completions one at a time."""
    task, model = CodeLM(context=48), decoder_model()
    own = fit(model, NestedObjective(), task, seed, lengths["lm_steps"], 16)
    batch = task.source("test").batch(np.arange(16) * 37 + seed)
    prompts = np.asarray(batch["inputs"][:, :PROMPT], np.int32)
    net = greedy(model, own, PROMPT, NEW)
    net.thresholds[1:3] = [TOKEN_CONFIDENCE] * 2
    figures, found = same(net, prompts)
    runs: dict[str, Any] = {
        "decoder_host": host(net, prompts),
        "decoder_masked": MaskedExecutor(net),
    }
    depth = float(found.visits[:, 1:-1].sum() / (len(prompts) * NEW))
    spent = timed(runs, prompts[: max(2, lengths["images"] // 5)], lengths["repeats"])
    return {"decoder": {**figures, "depth": depth}, **spent}


def figures(results: dict[str, Any], outdir: Path) -> None:
    """Writes the pictures of the page."""
    load_module(PICTURES).draw(results, outdir)
