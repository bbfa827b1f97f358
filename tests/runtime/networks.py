"""The repository's networks as segments, tiny: name -> (segments, inputs)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dyncomp.attention import Attention
from dyncomp.decoding.entropy import entropy_bits
from dyncomp.exits import ConfidenceRule, ExitBank
from dyncomp.experts import MLP, MoE, SwiGLU
from dyncomp.models import (
    Block,
    ConvLevel,
    DecoderLM,
    ExitingConvNet,
    GatedLevel,
    Group,
    NestedLM,
    SkippingClassifier,
    StoppingLM,
    VisionTransformer,
)
from dyncomp.models.exiting import ExitingClassifier
from dyncomp.routers import TopP
from dyncomp.runtime import END, Segment, Segmented, from_model, greedy, whole

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(5, 4, 4, 1)).astype(np.float32)
TOKENS = RNG.integers(0, 13, (5, 3)).astype(np.int32)
DEPTHS, NEW = (1, 2), 2
SEED = 7

vision_block = functools.partial(
    Block,
    mixer=functools.partial(Attention, heads=2, rope_theta=None, causal=False),
    ffn=functools.partial(MLP, hidden=16),
    norm="layer",
)
mixer = functools.partial(Attention, heads=2)
block = functools.partial(Block, mixer=mixer, ffn=functools.partial(SwiGLU, hidden=12))
nested = functools.partial(
    NestedLM,
    backbone=functools.partial(DecoderLM, vocab_size=13, d_model=8, groups=[Group([block], 2)]),
    depths=DEPTHS,
)


def started(model, inputs, scale=3.0):
    """Drawn variables, large enough that outputs differ from example to example; nothing is compiled for them."""
    shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), inputs))
    rng = np.random.default_rng(1)
    drawn = lambda p: np.float32(scale * rng.normal(size=p.shape) / max(1, p.shape[-2:][0]) ** 0.5)
    # Thresholds and means start at 0, variances at 1.
    kept = lambda path, c: np.full(c.shape, path[-1].key == "var", np.float32)
    controls = jax.tree_util.tree_map_with_path(kept, shapes.get("controls", {}))
    return {"params": jax.tree.map(drawn, shapes["params"]), "controls": controls}


def exits_model(classes=3, layers="scan"):
    net = functools.partial(
        VisionTransformer, classes=classes, patch=2, d_model=8,
        groups=(Group((vision_block,), 2),), layers=layers,
    )  # fmt: skip
    return ExitingClassifier(net, functools.partial(ExitBank, gated=False), ConfidenceRule())


def exiting():
    model = exits_model(layers="unroll")
    made = from_model(model, started(model, IMAGES[:1], 1.0), IMAGES.shape)
    made.thresholds[:] = [0.545]
    return made, IMAGES


def skipping_model():
    levels = (GatedLevel(4, 1), GatedLevel(6, 2))
    return SkippingClassifier(classes=3, levels=levels, gate_hidden=4)


def staged_model(classes=3):
    levels = (ConvLevel(width=4), ConvLevel(width=6, stride=2))
    return ExitingConvNet(classes=classes, stem=4, levels=levels, exits_after=(0,))


@functools.cache
def skipping_variables():
    """With thresholds that some gates' logits pass and others do not."""
    found = started(skipping_model(), IMAGES[:1], 1.0)
    for level in (0, 1):
        found["params"][f"level_{level}_gates"]["bias"] *= 0
    return {**found, "controls": {"thresholds": np.float32([0.04, 0, 0.17, -0.18, 0])}}


def skipping():
    return from_model(skipping_model(), skipping_variables(), IMAGES.shape), IMAGES


def stopping_model():
    return StoppingLM(nested=functools.partial(nested, own_heads=True, norm_early=False))


@functools.cache
def language(kind):
    """(model, variables) with controls under which tokens leave at different exits."""
    model = nested() if kind == "nested" else stopping_model()
    found = started(model, TOKENS[:1])
    controls = dict(found["controls"], thresholds=jnp.asarray([0.5]))
    if kind == "stopping":
        controls |= {"tau_exit": jnp.float32(0.35), "tau_stop": jnp.float32(0.5)}
        drawn = np.random.default_rng(SEED).normal(size=(8, 3)) * 0.2
        found["params"]["controller"] = np.float32(drawn)
    return model, {**found, "controls": controls}


def decoding(kind, new):
    return greedy(*language(kind), TOKENS.shape[1], new), TOKENS


def mixture():
    """Experts decide for tokens inside a block, not for examples between blocks."""
    ffn = functools.partial(MoE, router=functools.partial(TopP, p=0.4), num_experts=4, hidden=8)
    own = functools.partial(Block, mixer=mixer, ffn=ffn)
    model = DecoderLM(vocab_size=13, d_model=8, groups=[Group([own], 2)])
    return whole(model, started(model, TOKENS[:1])), TOKENS


def switching():
    """A small model says the next token, or hands over to a large one where it is unsure (entropy)."""
    make = lambda depth: DecoderLM(
        vocab_size=13, d_model=8, groups=[Group([block], depth)], layers="scan"
    )
    models = {"small": make(1), "large": make(2)}

    def say(name):
        def run(variables, carry, threshold):
            logits = models[name].apply(variables, carry)[0][:, -1]
            unsure = entropy_bits(logits)
            return carry, logits, unsure > threshold, unsure

        return run

    params = {name: started(model, TOKENS[:1]) for name, model in models.items()}
    small = Segment(say("small"), params["small"], name="small", targets=(END, "large"))
    large = Segment(say("large"), params["large"], name="large")
    return Segmented(lambda _, tokens: tokens, None, [small, large], [1.7]), TOKENS


NETWORKS = {
    "exits": exiting,
    "skipped blocks": skipping,
    "nested decoder": lambda: decoding("nested", NEW),
    "stopping decoder": lambda: decoding("stopping", NEW),
    "two models": switching,
    "experts": mixture,
}
