"""Every kernel on one NVIDIA GPU against float64: ``python docs/bench/checks_gpu.py [--json FILE] [--numbers ...]``.

A row is a form, its numbers and how float32 products are made: TF32 is what JAX chooses on a GPU unless told
otherwise. An error is relative to the largest number of its array, the worst over all problems, of values and, where
there are any, gradients. Needs jax for CUDA and flax; runs on a CPU too, without what only a GPU has. Ends with an
error where a row exceeds its limit.
"""

import argparse
import functools
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from gpus import by_hand  # noqa: E402

from dyncomp.attention.fused import fused_attention  # noqa: E402
from dyncomp.experts import HopperSwiGLUBank  # noqa: E402
from dyncomp_kernels.decode_attention.api import decode_attention  # noqa: E402
from dyncomp_kernels.decode_attention.packed import packed_attention  # noqa: E402
from dyncomp_kernels.decode_attention.packing import Packed, pack  # noqa: E402
from dyncomp_kernels.decode_attention.reference import (  # noqa: E402
    decode_attention_reference,
    packed_attention_reference,
)
from dyncomp_kernels.dense_matmul.api import dense_matmul  # noqa: E402
from dyncomp_kernels.grouped_matmul.api import grouped_matmul  # noqa: E402
from dyncomp_kernels.grouped_matmul.cases import LANES, LARGE, Case, dirichlet4  # noqa: E402
from dyncomp_kernels.grouped_swiglu.api import grouped_swiglu  # noqa: E402
from dyncomp_kernels.sparse_attention import selfcheck  # noqa: E402

LIMITS = {"bfloat16": 2e-2, "float32": 2e-5, "float32 as TF32": 4e-3}
GPU = jax.default_backend() == "gpu"
Problem = tuple[tuple[Any, ...], tuple[Any, ...]]
"""What is differentiated, and the other arguments."""


def cases(many: bool) -> list[Case]:
    """Shared loads, and random ones with empty groups and unused rows; few shapes, since each is compiled."""
    rng, shapes = np.random.default_rng(0), ((256, 512), (128, 256), (256, 384))
    found = [LANES[1], *LARGE]
    if many:
        found += [*LANES, Case("wide", 8192, 1024, 768, dirichlet4(8100, 16)),
                  Case("many", 20_000, 512, 1024, dirichlet4(19_000, 64))]  # fmt: skip
    for i in range(30 if many else 4):
        sizes = tuple(map(int, rng.integers(0, 128, 16) * (rng.random(16) < 0.7)))
        found.append(Case(f"random {i}", 2048, *shapes[i % 3 if many else 0], sizes))
    return found


def grouped(implementation: Any, dtype: str) -> list[float]:
    """Errors of value and gradients of each case; what lies past the last group is not a number."""
    product = functools.partial(grouped_matmul, implementation=implementation)
    both = pulled(lambda x, w, s: product(x, w, s))
    found = []
    for i, case in enumerate(cases(bool(implementation))):
        used = slice(sum(case.sizes), None)
        x, dy = _draw(i, dtype, case.m, case.k), _draw(i + 99, dtype, case.m, case.n)
        w = _draw(-i, dtype, len(case.sizes), case.k, case.n)
        sizes = jnp.asarray(case.sizes, jnp.int32)
        ours = both((x.at[used].set(jnp.nan), w), sizes, dy.at[used].set(jnp.nan))
        y, dx, dw = by_hand(_wide(x), _wide(w), case.sizes, _wide(dy))
        found.append(max(map(apart, ours, (y, dx, dw))))
    return found


def pulled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Value and gradients of ``fn`` of some arrays and sizes."""

    @jax.jit
    def both(arrays: Any, sizes: Any, cotangent: Any) -> Any:
        out, pull = jax.vjp(lambda *a: fn(*a, sizes), *arrays)
        return out, *pull(cotangent)

    return both


def swiglu(bank: Callable[..., Any], dtype: str) -> list[float]:
    """Errors of value and gradients of SwiGLU experts."""
    found, both = [], pulled(bank)
    for i, case in enumerate((LANES[1], LARGE[1], LARGE[3])):
        e, d, f = len(case.sizes), case.k, case.n
        x, dy = _draw(i, dtype, case.m, d), _draw(i + 9, dtype, case.m, d)
        ws = [
            _draw(j + 19, dtype, e, *s, by=d**-0.5) for j, s in enumerate(((d, f), (d, f), (f, d)))
        ]
        ours = both((x, *ws), jnp.asarray(case.sizes, jnp.int32), dy)
        found.append(
            max(map(apart, ours, swiglu_by_hand(_wide(x), *map(_wide, ws), case.sizes, _wide(dy))))
        )
    return found


def swiglu_by_hand(x: Any, gate: Any, up: Any, down: Any, sizes: tuple[int, ...], dy: Any) -> Any:
    """Value and gradients, by the chain rule."""
    nothing = np.zeros((x.shape[0], gate.shape[2]))
    g, u = (by_hand(x, w, sizes, nothing)[0] for w in (gate, up))
    s = 1 / (1 + np.exp(-g))
    y, da, d_down = by_hand(g * s * u, down, sizes, dy)
    _, dx, d_gate = by_hand(x, gate, sizes, da * u * s * (1 + g * (1 - s)))
    _, more, d_up = by_hand(x, up, sizes, da * g * s)
    return y, dx + more, d_gate, d_up, d_down


def _wide(x: Any) -> Any:
    return np.asarray(x, np.float64)


def dense(dtype: str) -> list[Problem]:
    """Rows and weights, one and many rows."""
    shapes = ((1, 512, 384), (2, 4096, 1024), (300, 1000, 257), (2048, 4096, 512))
    return [((_draw(m, dtype, m, k), _draw(n, dtype, k, n)), ()) for m, k, n in shapes]


def heads(dtype: str) -> list[Problem]:
    """Queries, keys, values; causal or not."""
    found = []
    for i, (b, t, h, g, p, causal) in enumerate(
        ((2, 300, 8, 2, 64, True), (1, 1024, 4, 4, 128, True), (2, 128, 6, 1, 32, False))
    ):
        shapes = (b, t, h, p), (b, t, g, p), (b, t, g, p)
        found.append((tuple(_draw(9 * i + j, dtype, *s) for j, s in enumerate(shapes)), (causal,)))
    return found


def exact_heads(q: Any, k: Any, v: Any, causal: bool) -> Any:
    """softmax(q k^T / sqrt(p)) v, head by head."""
    wide = lambda x: jnp.repeat(x, q.shape[2] // k.shape[2], axis=2)
    scores = jnp.einsum("bthp,bshp->bhts", q, wide(k)) / q.shape[-1] ** 0.5
    if causal:
        scores = jnp.where(jnp.tri(q.shape[1], dtype=bool), scores, -jnp.inf)
    return jnp.einsum("bhts,bshp->bthp", jax.nn.softmax(scores), wide(v))


def listed(dtype: str) -> list[Problem]:
    """Queries, keys, values; slots and which count."""
    rng, found = np.random.default_rng(1), []
    for i, (b, h, g, p, s, m, a) in enumerate(
        ((2, 8, 2, 64, 700, 64, 1), (3, 4, 4, 128, 512, 100, 4))
    ):
        shapes = (b, h, p), (b, s, g, p), (b, s, g, p)
        index = [[rng.choice(s, m, replace=False) for _ in range(a)] for _ in range(b)]
        seen = rng.random((b, a, m)) < 0.6
        seen[0] = False
        floats = tuple(_draw(5 * i + j, dtype, *shape) for j, shape in enumerate(shapes))
        found.append((floats, (jnp.asarray(index, jnp.int32), jnp.asarray(seen))))
    return found


def packed(dtype: str) -> list[Problem]:
    """Queries; keys and values of 2, 4 and 8 bits and of none, and what is seen."""
    rng, found = np.random.default_rng(2), []
    b, g, h, m, p = 2, 2, 8, 600, 64
    one, draw = jnp.ones((1, 1, 1, 1)), lambda *s: jnp.asarray(rng.random(s), jnp.float32)
    for bits in (2, 4, 8):
        codes = lambda n=bits: pack(jnp.asarray(rng.integers(0, 2**n, (b, g, m, p)), jnp.uint8), n)
        keys = Packed(codes(), draw(b, g, 1, p) - 0.7, draw(b, g, 1, p) / 2**bits, one, bits)
        low, step = draw(b, 1, m, 1) - 0.5, draw(b, 1, m, 1) / 2**bits
        values = Packed(codes(), low, step, 1 + draw(b, g, 1, p), bits)
        found.append(((_draw(bits, dtype, b, 3, h, p),), (keys, values, draw(b, m) < 0.7)))
    return found


def _draw(seed: int, dtype: str, *shape: int, by: float = 1.0) -> Any:
    rng = np.random.default_rng(abs(2 * seed + (seed < 0)))
    return jnp.asarray(by * rng.normal(size=shape), dtype)


def worst(
    ours: Callable[..., Any], exact: Callable[..., Any], problem: Problem, gradients: bool
) -> float:
    """Largest error of the values, and of the gradients for a random cotangent."""
    floats, others = problem
    fn = lambda *x: ours(*x, *others)
    shapes = jax.tree.leaves(jax.eval_shape(fn, *floats))
    given = [np.random.default_rng(3).normal(size=s.shape) for s in shapes]

    def both(fn: Callable[..., Any], *args: Any) -> list[Any]:
        out, pull = jax.vjp(lambda *x: jax.tree.leaves(fn(*x)), *args)
        back = [jnp.asarray(g, o.dtype) for g, o in zip(given, out, strict=True)]
        return [*out, *(pull(back) if gradients else ())]

    found = jax.jit(functools.partial(both, fn))(*floats)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = lambda x: jnp.asarray(np.asarray(x, np.float64)) if _floats(x) else _plain(x)
        args = [jnp.nan_to_num(wide(x)) for x in floats]
        rest = jax.tree.map(wide, others)
        wanted = both(lambda *x: exact(*x, *rest), *args)
    return max(apart(a, b) for a, b in zip(found, wanted, strict=True))


def _floats(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def _plain(x: Any) -> Any:
    return jnp.asarray(np.asarray(x)) if hasattr(x, "dtype") else x


def apart(ours: Any, exact: Any) -> float:
    """Largest difference over the largest number; what is infinite must be so in both."""
    ours, exact = np.asarray(ours, np.float64), np.asarray(exact, np.float64)
    finite = np.isfinite(exact)
    if not np.array_equal(finite, np.isfinite(ours)):
        return float("inf")
    scale = max(np.abs(exact[finite]).max(initial=0.0), 1e-9)
    return float(np.abs(ours[finite] - exact[finite]).max(initial=0.0) / scale)


def compared(ours: Callable[..., Any], exact: Callable[..., Any], make: Callable[[str], list[Problem]],
             gradients: bool = True) -> Callable[[str], list[float]]:  # fmt: skip
    """Errors of each problem that ``make`` makes of a dtype."""
    return lambda dtype: [worst(ours, exact, problem, gradients) for problem in make(dtype)]


def sparse(dtype: str) -> list[float]:
    """`selfcheck` of sparse attention: its kernels on a GPU in bfloat16, else the portable form."""
    forms = ("mosaic_gpu", "triton") if GPU and dtype == "bfloat16" else ("xla",)
    problems = [one for one in selfcheck.PROBLEMS if one.dtype == dtype]
    return [
        max(selfcheck.errors(one, form).values())
        for form, one in itertools.product(forms, problems)
        if not selfcheck.refusal(one, form)
    ]


FORMS: dict[str, Callable[[str], list[float]]] = {
    "grouped_matmul, Hopper": functools.partial(grouped, "mosaic_gpu"),
    "grouped_matmul, portable": functools.partial(grouped, None),
    "SwiGLU experts, Hopper": functools.partial(
        swiglu, lambda x, *r: HopperSwiGLUBank(*r[:3]).grouped(x, r[3])
    ),
    "grouped_swiglu, portable": functools.partial(swiglu, grouped_swiglu),
    "dense_matmul": compared(dense_matmul, jnp.matmul, dense),
    "attention by cuDNN": compared(fused_attention, exact_heads, heads),
    "sparse_attention": sparse,
    "decode_attention": compared(decode_attention, decode_attention_reference, listed, False),
    "packed_attention": compared(packed_attention, packed_attention_reference, packed, False),
}
HALF_ONLY = ("grouped_matmul, Hopper", "SwiGLU experts, Hopper", "attention by cuDNN")
"""Forms that take no float32."""


def rows(kinds: Sequence[str]) -> list[dict[str, Any]]:
    """A row a form, dtype and precision."""
    found: list[dict[str, Any]] = []
    for numbers in kinds:
        dtype = numbers.split()[0]
        with jax.default_matmul_precision("default" if "TF32" in numbers else "highest"):
            for name, form in FORMS.items():
                if (name in HALF_ONLY and dtype == "float32") or ("cuDNN" in name and not GPU):
                    continue
                begin, row = time.perf_counter(), {"form": name, "numbers": numbers}
                try:
                    errors = form(dtype)
                    row |= {"problems": len(errors), "worst": max(errors)}
                except Exception as error:  # one form's failure keeps the others' figures
                    row |= {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
                found.append(row)
                print(row, f"{time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    return found


def main() -> int:
    """1 where a row failed or exceeds its limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--numbers", nargs="*", choices=LIMITS, default=list(LIMITS))
    asked = parser.parse_args()
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(ask, capture_output=True, text=True).stdout.split()[0] if GPU else None
    about = {"gpu": jax.devices()[0].device_kind, "driver": driver, "jax": jax.__version__,
             "date": time.strftime("%Y-%m-%d"), "command": "python docs/bench/checks_gpu.py"}  # fmt: skip
    result = {**about, "limits": LIMITS, "checks": rows(asked.numbers)}
    text = json.dumps(result, indent=1)
    print(text)
    if asked.json:
        asked.json.write_text(text + "\n")
    return int(any(row.get("worst", 1) > LIMITS[row["numbers"]] for row in result["checks"]))


if __name__ == "__main__":
    sys.exit(main())
