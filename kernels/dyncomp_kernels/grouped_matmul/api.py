"""Public function: picks a form when the program is lowered, and defines both gradients once."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from dyncomp_kernels.grouped_matmul import mosaic_gpu, pallas_tpu, ragged, reference, xla

Implementation = Literal["xla", "ragged", "pallas", "mosaic_gpu", "reference"]
PLATFORM = {"xla": "default", "pallas": "tpu"}


def supports(implementation: str, rows, weights, group_sizes) -> str | None:
    """None when the form can serve these shapes and dtypes, else the reason why not."""
    if rows.ndim != 2 or weights.ndim != 3 or group_sizes.ndim != 1:
        return f"needs rows [m k], weights [e k n], sizes [e]; got {rows.shape}, {weights.shape}, {group_sizes.shape}"
    if rows.shape[1] != weights.shape[1] or weights.shape[0] != group_sizes.shape[0]:
        return f"shapes disagree: {rows.shape}, {weights.shape}, {group_sizes.shape}"
    if rows.dtype != weights.dtype:
        return f"rows are {rows.dtype} but weights {weights.dtype}; cast one"
    if implementation == "mosaic_gpu":
        return mosaic_gpu.supports(rows, weights)
    if implementation not in ("ragged", "pallas"):
        return None
    reason = ragged_dtype(rows.dtype)
    return (
        pallas_tpu.supports(rows, weights) if implementation == "pallas" and not reason else reason
    )


def ragged_dtype(dtype) -> str | None:
    """None when the ragged form takes this dtype, else the reason why not."""
    known = jnp.dtype(dtype) in (jnp.float32, jnp.bfloat16)
    return None if known else f"ragged takes float32 or bfloat16, not {dtype}"


def explain(rows, weights, group_sizes) -> dict[str, str]:
    """Which form serves each platform for these arguments (arrays or ShapeDtypeStructs), or why it does not."""
    reason = supports("mosaic_gpu", rows, weights, group_sizes)  # a platform does not tell Hopper
    said = {
        "cuda": f"xla serves; {reason or 'mosaic_gpu fits, on Hopper, where asked for by name'}"
    }
    for name, platform in PLATFORM.items():
        said[platform] = supports(name, rows, weights, group_sizes) or f"{name} serves"
    if said["tpu"] != "pallas serves" and not supports("ragged", rows, weights, group_sizes):
        said["tpu"] += "; ragged serves, with the weight gradient of xla"
    return said


def grouped_matmul(
    rows: Array,
    weights: Array,
    group_sizes: Array,
    *,
    implementation: Implementation | None = None,
) -> Array:
    """Multiplies each row with its group's matrix.

    Args:
      rows: [m k], float32 or bfloat16, sorted so that groups are contiguous, group 0 first.
      weights: [e k n], same dtype.
      group_sizes: int32 [e], sum <= m; empty groups are fine.
      implementation: a form by name; None picks by platform when the program is lowered. "mosaic_gpu" promises that
        what CUDA runs is a Hopper GPU; elsewhere than on CUDA the portable form serves it.

    Returns:
      [m n] in the dtype of ``rows``, accumulated in `sum_dtype`. Rows past sum(group_sizes) are zero. Differentiable in
      ``rows`` and ``weights``.

    Raises:
      ValueError: the form cannot serve these arguments; the message has the reason.
    """
    for name in (implementation,) if implementation else ("xla",):
        reason = supports(name, rows, weights, group_sizes)
        if reason:
            raise ValueError(f"grouped_matmul ({name}): {reason}")
    if implementation == "reference":
        return reference.grouped_matmul(rows, weights, group_sizes)
    return _matmul(rows, weights, group_sizes.astype(jnp.int32), implementation)


def _on_tpu(rows, weights) -> dict:
    """The function that serves a TPU for each of the three products."""
    forms = {name: getattr(xla, name) for name in ("forward", "row_gradient", "weight_gradient")}
    if ragged_dtype(rows.dtype):
        return forms
    if pallas_tpu.supports(rows, weights):  # XLA compiles the weight gradient of ragged_dot densely
        return {**forms, "forward": ragged.forward, "row_gradient": ragged.row_gradient}
    return {name: getattr(pallas_tpu, name) for name in forms}


def _product(name: str, implementation: Implementation | None, like, *args: Array) -> Array:
    """One of the three products, by the form asked for or the platform's; ``like`` is (rows, weights)."""
    if implementation == "pallas" and name != "forward":
        kernel = getattr(pallas_tpu, name)
        return lax.platform_dependent(
            *args, tpu=kernel, default=functools.partial(kernel, interpret=True)
        )
    if implementation == "mosaic_gpu":
        portable = lambda *args: getattr(xla, name)(*args).astype(args[0].dtype)
        return lax.platform_dependent(*args, cuda=getattr(mosaic_gpu, name), default=portable)
    if implementation:
        return getattr({"xla": xla, "ragged": ragged, "pallas": pallas_tpu}[implementation], name)(
            *args
        )
    return lax.platform_dependent(*args, tpu=_on_tpu(*like)[name], default=getattr(xla, name))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul(rows, weights, group_sizes, implementation):
    return _product("forward", implementation, (rows, weights), rows, weights, group_sizes)


def _fwd(rows, weights, group_sizes, implementation):
    return _matmul(rows, weights, group_sizes, implementation), (rows, weights, group_sizes)


def _bwd(implementation, kept, cotangent):
    rows, weights, group_sizes = kept
    like = rows, weights
    d_rows = _product("row_gradient", implementation, like, cotangent, weights, group_sizes)
    d_weights = _product("weight_gradient", implementation, like, rows, cotangent, group_sizes)
    return d_rows, d_weights.astype(weights.dtype), None


_matmul.defvjp(_fwd, _bwd)
