"""`dyncomp bench generate`: decoding against transformers and the memory's speed, and what skipping layers saves.

The model is SmolLM2-135M where ``DYNCOMP_SMOLLM2`` names its file, else random weights of its shape. Seconds are
wall-clock on all cores, both sides with as many threads. A step reads every weight and the cache once: the roofline is
those bytes over the rate at which a large float32 matrix-vector product reads its matrix. Against transformers (peer
extra, real weights only) both continue the same prompt greedily; its loop calls the model with a `DynamicCache`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp.bench import fresh, generate_peer, generate_switch, timing
from dyncomp.core.ledger import Ledger
from dyncomp.decoding import ExitEarly, FullDepth, Generator, KeepLayers
from dyncomp.depth import evenly

CASES = ((1, 512), (1, 4096), (8, 512), (8, 4096))
"""Batch and context."""
STEPS, PAIRS = generate_peer.STEPS, generate_peer.PAIRS
PEER_GOALS = {"float32": 3.0, "bfloat16": 1.5}
PREFILLS, PREFILL_GOAL, PREFILL_PAIRS = (512, 2048), 1.15, 12
ROOFLINE = 0.6
SAVINGS = {"skip_2x": 0.9, "exit_half": 0.8, "exit_mixed": 0.8}
DECODE = "seconds of transformers / ours, a greedily decoded token; {dtype}, batch {b}, {s} tokens of context"
BOUND = "(bytes of weights and cache / measured bandwidth) / seconds of a step; {dtype}, batch {b}, {s} tokens"
PREFILL = "seconds of transformers / ours, a prompt of {s} tokens; float32"
REALISED = "(seconds full depth / seconds) / (FLOPs full depth / FLOPs needed), decode, batch 1, 512 tokens; {case}"


def rows(quick: bool) -> list[dict[str, Any]]:
    """Rows of the roofline and of what is saved; with the peers, of decode and prefill against transformers."""
    if quick:
        return [
            _bound("float32", 1, 32, quick),
            _saved("exit_mixed", quick),
            generate_switch.row(quick),
        ]
    found = [_bound("float32", b, s, quick) for b, s in CASES]
    found += [_bound("bfloat16", *CASES[0], quick)]
    found += [*(_saved(case, quick) for case in SAVINGS), generate_switch.row(quick)]
    if not generate_peer.available():
        return found
    found += [_against("float32", b, s) for b, s in CASES] + [_against("bfloat16", *CASES[0])]
    return found + [_prefill(s) for s in PREFILLS]


def _bound(dtype: str, batch: int, context: int, quick: bool) -> dict[str, Any]:
    words = {"dtype": dtype, "batch": batch, "context": context, "quick": quick}
    found = fresh.call(f"{__name__}:bound", words)
    pairs = timing.Pairs(**found["pairs"])
    floors = [found["bytes"] / found["peer_bytes"] / ratio for ratio in pairs.ratios()]
    ratio, interval = timing.median_interval(floors)
    ours, peer = pairs.seconds()
    asked = dtype == "float32" and not quick
    return timing.row(
        f"generate/roofline/{dtype}/{batch}/{context}",
        ratio,
        interval,
        reference=BOUND.format(dtype=dtype, b=batch, s=context),
        runs=len(floors),
        goal=ROOFLINE if asked else None,
        relation=">=" if asked else "report",
        peer="matrix-vector product",
        median_ours=ours,
        median_peer=peer,
        gigabytes_a_second=found["peer_bytes"] / peer / 1e9,
        tokens_a_second=batch / ours,
    )


def bound(dtype: str, batch: int, context: int, quick: bool) -> dict[str, Any]:
    """Pairs of seconds (ours: a decode step, peer: a large matrix-vector product) and the bytes that each reads."""
    step, generator, _ = stepper(FullDepth(), batch, context, dtype, quick)
    matrix = jnp.ones((2048, 2048 if quick else 65_536), jnp.float32)
    product, x = jax.jit(jnp.matmul), jnp.ones((1, 2048), jnp.float32)
    pairs = timing.interleaved(
        step, lambda: jax.block_until_ready(product(x, matrix)), 3 if quick else PAIRS
    )
    pairs.ours = [seconds / STEPS for seconds in pairs.ours]
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(generator.variables))
    cache = jax.eval_shape(lambda: generator.model.init_cache(batch, context))
    moved = weights + sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    return {"pairs": vars(pairs), "bytes": moved, "peer_bytes": matrix.nbytes}


def stepper(
    policy: Any, batch: int, context: int, dtype: str, quick: bool, controls: Any = None
) -> tuple[Callable[[], None], Generator, Callable[[], dict[str, float]]]:
    """A call that decodes `STEPS` tokens and waits, its generator, and a call for the mean FLOPs of all steps so far.

    The cache has ``context`` slots; the prompt is so long that all calls of a measurement fit.
    """
    model, variables = generate_peer.subject(dtype, quick)
    generator = Generator(model, variables, policy)
    tokens = generate_peer.prompt(model.vocab_size, batch, generate_peer.prompt_length(context))
    controls = policy.controls() if controls is None else controls
    key, mask = jax.random.key(0), np.ones(tokens.shape, bool)
    given = generator.variables, tokens, mask, context, controls, key
    state = [generator._prefill(*given)[0]]
    counted: list[Any] = []

    def run() -> None:
        for _ in range(STEPS):
            given = generator.variables, state[0], controls, key
            state[0], told, events = generator._step(*given)
            counted.append(events)
        jax.block_until_ready(told)

    def spent() -> dict[str, float]:
        ledger = Ledger(generator.costs())
        for events in jax.device_get(counted):
            ledger.record(events)
        return {name: ledger.total(name) / len(counted) for name in ("needed", "executed")}

    return run, generator, spent


def _saved(case: str, quick: bool) -> dict[str, Any]:
    found = fresh.call(f"{__name__}:saved", {"case": case, "quick": quick})
    pairs = timing.Pairs(**found["pairs"])
    share = found["needed"] / found["needed_peer"]
    ratio, interval = timing.median_interval([share / r for r in pairs.ratios()])
    ours, peer = pairs.seconds()
    return timing.row(
        f"generate/{case}",
        ratio,
        interval,
        reference=REALISED.format(case=case),
        runs=len(pairs.ours),
        goal=None if quick else SAVINGS[case],
        relation="report" if quick else ">=",
        peer="full depth",
        median_ours=ours,
        median_peer=peer,
        needed=found["needed"],
        executed=found["executed"],
        needed_peer=found["needed_peer"],
    )


def saved(case: str, quick: bool) -> dict[str, Any]:
    """Pairs of seconds of some steps: with a policy that skips, and at full depth."""
    batch, context = 1, 32 if quick else 512
    model, _ = generate_peer.subject("float32", quick)
    half = (model.depth // 2,)
    policies: dict[str, Any] = {
        "skip_2x": (KeepLayers(evenly(model.depth, 2)), None),
        "exit_half": (ExitEarly(half), jnp.zeros(1)),  # everyone leaves
    }
    policy, controls = mixed(quick) if case == "exit_mixed" else policies[case]
    ours, _, spent = stepper(policy, batch, context, "float32", quick, controls)
    peer, _, whole = stepper(FullDepth(), batch, context, "float32", quick)
    pairs = timing.interleaved(ours, peer, 3 if quick else PAIRS)
    return {"pairs": vars(pairs), **spent(), "needed_peer": whole()["needed"]}


def mixed(quick: bool) -> tuple[ExitEarly, Any]:
    """Exits after one and two thirds of the blocks, and thresholds with which half of those that get there leave."""
    model, variables = generate_peer.subject("float32", quick)
    policy = ExitEarly((model.depth // 3, 2 * model.depth // 3))
    generator, found = Generator(model, variables, policy), np.full(2, 2.0, np.float32)
    prompt = generate_peer.prompt(
        model.vocab_size, 1, generate_peer.prompt_length(32 if quick else 512)
    )
    for place, depth in enumerate(policy.exits):
        low, high = 1e-6, 1.0
        for _ in range(2 if quick else 12):
            found[place] = np.sqrt(low * high)
            (one,) = generator.generate(prompt.tolist(), 4 if quick else 48, controls=found)
            depths = np.asarray(one.depths[1:])
            many = np.sum(depths == depth) > np.sum(depths >= depth) / 2
            low, high = (found[place], high) if many else (low, found[place])
    return policy, found


def _against(dtype: str, batch: int, context: int) -> dict[str, Any]:
    words = {"dtype": dtype, "batch": batch, "context": context}
    pairs = timing.Pairs(**fresh.call(f"{__name__}:against", words))
    return _faster(
        f"generate/transformers/{dtype}/{batch}/{context}",
        pairs,
        DECODE.format(dtype=dtype, b=batch, s=context),
        PEER_GOALS[dtype],
    )


def against(dtype: str, batch: int, context: int) -> dict[str, Any]:
    """Pairs of seconds of some decode steps: ours, and transformers'."""
    ours, *_ = stepper(FullDepth(), batch, context, dtype, quick=False)
    theirs = generate_peer.decoder(dtype, batch, context, STEPS)
    return vars(timing.interleaved(ours, theirs, PAIRS))


def _prefill(length: int) -> dict[str, Any]:
    pairs = timing.Pairs(**fresh.call(f"{__name__}:prefill", {"length": length}))
    name = f"generate/transformers/prefill/{length}"
    return _faster(name, pairs, PREFILL.format(s=length), PREFILL_GOAL)


def prefill(length: int) -> dict[str, Any]:
    """Pairs of seconds for a whole prompt and its first token: ours, and transformers'."""
    model, variables = generate_peer.subject("float32", quick=False)
    generator = Generator(model, variables)
    tokens = generate_peer.prompt(model.vocab_size, 1, length)
    given = generator.variables, tokens, np.ones(tokens.shape, bool), length + 64, None
    ours = lambda: jax.block_until_ready(generator._prefill(*given, jax.random.key(0))[1])
    return vars(timing.interleaved(ours, generate_peer.prefiller(length), PREFILL_PAIRS))


def _faster(name: str, pairs: timing.Pairs, reference: str, goal: float) -> dict[str, Any]:
    """A row of how many times as fast we are."""
    ratio, interval = timing.median_interval([1 / r for r in pairs.ratios()])
    ours, peer = pairs.seconds()
    both = {"median_ours": ours, "median_peer": peer, "peer": "transformers"}
    return timing.row(
        name,
        ratio,
        interval,
        reference=reference,
        runs=len(pairs.ours),
        goal=goal,
        relation=">=",
        **both,
    )
