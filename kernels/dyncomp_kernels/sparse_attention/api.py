"""The public operation: attention of every block of queries over the blocks of keys that its list names."""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax

from dyncomp_kernels.sparse_attention import mosaic_gpu, pallas_tpu, pallas_triton, xla
from dyncomp_kernels.sparse_attention.lists import BlockLists, blocks_of

Implementation = Literal["xla", "pallas", "mosaic_gpu", "triton"]
KERNELS = {
    "tpu": {"pallas": pallas_tpu},
    "cuda": {"mosaic_gpu": mosaic_gpu, "triton": pallas_triton},
}
"""The forms of each platform that has some of its own, the preferred one first."""


def sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    lists: BlockLists,
    *,
    causal: bool = True,
    offset: Array | int = 0,
    real: Array | None = None,
    window: int | None = None,
    sink: int = 0,
    implementation: Implementation | None = None,
) -> tuple[Array, Array]:
    """softmax(q k^T / sqrt(p)) v over listed keys; time and memory are proportional to the listed blocks.

    Head j reads key/value head ``j // (h / g)``. Softmax and sums are float32. Lists are run-time values: others of the
    same shape compile nothing. `lists.check_lists` refuses bad ones; here a block that is listed twice counts twice.

    Args:
      q: [b t h p], float32 or bfloat16.
      k, v: [b s g p], g a divisor of h.
      lists: for batch b or 1.
      causal: query i sees keys up to place ``offset`` + i.
      offset: int32 [], place of the first query among the keys; a run-time value.
      real: bool [b s], False for padding.
      window, sink: of what is listed, a query sees the ``window`` places up to its own, and the first ``sink`` keys
        (an A-shape); None for all.
      implementation: a form by name; None picks by platform when the program is lowered (see `explain`). "pallas" (TPU)
        and "triton" (CUDA) are interpreted on other platforms: right, and very slow. "mosaic_gpu" promises that what
        CUDA runs is a Hopper GPU; elsewhere than on CUDA the portable form serves it.

    Returns:
      [b t h p] in the dtype of q, and the log-sum-exp of the scores, float32 [b t h]; zeros and -inf for a query that
      sees nothing. Differentiable in q, k and v, through both outputs.

    Raises:
      ValueError: shapes do not fit, or the form cannot serve them; the message has the reason.
    """
    _check(q, k, v, lists, real)
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(
            f"sparse_attention: implementation={implementation!r}; use one of {get_args(Implementation)} or None"
        )
    if implementation and (reason := supports(implementation, q, k, lists)):
        raise ValueError(f"sparse_attention: {reason}")
    seeing = xla.Seeing(causal, window, sink)
    return _attend(q, k, v, lists, jnp.asarray(offset, jnp.int32), real, seeing, implementation)


def supports(implementation: str, q: Any, k: Any, lists: BlockLists) -> str | None:
    """None when the form can serve these shapes and dtypes, else the reason why not."""
    for forms in KERNELS.values():
        if implementation in forms:
            return forms[implementation].supports(q, k, lists)
    return None


def explain(q: Any, k: Any, lists: BlockLists) -> dict[str, str]:
    """Which form serves each platform for these arguments (arrays or ShapeDtypeStructs), or why it does not."""
    said = {"default": "xla serves"}
    for platform, forms in KERNELS.items():
        reasons = {name: _refuses(form, q, k, lists) for name, form in forms.items()}
        chosen = next((name for name, reason in reasons.items() if not reason), None)
        if chosen and not _on_one_device():
            chosen, reasons = None, {"": "kernels are not partitioned: call it inside a shard_map"}
        why = [reason for reason in reasons.values() if reason]
        said[platform] = "; ".join([f"{chosen or 'xla'} serves", *why])
    return said


def _refuses(form: Any, q: Any, k: Any, lists: BlockLists) -> str | None:
    """Why a form is not chosen for these arguments where no form is asked for; None where it may be."""
    if form is mosaic_gpu and not mosaic_gpu.on_hopper():
        return "mosaic_gpu takes Hopper GPUs"
    return form.supports(q, k, lists)


def _on_one_device() -> bool:
    """Whether what is traced runs on single devices: without a mesh, or inside a `shard_map` over all its axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1 or set(mesh.manual_axes) == set(mesh.axis_names)


def merged(parts: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """One result of several over disjoint keys: outputs [b t h p] weighed by their log-sum-exps [b t h]."""
    outs, sums = zip(*parts, strict=True)
    stacked = jnp.stack(sums)
    top = jnp.max(stacked, axis=0)
    shift = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.exp(stacked - shift)
    total = jnp.sum(weights, axis=0)
    some = jnp.where(total > 0, total, 1.0)
    mixed = sum(
        (w / some)[..., None] * out.astype(jnp.float32)
        for w, out in zip(weights, outs, strict=True)
    )
    lse = jnp.where(total > 0, shift + jnp.log(some), -jnp.inf)
    return jnp.asarray(mixed).astype(outs[0].dtype), lse


def _form(name: str, implementation: Implementation | None, like: Any, *args: Any) -> Any:
    """A pass ("forward" or "backward") by the form asked for or the platform's; ``like`` is (q, k, lists, seeing)."""
    seeing = like[3]
    call = lambda own, **words: functools.partial(getattr(own, name), seeing=seeing, **words)
    if implementation == "xla":
        return call(xla)(*args)
    if implementation == "mosaic_gpu":
        return lax.platform_dependent(*args, cuda=call(mosaic_gpu), default=call(xla))
    if implementation:
        platform = next(p for p, forms in KERNELS.items() if implementation in forms)
        form: Any = KERNELS[platform][implementation]
        interpreted = call(form, interpret=form.INTERPRETED)
        return lax.platform_dependent(*args, **{platform: call(form)}, default=interpreted)
    fit = {}
    for platform, forms in KERNELS.items():
        chosen = [form for form in forms.values() if not _refuses(form, *like[:3])]
        if chosen and _on_one_device():
            fit[platform] = call(chosen[0])
    return lax.platform_dependent(*args, **fit, default=call(xla))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attend(q, k, v, lists, offset, real, seeing, implementation):
    like = q, k, lists, seeing
    return _form("forward", implementation, like, q, k, v, lists, offset, real)


def _forward(q, k, v, lists, offset, real, seeing, implementation):
    out, lse = _attend(q, k, v, lists, offset, real, seeing, implementation)
    return (out, lse), ((q, k, v, out, lse), lists, offset, real)


def _backward(seeing, implementation, residuals, cotangents):
    (q, k, *_), lists, *_ = residuals
    like = q, k, lists, seeing
    return *_form("backward", implementation, like, *residuals, *cotangents), None, None, None


_attend.defvjp(_forward, _backward)


def _check(q: Array, k: Array, v: Array, lists: BlockLists, real: Array | None) -> None:
    (b, t, h, p), (own, s, g, width) = q.shape, k.shape
    if (own, width) != (b, p) or v.shape[:3] != k.shape[:3] or h % g:
        raise ValueError(
            f"sparse_attention: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; give [b t h p], [b s g p] and"
            " [b s g p] with g a divisor of h"
        )
    batch, a, x, _ = lists.index.shape
    if batch not in (1, b) or a not in (1, g, h) or x != blocks_of(t, lists.rows):
        raise ValueError(
            f"sparse_attention: lists {list(lists.index.shape)} in blocks of {lists.rows} queries; {t} queries of {h} "
            f"heads on {g} need [1 or {b}, 1, {g} or {h}, {blocks_of(t, lists.rows)}, m]"
        )
    if real is not None and real.shape != (b, s):
        raise ValueError(f"sparse_attention: real is {list(real.shape)}; give [{b}, {s}]")
