"""Attention of sequences that lie split over devices: keys and values go round a ring (Liu et al. 2023, 2310.01889).

Every device keeps its queries and meets the keys of one device after another, renormalising the softmax from block to
block. What is kept for the backward pass is what came in and one sum a query: scores are made again, while keys, values
and their gradients go round once more. The whole keys of a sequence are on no device.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dyncomp.attention.attend import attend, scores_of
from dyncomp.attention.sight import Sight
from dyncomp.core.sharding import local_op, parts, to_spec
from dyncomp.core.typing import Array, Float
from dyncomp_kernels._compat import vary_like
from dyncomp_kernels._widths import sum_dtype
from dyncomp_kernels.sparse_attention.running import LOWEST, Running

Axis = Any
"""Mesh axes that the rules give ``seq``: a name or a tuple."""


def ring_attention(
    q: Float[Array, "b t h p"], k: Float[Array, "b t g p"], v: Float[Array, "b t g p"], sight: Sight
) -> Float[Array, "b t h p"]:
    """`attend` of positions that the mesh splits over the axis of ``seq``; just that where it does not.

    Args:
      sight: without ``visible`` and ``anchored``, which are about slots by number.
    """
    if parts("seq") == 1 or q.shape[1] == 1:
        return attend(q, k, v, sight.all())
    axis = to_spec(("seq",))[0]
    if to_spec(("heads",)) != to_spec(("kv_heads",)):  # whole beside split heads: one for each
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
        shared = "heads"
    else:
        shared = "kv_heads"
    key_place = jnp.broadcast_to(sight.key_place, k.shape[:2])
    run = functools.partial(_turns, axis, sight.causal, sight.window)
    rows = ("batch", "seq", "heads", None)
    keys = ("batch", "seq", shared, None)
    names = (rows, keys, keys, ("seq",), ("batch", "seq"))
    return local_op(run, names, rows)(q, k, v, sight.place, key_place)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _turns(
    axis: Axis,
    causal: bool,
    window: int | None,
    q: Array,
    k: Array,
    v: Array,
    place: Array,
    keys: Array,
) -> Array:
    """On one device: its queries at ``place`` [t], keys that stand at ``keys`` [b s] and go round."""
    return _forward(axis, causal, window, q, k, v, place, keys)[0]


def _forward(axis, causal, window, q, k, v, place, keys):
    b, t, h, p = q.shape
    g, wide = k.shape[2], sum_dtype(q.dtype)
    blank = (b, g, h // g, t)
    zeros = vary_like(jnp.zeros((*blank, p), wide), q, k)
    state = Running(vary_like(jnp.full(blank, LOWEST, wide), q, k), zeros[..., 0], zeros)
    mix = functools.partial(jnp.einsum, "bgrts,bsgp->bgrtp", preferred_element_type=wide)

    def meet(state: Running, k: Array, v: Array, keys: Array) -> Running:
        scores = scores_of(q, k, Sight(place, keys, None, causal, window).all())
        return state.add(scores, lambda weights: mix(weights.astype(v.dtype), v))

    def turn(carry, _):
        state, held = carry
        coming = _passed(held, axis)  # on its way while these are met
        return (meet(state, *held), coming), None

    (state, held), _ = lax.scan(turn, (state, (k, v, keys)), length=_devices(axis) - 1)
    state = meet(state, *held)
    mixed = state.mixed / state.total[..., None]
    out = jnp.moveaxis(mixed, 3, 1).reshape(q.shape).astype(q.dtype)
    return out, (q, k, v, place, keys, out, state.top + jnp.log(state.total))


def _backward(axis, causal, window, saved, cotangent):
    q, k, v, place, keys, out, sums = saved
    b, t, h, p = q.shape
    g, wide = k.shape[2], sum_dtype(q.dtype)
    grouped = lambda x: x.reshape(b, t, g, h // g, p)
    product = functools.partial(jnp.einsum, preferred_element_type=wide)
    along = jnp.sum(out.astype(wide) * cotangent.astype(wide), axis=-1)  # [b t h]
    along = jnp.moveaxis(along.reshape(b, t, g, h // g), 1, 3)[..., None]
    own, told, scale = grouped(q), grouped(cotangent), wide.type(1.0 / math.sqrt(p))

    def turn(carry, _):
        dq, dk, dv, held = carry
        coming = _passed(held, axis)
        k, v, keys = held
        scores = scores_of(q, k, Sight(place, keys, None, causal, window).all())
        weights = jnp.exp(scores - sums[..., None])
        dv = dv + product("bgrts,btgrp->bsgp", weights.astype(v.dtype), told)
        slopes = weights * (product("btgrp,bsgp->bgrts", told, v) - along) * scale
        slopes = slopes.astype(k.dtype)
        dq = dq + product("bgrts,bsgp->btgrp", slopes, k)
        dk = dk + product("bgrts,btgrp->bsgp", slopes, own)
        return (dq, *_passed((dk, dv), axis), coming), None

    blank = lambda shape: vary_like(jnp.zeros(shape, wide), q, k)
    start = (blank(own.shape), blank(k.shape), blank(v.shape), (k, v, keys))
    (dq, dk, dv, _), _ = lax.scan(turn, start, length=_devices(axis))
    return dq.reshape(q.shape).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_turns.defvjp(_forward, _backward)


def _devices(axis: Axis) -> int:
    return lax.axis_size(axis)


def _passed(held: Any, axis: Axis) -> Any:
    """From every device to the next."""
    n = _devices(axis)
    return lax.ppermute(held, axis, [(i, (i + 1) % n) for i in range(n)])
