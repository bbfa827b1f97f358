"""The ledger against XLA's own count (`cost_analysis`), by the rule that fits each kind of program.

- *whole*: one straight-line program; XLA's count of all of it.
- *trips*: XLA counts the body of a loop once and one branch of a cond, whatever happens at run time. So trips are
  observed at run time and multiplied by XLA's count of the body compiled alone.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dyncomp import models
from dyncomp.attention import Attention
from dyncomp.bench import timing
from dyncomp.core import dispatch
from dyncomp.core.ledger import Ledger
from dyncomp.experts import MLP, MoE, SwiGLU
from dyncomp.experts.moe import Dispatch
from dyncomp.routers import TopK
from dyncomp_kernels.grouped_matmul.xla import trips

D, HIDDEN, EXPERTS, SLOTS = 256, 1024, 4, 2
DENSE_GOAL, DYNAMIC_GOAL = 0.02, 0.05
WHOLE = "whole: ledger executed / XLA's count of the whole unrolled program"


def rows(quick: bool) -> list[dict[str, Any]]:
    """One row a program; ``quick`` takes a shallow model for each rule."""
    if quick:
        return [_decode(1), _dropless(1), _cond()]
    depth = 4
    moe = [_moe("mask", depth), _moe("gather", depth), _moe("capacity", depth)]
    return [_dense_lm(depth), _decode(depth), _vit(depth), *moe, _dropless(depth), _cond()]


def xla_flops(fn: Callable[..., Any], *args: Any) -> float:
    """FLOPs that XLA counts in ``fn`` once compiled."""
    # JAX describes the arguments of a lowered function in their own tree; a flat list needs no cache of descriptions.
    leaves, tree = jax.tree.flatten(args)
    flat = jax.jit(lambda *leaves: fn(*tree.unflatten(leaves)))
    analysis = flat.lower(*leaves).compile().cost_analysis()
    return float((analysis or {})["flops"])


def row(
    name: str, ledger: Ledger, counted: float, goal: float, rule: str, **extra: Any
) -> dict[str, Any]:
    """A row in the common format; exact counts, so the interval is a point."""
    executed = ledger.total("executed")
    ratio = executed / counted
    return timing.row(
        f"ledger/{name}",
        ratio,
        (ratio, ratio),
        goal=goal,
        relation="abs(ratio - 1) <= goal",
        reference=rule,
        peer="XLA cost_analysis",
        median_ours=executed,
        median_peer=counted,
        needed=ledger.total("needed"),
        executed=executed,
        runs=1,
        rule=rule,
        **extra,
    )


def language_model(ffn: Any, depth: int) -> models.DecoderLM:
    """An unrolled model with a given ffn."""
    mixer = functools.partial(Attention, heads=4, kv_heads=2)
    block = functools.partial(models.Block, mixer=mixer, ffn=ffn)
    groups = [models.Group([block], depth)]
    return models.DecoderLM(vocab_size=256, d_model=D, groups=groups, layers="unroll")


def initialised(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Unboxed variables with separate layers."""
    return models.unstack(nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), inputs)))


def _whole(name: str, model: Any, inputs: Any, goal: float) -> dict[str, Any]:
    variables = initialised(model, inputs)
    run = lambda variables, inputs: model.apply(variables, inputs)
    _, aux = jax.jit(run)(variables, inputs)
    ledger = Ledger(model.cost(inputs.shape)).record(aux.events)
    return row(name, ledger, xla_flops(run, variables, inputs), goal, WHOLE)


def tokens(batch: int, length: int) -> jax.Array:
    """Random tokens."""
    return jax.random.randint(jax.random.key(1), (batch, length), 0, 256)


def _dense_lm(depth: int) -> dict[str, Any]:
    model = language_model(functools.partial(SwiGLU, hidden=HIDDEN), depth)
    return _whole("dense_lm", model, tokens(2, 128), DENSE_GOAL)


def _decode(depth: int) -> dict[str, Any]:
    """One token against a cache of 128 slots."""
    model = language_model(functools.partial(SwiGLU, hidden=HIDDEN), depth)
    prompt = tokens(2, 64)
    variables = initialised(model, prompt)
    run = lambda variables, inputs, cache: model.apply(variables, inputs, cache=cache)
    _, aux = jax.jit(run)(variables, prompt, model.init_cache(2, 128))
    one = prompt[:, :1]
    _, step = jax.jit(run)(variables, one, aux.cache)
    ledger = Ledger(model.cost(one.shape)).record(step.events)
    counted = xla_flops(run, variables, one, aux.cache)
    return row("dense_decode", ledger, counted, DYNAMIC_GOAL, WHOLE)


def _vit(depth: int) -> dict[str, Any]:
    mixer = functools.partial(Attention, heads=4, causal=False, rope_theta=None, bias=True)
    ffn = functools.partial(MLP, hidden=HIDDEN)
    block = functools.partial(models.Block, mixer=mixer, ffn=ffn, norm="layer")
    model = models.VisionTransformer(
        classes=10, patch=4, d_model=D, groups=[models.Group([block], depth)], layers="unroll"
    )
    images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    return _whole("dense_vit", model, images, DENSE_GOAL)


def mixture(name: Dispatch) -> Any:
    """Factory of a top-2 mixture under a dispatch."""
    router = functools.partial(TopK, k=SLOTS)
    return functools.partial(
        MoE, router=router, num_experts=EXPERTS, hidden=HIDDEN // 2, dispatch=name
    )


def _moe(name: Dispatch, depth: int) -> dict[str, Any]:
    length = 16 if name == "gather" else 128
    model = language_model(mixture(name), depth)
    return _whole(f"moe_{name}", model, tokens(2, length), DYNAMIC_GOAL)


def _dropless(depth: int) -> dict[str, Any]:
    """XLA's count of the model with every loop body once, plus the other trips of each loop."""
    model, inputs = language_model(mixture("dropless"), depth), tokens(2, 128)
    variables = initialised(model, inputs)
    run = lambda variables, inputs: model.apply(variables, inputs, capture=("plan",))
    _, aux = jax.jit(run)(variables, inputs)
    plans = aux.plans["group_0"]["block_0"]["ffn"]["route"]
    slots = inputs.size * SLOTS
    ran = [_trips(experts, slots) for experts in np.asarray(plans.experts)]
    three = lambda rows: 2 * _product(rows, D, HIDDEN // 2) + _product(rows, HIDDEN // 2, D)
    extra = sum((times - 1) * three(rows) for layer in ran for rows, times in layer)
    ledger = Ledger(model.cost(inputs.shape)).record(aux.events)
    rule = (
        "trips: ledger executed / (XLA's count of the program, each loop body once, + (observed trips - 1) x "
        "XLA's count of the body compiled alone)"
    )
    counted = xla_flops(run, variables, inputs) + extra
    return row("moe_dropless", ledger, counted, DYNAMIC_GOAL, rule, trips=ran)


def _trips(experts: np.ndarray, slots: int) -> list[tuple[int, int]]:
    """(rows a block, trips) of every loop for a layer's plan."""
    sizes = jnp.asarray(np.bincount(experts.ravel(), minlength=EXPERTS), jnp.int32)
    return [(rows, int(times)) for rows, times in trips(sizes, slots)]


def _product(block: int, inner: int, columns: int) -> float:
    return xla_flops(jnp.dot, jnp.ones((block, inner)), jnp.ones((inner, columns)))


def _cond() -> dict[str, Any]:
    """Eight batches, each of which takes the unit or skips it as a run-time flag says."""
    unit = SwiGLU(hidden=HIDDEN)
    x = jax.random.normal(jax.random.key(1), (8, 1, 64, D))
    flags = jax.random.bernoulli(jax.random.key(2), 0.5, (8,))
    params = nn.meta.unbox(unit.init(jax.random.key(0), x[0]))
    body = lambda x: unit.apply(params, x)[0]

    def step(trips: jax.Array, item: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        ran = lambda x: (body(x), jnp.int32(1))
        y, once = dispatch.cond(item[0], ran, lambda x: (x, jnp.int32(0)), item[1])
        return trips + once, y

    trips, _ = jax.jit(lambda f, x: jax.lax.scan(step, jnp.int32(0), (f, x)))(flags, x)
    _, aux = jax.jit(unit.apply)(params, x[0])
    ledger = Ledger(unit.cost(D))
    for taken in np.asarray(flags):
        ledger = ledger.record(aux.events) if taken else ledger
    rule = "trips: ledger executed / (trips counted inside the branch at run time x XLA's count of the branch alone)"
    counted = int(trips) * xla_flops(body, x[0])
    return row("cond", ledger, counted, DYNAMIC_GOAL, rule, trips=[int(trips)])
