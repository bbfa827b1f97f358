"""The public operation: experts of the SwiGLU kind on sorted rows, and how a form is chosen."""

import jax
from jax import Array, lax

from dyncomp_kernels.grouped_matmul.api import grouped_matmul
from dyncomp_kernels.grouped_swiglu import xla
from dyncomp_kernels.grouped_swiglu.xla import Weights


def grouped_swiglu(
    rows: Array, gate: Array, up: Array, down: Array, group_sizes: Array, *, fused: bool = True
) -> Array:
    """Each row through its group's W_down(silu(W_gate x) * W_up x).

    Args:
      rows: [m d], float32 or bfloat16, sorted so that groups are contiguous, group 0 first.
      gate, up: [e d f], same dtype.
      down: [e f d].
      group_sizes: int32 [e], sum <= m; empty groups are fine.
      fused: run the portable form, one loop over blocks of rows, wherever the platform is not a TPU; else three
        grouped products everywhere, as a TPU gets them.

    Returns:
      [m d] in the dtype of ``rows``; rows past sum(group_sizes) are zero. Differentiable in rows and weights.

    Raises:
      ValueError: shapes or dtypes do not fit.
    """
    _check(rows, gate, up, down, group_sizes)
    if not fused:
        return composed(rows, gate, up, down, group_sizes)
    fns = {"tpu": composed, "default": _fused}
    return lax.platform_dependent(rows, gate, up, down, group_sizes, **fns)


def composed(rows: Array, gate: Array, up: Array, down: Array, group_sizes: Array) -> Array:
    """Three grouped products and the activation between them."""
    hidden = jax.nn.silu(grouped_matmul(rows, gate, group_sizes))
    hidden = hidden * grouped_matmul(rows, up, group_sizes)
    return grouped_matmul(hidden, down, group_sizes)


def _check(rows, gate, up, down, group_sizes) -> None:
    (m, d), (e, _, f) = rows.shape, gate.shape
    wanted = {"gate": (e, d, f), "up": (e, d, f), "down": (e, f, d)}
    for name, weights in (("gate", gate), ("up", up), ("down", down)):
        if weights.shape != wanted[name] or weights.dtype != rows.dtype:
            raise ValueError(
                f"grouped_swiglu: {name} is {weights.dtype}{list(weights.shape)}; with rows {rows.dtype}[{m}, {d}] it"
                f" must be {rows.dtype}{list(wanted[name])}"
            )
    if group_sizes.shape != (e,):
        raise ValueError(f"grouped_swiglu: group_sizes is {group_sizes.shape}, not ({e},)")


@jax.custom_vjp
def _fused(rows, gate, up, down, group_sizes):
    return xla.forward(rows, Weights(gate, up, down), group_sizes)


def _forward(rows, gate, up, down, group_sizes):
    weights = Weights(gate, up, down)
    out, *kept = xla.forward_and_kept(rows, weights, group_sizes)
    return out, (rows, weights, group_sizes, tuple(kept))


def _backward(residuals, cotangent):
    rows, weights, group_sizes, kept = residuals
    d_rows, d_weights = xla.backward(rows, weights, group_sizes, kept, cotangent)
    return d_rows, *(d.astype(w.dtype) for d, w in zip(d_weights, weights, strict=True)), None


_fused.defvjp(_forward, _backward)
