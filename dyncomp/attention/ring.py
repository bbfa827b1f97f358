"""Attention of sequences that lie split over devices: keys and values go round a ring (Liu et al. 2023, 2310.01889).

Every device keeps its queries and meets the keys of one device after another, renormalising the softmax from block to
block. Kept for the backward pass are what came in, what came out and two numbers a query: scores are made again, while
keys, values and their gradients go round once more. The whole keys of a sequence are on no device. Causal blocks that
no query sees are computed all the same: the device with the last positions needs every block, the others wait for it.
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

    And of a batch that the mesh does not split either: the one example from which parameters are made.

    Args:
      sight: without ``visible`` and ``anchored``, which are about slots by number.
    """
    if parts("batch", "seq") == 1 or q.shape[1] == 1 or q.shape[0] % parts("batch"):
        return attend(q, k, v, sight.all())
    axis = to_spec(("batch", "seq"))[1]
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
    blank, wide = (b, k.shape[2], h // k.shape[2], t), sum_dtype(q.dtype)
    zeros = vary_like(jnp.zeros((*blank, p), wide), q, k)
    state = Running(vary_like(jnp.full(blank, LOWEST, wide), q, k), zeros[..., 0], zeros)
    mix = functools.partial(jnp.einsum, "bgrts,bsgp->bgrtp", preferred_element_type=wide)

    def meet(state: Running, held: Any) -> Running:
        for k, v, keys in held:
            scores = scores_of(q, k, Sight(place, keys, None, causal, window).all())
            state = state.add(scores, lambda weights, v=v: mix(weights.astype(v.dtype), v))
        return state

    def turn(carry, _):
        state, held = carry
        coming = _passed(held, axis)  # on its way while these are met
        return (meet(state, held), coming), None

    start = (state, _halves((k, v, keys)))
    (state, held), _ = lax.scan(turn, start, length=lax.axis_size(axis) - 1)
    state = meet(state, held)
    mixed = state.mixed / state.total[..., None]
    out = jnp.moveaxis(mixed, 3, 1).reshape(q.shape).astype(q.dtype)
    return out, (q, k, v, place, keys, out, state.top, state.total)


def _backward(axis, causal, window, saved, cotangent):
    q, k, v, place, keys, out, top, total = saved
    b, t, h, p = q.shape
    g, wide = k.shape[2], sum_dtype(q.dtype)
    grouped = lambda x: x.reshape(b, t, g, h // g, p)
    product = functools.partial(jnp.einsum, preferred_element_type=wide)
    along = jnp.sum(out.astype(wide) * cotangent.astype(wide), axis=-1)  # [b t h]
    along = jnp.moveaxis(along.reshape(b, t, g, h // g), 1, 3)[..., None]
    own, told, scale = grouped(q), grouped(cotangent), wide.type(1.0 / math.sqrt(p))

    def gradients(k: Array, v: Array, keys: Array) -> tuple[Array, Array, Array]:
        seen = Sight(place, keys, None, causal, window).all()
        weights = jnp.exp(scores_of(q, k, seen) - top[..., None]) / total[..., None]
        slopes = weights * (product("btgrp,bsgp->bgrts", told, v) - along) * scale
        slopes = jnp.where(seen[:, None, None], slopes, 0).astype(k.dtype)
        dq, dk = product("bgrts,bsgp->btgrp", slopes, k), product("bgrts,btgrp->bsgp", slopes, own)
        return dq, dk, product("bgrts,btgrp->bsgp", weights.astype(v.dtype), told)

    def meet(dq: Array, sent: Any, held: Any) -> tuple[Array, Any]:
        found = []
        for given, (dk, dv) in zip(held, sent, strict=True):
            more, *fresh = gradients(*given)
            # Rounded on the way, as a sum over devices of the gathered form would be.
            both = zip((dk, dv), fresh, strict=True)
            found.append(tuple((x + y).astype(k.dtype) for x, y in both))
            dq = dq + more
        return dq, _passed(tuple(found), axis)

    def turn(carry, _):
        dq, sent, held = carry
        coming = _passed(held, axis)
        return (*meet(dq, sent, held), coming), None

    blank = lambda x, dtype: vary_like(jnp.zeros(x.shape, dtype), q, k)
    sent = _halves((blank(k, k.dtype), blank(v, v.dtype)))
    start = (blank(own, wide), sent, _halves((k, v, keys)))
    (dq, sent, held), _ = lax.scan(turn, start, length=lax.axis_size(axis) - 1)
    dq, sent = meet(dq, sent, held)
    dk, dv = (jnp.concatenate(x, axis=1) for x in zip(*sent, strict=True))
    return dq.reshape(q.shape).astype(q.dtype), dk, dv, None, None


_turns.defvjp(_forward, _backward)


def _halves(held: tuple[Array, ...]) -> tuple[tuple[Array, ...], ...]:
    """Arrays [b s ...] as what goes one way round and what goes the other: links send both ways at once."""
    half = held[0].shape[1] // 2
    first = tuple(x[:, :half] for x in held)
    rest = tuple(x[:, half:] for x in held)
    return (first, rest) if half else (rest,)


def _passed(held: Any, axis: Axis) -> Any:
    """From every device to the next, the second part to the one before."""
    n = lax.axis_size(axis)
    way = lambda by: [(i, (i + by) % n) for i in range(n)]
    return tuple(lax.ppermute(part, axis, way(by)) for part, by in zip(held, (1, -1), strict=False))
