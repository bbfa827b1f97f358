"""Networks with planted exits for `dyncomp bench exits`: a vision transformer and a text encoder of width 256.

Weights and inputs are random: time depends on who leaves where, not on the values. Thresholds are solved on other
random inputs so that a geometric share leaves at every exit and the mean example runs a third of the blocks.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dyncomp.attention import Attention
from dyncomp.bench import timing
from dyncomp.core.ledger import Cost, Ledger
from dyncomp.exits import ConfidenceRule, ExitBank, solve_thresholds
from dyncomp.exits.rules import confidence
from dyncomp.experts import MLP, SwiGLU
from dyncomp.models import Block, DecoderLM, ExitingClassifier, Group, VisionTransformer, layout
from dyncomp.models.group import Execution
from dyncomp.runtime import MaskedExecutor, Segment, Segmented, from_model
from dyncomp.runtime.buckets import powers_of_two

DEPTH, QUICK_DEPTH, WIDTH, HEADS, CLASSES = 12, 3, 256, 4, 10
SHARE = 1 / 3
"""Of the blocks, run by the mean example."""
CALIBRATION = 512
SIDE, PATCH, TEXT, VOCABULARY = 28, 4, 32, 1024
SHARPER = 8.0
"""Random heads say much the same of every input; this much larger, confidences differ beyond rounding."""


@dataclasses.dataclass(frozen=True)
class Planted:
    """A network with exits, and the same without.

    Attributes:
      net: its segments, thresholds solved.
      full: all blocks and the last head as one program, the faster of scanned and unrolled: batch -> logits.
      form: which of the two.
      flops: of one example through ``full``.
      draw: ``(count, seed) -> inputs``.
      params: unrolled and unboxed, for a peer that computes the same.
    """

    net: Segmented
    full: Callable[[Any], Any]
    form: str
    flops: int
    draw: Callable[[int, int], np.ndarray]
    params: Any


def solved(net: Segmented, inputs: np.ndarray) -> Segmented:
    """The network with thresholds under which these inputs run `SHARE` of the blocks on average."""
    depth = len(net.segments)
    everyone = dataclasses.replace(net, thresholds=[np.inf] * (depth - 1))
    run = MaskedExecutor(everyone)
    scores = np.concatenate([run(part).scores for part in np.array_split(inputs, 8)])
    own, blocks = scores[:, : depth - 1].astype(np.float64), np.arange(1.0, depth + 1)
    found = solve_thresholds(own, blocks, max(1.0, SHARE * depth), shape="geometric")
    return dataclasses.replace(net, thresholds=found.astype(np.float32).tolist())


def fastest(
    run: Callable[[Execution, Any, Any], Any], stored: Any, batch: np.ndarray
) -> tuple[Callable[[Any], Any], str]:
    """The network without exits as one program, (call, "scan" or "unroll"): what takes less time on a batch.

    Args:
      run: ``(layers, variables, inputs) -> logits``.
      stored: variables for "scan".
      batch: inputs.
    """

    def form(layers: Execution) -> Callable[[Any], Any]:
        own = stored if layers == "scan" else layout.unstack(stored)
        program = jax.jit(functools.partial(run, layers))
        return lambda inputs: np.asarray(program(own, inputs))

    names = get_args(Execution)
    calls = [form(layers) for layers in names]
    seconds = timing.interleaved(*(functools.partial(c, batch) for c in calls), pairs=3).seconds()
    best = int(np.argmin(seconds))
    return calls[best], names[best]


def _vision(depth: int, layers: Execution) -> Callable[..., VisionTransformer]:
    attention = functools.partial(Attention, heads=HEADS, rope_theta=None, causal=False, bias=True)
    ffn = functools.partial(MLP, hidden=4 * WIDTH)
    block = functools.partial(Block, mixer=attention, ffn=ffn, norm="layer")
    return functools.partial(
        VisionTransformer, classes=CLASSES, patch=PATCH, d_model=WIDTH,
        groups=(Group((block,), depth),), layers=layers,
    )  # fmt: skip


@functools.cache
def images(depth: int = DEPTH, batch: int = 64) -> Planted:
    """A vision transformer on 28 x 28 grey images, 50 tokens."""

    def draw(count: int, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).normal(size=(count, SIDE, SIDE, 1)).astype(np.float32)

    bank = functools.partial(ExitBank, gated=False)
    model = lambda layers: ExitingClassifier(_vision(depth, layers), bank, ConfidenceRule())
    variables = nn.meta.unbox(jax.jit(model("scan").init)(jax.random.key(0), draw(1, 0)))
    heads = variables["params"]["bank"]["heads"]
    heads["logits_kernel"] = heads["logits_kernel"] * SHARPER
    net = from_model(model("unroll"), variables, draw(1, 0).shape)
    run = lambda layers, own, x: _vision(depth, layers)().apply(own, x)[0]
    full, form = fastest(run, {"params": variables["params"]["net"]}, draw(batch, 2))
    heads_flops = ExitBank(depth - 1, CLASSES, gated=False).cost(WIDTH)["heads"].flops
    flops = sum(part.cost.flops for part in net.segments) - (depth - 1) * heads_flops
    net = solved(net, draw(CALIBRATION, 1))
    return Planted(net, full, form, flops, draw, layout.unstack(variables["params"]))


def _encoder(depth: int, layers: Execution) -> DecoderLM:
    attention = functools.partial(Attention, heads=HEADS, causal=False)
    ffn = functools.partial(SwiGLU, hidden=8 * WIDTH // 3)
    group = Group((functools.partial(Block, mixer=attention, ffn=ffn),), depth)
    return DecoderLM(
        vocab_size=VOCABULARY, d_model=WIDTH, groups=(group,), layers=layers, tie_embeddings=True
    )


@functools.cache
def text(depth: int = DEPTH, batch: int = 64) -> Planted:
    """An encoder of 32 tokens (RMSNorm, RoPE, SwiGLU) with a linear head on the mean after every block, by hand."""

    def draw(count: int, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return rng.integers(0, VOCABULARY, (count, TEXT)).astype(np.int32)

    stored = nn.meta.unbox(jax.jit(_encoder(depth, "scan").init)(jax.random.key(0), draw(1, 0)))
    stored["params"]["embed"] = stored["params"]["embed"] * 50  # of size one, as a trained one's
    own, net = layout.unstack(stored), _encoder(depth, "unroll")
    heads = SHARPER * jax.random.normal(jax.random.key(1), (depth, WIDTH, CLASSES)) / WIDTH**0.5
    places = jnp.arange(TEXT, dtype=jnp.int32)[None]

    def make(index: int) -> Callable[..., Any]:
        def run(weights: Any, x: Any, threshold: Any) -> Any:
            block, head = weights
            y, _ = net.apply(block, index, x, places, method="run_block")  # type: ignore[misc]
            logits = jnp.mean(y, axis=1) @ head
            score = confidence(logits, "max_p")
            return y, logits, score >= threshold, score

        return run

    head_flops = 2 * WIDTH * CLASSES
    block_flops = _block_flops(net, own, draw(1, 0))
    price = Cost(block_flops + head_flops)
    parts = [Segment(make(i), (_block(own, i), heads[i]), price) for i in range(depth)]
    begin = lambda weights, tokens: net.apply(weights, tokens, places, method="embed")
    embedding = {"params": {"embed": own["params"]["embed"]}}
    segmented = Segmented(begin, embedding, parts, [0.0] * depth)

    def run(layers: Execution, own: Any, tokens: Any) -> Any:
        x, _ = _encoder(depth, layers).apply(own, tokens, method="hidden")  # type: ignore[misc]
        return jnp.mean(x, axis=1) @ heads[-1]

    full, form = fastest(run, stored, draw(batch, 2))
    return Planted(
        solved(segmented, draw(CALIBRATION, 1)),
        full,
        form,
        depth * block_flops + head_flops,
        draw,
        {"net": own["params"], "heads": heads},
    )


def _block(own: Any, index: int) -> Any:
    """A block's parameters, as the model finds them."""
    group = own["params"]["group_0"]
    name = sorted(group, key=lambda n: int(n.rsplit("_", 1)[1]))[index]
    return {"params": {"group_0": {name: group[name]}, "embed": own["params"]["embed"]}}


def _block_flops(net: DecoderLM, own: Any, tokens: np.ndarray) -> int:
    """FLOPs of one example in one block, as the ledger has them."""
    _, aux = jax.jit(functools.partial(net.apply, method="hidden"))(own, tokens)
    ledger = Ledger(net.cost(tokens.shape)).record(aux.events)
    return ledger.total(under="group_") // net.depth


def fixed_server(subject: Planted, batch: int) -> Callable[[Any], Any]:
    """As many of the first blocks as the mean example runs, and the head after them, for up to ``batch`` rows."""
    net = subject.net
    count = round(SHARE * len(net.segments))

    @jax.jit
    def run(begin: Any, weights: Any, inputs: Any) -> Any:
        carry, output = net.begin(begin, inputs), None
        for segment, own in zip(net.segments[:count], weights, strict=True):
            carry, output, *_ = segment.run(own, carry, jnp.float32(0))
        return output

    weights = [segment.weights for segment in net.segments[:count]]
    sizes = powers_of_two(batch)
    for size in sizes:
        jax.block_until_ready(run(net.begin_weights, weights, subject.draw(size, 0)))

    def call(inputs: np.ndarray) -> np.ndarray:
        size = next(size for size in sizes if size >= len(inputs))
        padding = [(0, size - len(inputs))] + [(0, 0)] * (inputs.ndim - 1)
        padded = np.pad(inputs, padding, "edge")
        return np.asarray(run(net.begin_weights, weights, padded))[: len(inputs)]

    return call


NETS = {"vit": images, "text": text}
