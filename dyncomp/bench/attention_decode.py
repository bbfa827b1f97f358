"""Rows of `dyncomp bench attention` on a whole model: prefill under a pattern, decode under cache policies."""

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp import models, pretrained
from dyncomp.attention import FullCache, SinkWindow, TokenSelection, VerticalSlash
from dyncomp.attention.sight import Sight
from dyncomp.bench import fresh, generate_peer, timing
from dyncomp.decoding import FullDepth, Generator
from dyncomp.models import with_mixer
from dyncomp.tasks.long_text import draw

CONTEXT, BUDGET, GOAL, STEPS, PAIRS = 8192, 512, 0.7, 4, 20
LENGTHS = (1024, 2048, 4096, 8192)
PATTERN = {"vertical": 128, "slash": 256, "local": 100}
SIZES = {"sink": 16, "top": 368, "local": 128}
POLICIES: dict[str, Any] = {
    "selection": functools.partial(TokenSelection, **SIZES),
    "selection_kept": functools.partial(TokenSelection, **SIZES, reuse=0.9),
    "sink_window": functools.partial(SinkWindow, sink=4, window=BUDGET - 4),
}
REALISED = (
    "(seconds of a step with the full cache / seconds) / (bytes with the full cache / bytes); batch 1, {s} tokens, {n}"
    " read; bytes are weights, keys scored and keys and values read; {case}"
)
PREFILL = (
    "seconds of dense prefill / seconds with a vertical-slash pattern in every head, indices built; {s} tokens, of"
    " Python source where the weights are real"
)


def rows(quick: bool) -> list[dict[str, Any]]:
    """Prefill at several lengths, which says where patterns begin to pay, and decode."""
    lengths = (256,) if quick else LENGTHS
    found = [_prefill(length, quick) for length in lengths]
    cases = ("selection",) if quick else tuple(POLICIES)
    return found + [_decode(case, 256 if quick else CONTEXT, quick) for case in cases]


def stepper(cache: Any, context: int, quick: bool) -> tuple[Callable[[], None], Any, Any]:
    """A call that decodes `STEPS` tokens behind a prompt that nearly fills the cache."""
    model, variables = generate_peer.subject("float32", quick)
    generator = Generator(with_mixer(model, cache=cache), variables, FullDepth())
    length = max(context - STEPS * (PAIRS + 4) - 1, 1)
    tokens = generate_peer.prompt(model.vocab_size, 1, length)
    key, mask = jax.random.key(0), np.ones(tokens.shape, bool)
    state = [generator._prefill(generator.variables, tokens, mask, context, None, key)[0]]
    last: list[Any] = []

    def run() -> None:
        for _ in range(STEPS):
            state[0], *last[:] = generator._step(generator.variables, state[0], None, key)
        jax.block_until_ready(last[0])

    return run, generator, last


def decode(case: str, context: int, quick: bool) -> dict[str, Any]:
    """Pairs of seconds (ours: under a policy, peer: the full cache), and bytes of both."""
    run, generator, last = stepper(POLICIES[case], context, quick)
    full, _, _ = stepper(FullCache, context, quick)
    found = timing.interleaved(run, full, 2 if quick else PAIRS)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(generator.variables))
    cache = jax.eval_shape(
        lambda: with_mixer(generator.model, cache=FullCache).init_cache(1, context)
    )
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    token = whole / context  # keys and values of one token in all layers
    scored = read = 0.0
    for layer in _mixers(jax.device_get(last[1])):
        total = lambda name, layer=layer: float(np.sum(layer[name].needed))
        read += 16_384 * total("pair_blocks") + total("pairs")
        scored += total("scored") if "scored" in layer else 0.0
    depth = generator.model.depth
    bytes_ = weights + token * (read + scored / 2) / depth
    return {
        "pairs": vars(found),
        "bytes": bytes_,
        "bytes_peer": weights + whole,
        "read": read / depth,
    }


def _mixers(events: Any) -> list[dict[str, Any]]:
    """Events of every mixer in a tree of events."""
    if not isinstance(events, dict):
        return []
    if "pairs" in events:
        return [events]
    return [one for value in events.values() for one in _mixers(value)]


def _decode(case: str, context: int, quick: bool) -> dict[str, Any]:
    words = {"case": case, "context": context, "quick": quick}
    found = fresh.call(f"{__name__}:decode", words)
    pairs = timing.Pairs(**found["pairs"])
    least = found["bytes"] / found["bytes_peer"]
    ratio, interval = timing.median_interval([least / r for r in pairs.ratios()])
    ours, peer = pairs.seconds()
    return timing.row(
        f"attention/decode/{case}/{context}",
        ratio,
        interval,
        reference=REALISED.format(s=context, n=round(found["read"]), case=case),
        runs=len(pairs.ours),
        goal=None if quick else GOAL,
        relation="report" if quick else ">=",
        peer="full cache",
        median_ours=ours,
        median_peer=peer,
        speedup_bound=1 / least,
        speedup=peer / ours,
    )


def prefill(length: int, quick: bool, turns: int) -> dict[str, Any]:
    """Pairs of seconds of a whole prompt, and seconds of a layer's parts."""
    model, variables, tokens = text(length, quick)
    pattern = functools.partial(VerticalSlash, **PATTERN)
    forms = {"dense": model, "pattern": with_mixer(model, pattern=pattern)}
    calls = {}
    for name, form in forms.items():

        @jax.jit
        def call(variables, tokens, form=form):
            cache = form.init_cache(1, length)
            x, _ = form.apply(variables, tokens, cache=cache, method="hidden")
            return x[:, -1]

        calls[name] = lambda call=call: jax.block_until_ready(call(variables, tokens))
    pairs = timing.interleaved(calls["pattern"], calls["dense"], turns, warm_up=1)
    return {"pairs": vars(pairs), "parts": parts(length, model, variables, tokens)}


def text(length: int, quick: bool) -> tuple[Any, Any, Any]:
    """Model, variables and a prompt [1 t]: Python source for real weights, else random tokens."""
    path = pretrained.smollm2()
    if quick or path is None:
        model, variables = generate_peer.subject("float32", quick)
        return model, variables, jnp.asarray(generate_peer.prompt(model.vocab_size, 1, length))
    loaded = pretrained.load(path, layers="unroll")
    tokens = draw(loaded.tokenizer, "code", length, np.random.default_rng(0))
    return loaded.model, models.unstack(loaded.variables), jnp.asarray([tokens], jnp.int32)


def parts(length: int, model: Any, variables: Any, tokens: Any) -> dict[str, float]:
    """Of the middle layer: milliseconds of choosing indices and of all of the pattern, and the share of tiles read."""
    middle = model.depth // 2
    q, k, v = next(itertools.islice(models.read_heads(model, variables, tokens), middle, None))
    place = jnp.arange(length, dtype=jnp.int32)
    sight, pattern = Sight(place, place[None]), VerticalSlash(**PATTERN)
    steps = {
        "choose": jax.jit(lambda q, k, v: pattern.choose(q, k, sight)),
        "all": jax.jit(lambda q, k, v: pattern(q, k, v, sight)[0]),
    }
    found = {}
    for name, step in steps.items():
        jax.block_until_ready(step(q, k, v))
        begin = time.perf_counter()
        for _ in range(3):
            jax.block_until_ready(step(q, k, v))
        found[f"{name}_ms"] = 1e3 * (time.perf_counter() - begin) / 3
    tiles, blocks = steps["choose"](q, k, v).tiles(), -(-length // pattern.tile)
    found["tiles"] = float(np.mean(np.asarray(tiles)) / (blocks * (blocks + 1) / 2))
    return found


def _prefill(length: int, quick: bool) -> dict[str, Any]:
    words = {"length": length, "quick": quick, "turns": 2 if quick else 6}
    found = fresh.call(f"{__name__}:prefill", words)
    pairs = timing.Pairs(**found["pairs"])
    ratio, interval = timing.median_interval([1 / r for r in pairs.ratios()])
    ours, peer = pairs.seconds()
    return timing.row(
        f"attention/prefill/{length}", ratio, interval, reference=PREFILL.format(s=length),
        runs=len(pairs.ours), peer="dense", median_ours=ours, median_peer=peer, **found["parts"],
    )  # fmt: skip
