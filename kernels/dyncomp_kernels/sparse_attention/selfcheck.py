"""This machine's form against the definition in float64: ``python -m dyncomp_kernels.sparse_attention.selfcheck``.

One line of JSON a form and problem: the worst error of output, log-sum-exp and the three gradients, each over the
largest number of its array, or why the form does not take the problem. Ends with an error where one exceeds its limit.
On a TPU and on CUDA the forms are the platform's own, elsewhere the portable one.
"""

import dataclasses
import functools
import itertools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dyncomp_kernels.sparse_attention.api import KERNELS, sparse_attention, supports
from dyncomp_kernels.sparse_attention.lists import BlockLists, blocks_of, lists_of
from dyncomp_kernels.sparse_attention.mosaic_gpu import on_hopper
from dyncomp_kernels.sparse_attention.reference import sparse_attention_reference

LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes as in `sparse_attention`; ``a`` of the lists, which list a ``density`` of the blocks."""

    t: int
    s: int
    h: int
    g: int
    p: int
    a: int
    rows: int
    columns: int
    dtype: str
    padded: bool = False
    density: float = 0.5
    causal: bool = True
    window: int | None = None

    def lists(self) -> BlockLists:
        """Random, with a full and an empty row."""
        x, y = blocks_of(self.t, self.rows), blocks_of(self.s, self.columns)
        table = np.random.default_rng(1).random((2, self.a, x, y)) < self.density
        table[:, :, 0] = True
        table[:, :, -1] = False
        return lists_of(jnp.asarray(table), self.rows, self.columns)


PROBLEMS = [
    Problem(512, 512, 4, 2, 128, 2, 128, 128, "bfloat16"),
    Problem(1000, 1100, 6, 2, 64, 6, 64, 64, "bfloat16", padded=True),
    Problem(1024, 2048, 4, 1, 128, 1, 512, 512, "bfloat16"),
    Problem(700, 900, 4, 4, 128, 1, 128, 256, "bfloat16", padded=True),
    Problem(700, 900, 8, 2, 128, 8, 128, 128, "bfloat16", padded=True, window=200),
    Problem(1000, 1100, 8, 2, 64, 1, 64, 128, "bfloat16", causal=False),
    Problem(1024, 1024, 16, 4, 128, 4, 128, 128, "bfloat16"),  # more tiles than multiprocessors
    Problem(700, 900, 4, 4, 128, 1, 128, 256, "float32", padded=True),
    Problem(512, 2048, 8, 2, 64, 2, 128, 64, "float32", density=0.1),
]


def errors(problem: Problem, implementation: Any = None) -> dict[str, float]:
    """Worst error of each result over the largest number of its array."""
    rng, lists = np.random.default_rng(0), problem.lists()
    draw = lambda length, heads: jnp.asarray(
        rng.normal(size=(2, length, heads, problem.p)), problem.dtype
    )
    q, d_out = draw(problem.t, problem.h), draw(problem.t, problem.h)
    k, v = draw(problem.s, problem.g), draw(problem.s, problem.g)
    d_lse = jnp.asarray(rng.normal(size=q.shape[:3]), jnp.float32)
    real = jnp.asarray(rng.random((2, problem.s)) < 0.7) if problem.padded else None
    words = {"offset": problem.s - problem.t, "real": real}
    rule = {"causal": problem.causal, "window": problem.window, "sink": 3}
    ours = functools.partial(sparse_attention, implementation=implementation)
    found = jax.jit(functools.partial(_all, ours, **words, **rule))(q, k, v, lists, d_out, d_lse)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        args = jax.tree.map(np.asarray, (q, k, v, lists, d_out, d_lse, real))
        wide = [jnp.asarray(x.astype(np.float64)) for x in (*args[:3], *args[4:6])]
        q, k, v, d_out, d_lse = wide
        words["real"] = None if real is None else jnp.asarray(args[6])
        want = _all(sparse_attention_reference, q, k, v, args[3], d_out, d_lse, **words, **rule)
    names = "out", "lse", "d_q", "d_k", "d_v"
    return {n: _worst(own, exact) for n, own, exact in zip(names, found, want, strict=True)}


def _all(
    attend: Any, q: Array, k: Array, v: Array, lists: Any, d_out: Array, d_lse: Array, **words: Any
) -> Any:
    """Output, log-sum-exp and gradients."""

    def loss(q: Array, k: Array, v: Array) -> Any:
        out, lse = attend(q, k, v, lists, **words)
        seen = jnp.where(jnp.isfinite(lse), lse, 0)
        return jnp.sum(out.astype(d_lse.dtype) * d_out) + jnp.sum(seen * d_lse), (out, lse)

    grads, (out, lse) = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return out, lse, *grads


def _worst(own: Any, exact: Any) -> float:
    own, exact = np.asarray(own, np.float64), np.asarray(exact, np.float64)
    finite = np.isfinite(exact)
    if (np.isfinite(own) != finite).any():
        return float("inf")
    return float(np.abs(own[finite] - exact[finite]).max() / max(np.abs(exact[finite]).max(), 1e-9))


def refusal(problem: Problem, form: str) -> str | None:
    """Why a form does not take a problem, or None."""
    like = jax.ShapeDtypeStruct((2, problem.t, problem.h, problem.p), problem.dtype)
    keys = jax.ShapeDtypeStruct((2, problem.s, problem.g, problem.p), problem.dtype)
    return supports(form, like, keys, problem.lists())


def main() -> int:
    """Every problem; 1 where one fails."""
    failed, device = 0, jax.devices()[0]
    platform = "cuda" if device.platform == "gpu" else device.platform
    forms = [*KERNELS.get(platform, ["xla"])]
    if platform == "cuda" and not on_hopper():
        forms.remove("mosaic_gpu")
    for form, problem in itertools.product(forms, PROBLEMS):
        reason = refusal(problem, form)
        found: dict[str, Any] = {"refused": reason} if reason else errors(problem, form)
        failed |= not reason and max(found.values()) > LIMITS[problem.dtype]
        line = {"device": device.device_kind, "form": form, **dataclasses.asdict(problem)}
        print(json.dumps({**line, **found}), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
