"""Compares what was compiled with the ideal: a dense fallback computes as many times too much as there are groups."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp_kernels.grouped_matmul.api import Implementation, grouped_matmul
from dyncomp_kernels.grouped_matmul.cost import flops
from dyncomp_kernels.grouped_matmul.xla import executed_rows

LIMIT = 1.3


def flop_ratios(
    rows: Any,
    weights: Any,
    group_sizes: Any,
    *,
    implementation: Implementation | None = None,
    sharding: jax.sharding.Sharding | None = None,
    limit: float = LIMIT,
) -> dict[str, float]:
    """FLOPs of the compiled products as multiples of the ideal; warns above ``limit``.

    XLA counts a loop's body once, so the portable form, loops over blocks, is judged by the rows that it multiplies. A
    Pallas kernel counts what its author declares.

    Args:
      rows: [m k]; arrays or ShapeDtypeStructs.
      weights: [e k n].
      group_sizes: int32 [e], concrete, at least one row in all.
      implementation: a form by name, or None for the platform's.
      sharding: of one device to compile for, a described TPU too; None takes the default device.
      limit: above which a warning names the product.

    Returns:
      the ratios of "forward", "row_gradient" and "weight_gradient".
    """
    if implementation == "mosaic_gpu":
        raise ValueError("mosaic_gpu declares no FLOPs to XLA; compare times")
    device = min(sharding.device_set, key=lambda d: d.id) if sharding else jax.devices()[0]
    if implementation == "xla" or (implementation is None and device.platform != "tpu"):
        sizes = jnp.asarray(group_sizes)
        share = int(executed_rows(sizes, rows.shape[0])) / int(sizes.sum())
        found = dict.fromkeys(_products(implementation), share)
    else:
        shaped = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        args = shaped(rows), shaped(weights), shaped(np.asarray(group_sizes, np.int32))
        ideal = flops(rows.shape[0], *weights.shape[1:])
        found = {n: _counted(fn, *args) / ideal for n, fn in _products(implementation).items()}
    for name, ratio in found.items():
        if ratio > limit:
            where = f"grouped_matmul {name} on {device.platform}"
            warnings.warn(f"{where}: {ratio:.2f}x the ideal FLOPs", stacklevel=2)
    return found


def _products(implementation: Implementation | None) -> dict[str, Callable[..., Any]]:
    """The three products, each alone (the others are dead code)."""
    product = lambda r, w, s: grouped_matmul(r, w, s, implementation=implementation)

    def pulled(index: int) -> Callable[..., Any]:
        def gradient(r: Any, w: Any, s: Any) -> Any:
            out, pull = jax.vjp(lambda r, w: product(r, w, s), r, w)
            return pull(jnp.ones_like(out))[index]

        return gradient

    return {"forward": product, "row_gradient": pulled(0), "weight_gradient": pulled(1)}


def _counted(fn: Callable[..., Any], *args: Any) -> float:
    """FLOPs that XLA counts in the compiled function."""
    return float((jax.jit(fn).lower(*args).compile().cost_analysis() or {})["flops"])
