"""Grouped products of a large layer on one Hopper GPU: ``python docs/bench/grouped_gpu.py [--json FILE] [--small]``.

16,384 tokens of two choices each, d 4096, f 14,336, 8 and 64 experts, bfloat16, a Dirichlet(4) load: the Hopper form's
forward product and both gradients beside one dense product of equal FLOPs (cuBLAS through JAX and through PyTorch),
PyTorch's `grouped_mm` and tokamax's `ragged_dot`; the two limits, all rows to one expert and one row each; and SwiGLU
experts with gradients beside a dense unit. Forms of a row take turns, on the same data; figures are medians.

Prints a table last. Needs jax for CUDA; PyTorch and tokamax are measured where they are installed.
``--small`` runs tiny sizes anywhere.
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory beside JAX

import argparse  # noqa: E402
import functools  # noqa: E402
import importlib.metadata  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
import types  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from gpu_card import card, copy_rate  # noqa: E402

from dyncomp_kernels.grouped_matmul.api import grouped_matmul  # noqa: E402
from dyncomp_kernels.grouped_matmul.cases import dirichlet4  # noqa: E402

SMALL = "--small" in sys.argv
ROWS, WIDTH, HIDDEN = (512, 256, 512) if SMALL else (32_768, 4096, 14_336)
EXPERTS = (8, 64)
SHAPES = ((WIDTH, HIDDEN), (HIDDEN, WIDTH))
TURNS, CALLS = (2, 1) if SMALL else (15, 3)
PARTS = ("forward", "row gradient", "weight gradient")
TILES = (
    (128, 128, 64, 4),
    (128, 192, 64, 4),
    (128, 64, 128, 4),
    (64, 128, 64, 4),
    (64, 256, 64, 4),
)
"""Rows, columns, depth and steps in flight that tokamax is tried with, beside its own choice."""

Call = Callable[[], Any]
Forms = dict[str, dict[str, Call]]
"""A call by part and form."""


def wait(found: Any) -> None:
    """Until ``found`` is computed."""
    if type(found).__module__.startswith("torch"):
        import torch  # pyrefly: ignore

        torch.cuda.synchronize()
    else:
        jax.block_until_ready(found)


def milliseconds(calls: dict[str, Call], turns: int = TURNS, each: int = CALLS) -> dict[str, float]:
    """Median of each call, of ``each`` in a row, all in turn; the first turn is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            wait(out := call())
            begin = time.perf_counter()
            for _ in range(each):
                out = None  # its memory is the next one's
                out = call()
            wait(out)
            if turn:
                taken[name].append((time.perf_counter() - begin) / each)
            del out
    return {name: 1e3 * float(np.median(times)) for name, times in taken.items()}


def compiled(fn: Callable[..., Any], *args: Any) -> Call:
    """A call without arguments."""
    return functools.partial(jax.jit(fn).lower(*args).compile(), *args)


def gradient(product: Callable[..., Any], which: int) -> Callable[..., Any]:
    """One gradient of a product of rows and weights alone, for a cotangent."""
    return lambda x, w, dy: jax.vjp(product, x, w)[1](dy)[which]


def ours(sizes: Any, x: Any, w: Any, dy: Any) -> dict[str, Call]:
    """The Hopper form by part; on other platforms the portable one."""
    product = functools.partial(grouped_matmul, group_sizes=sizes, implementation="mosaic_gpu")
    fns = (lambda x, w, dy: product(x, w), gradient(product, 0), gradient(product, 1))
    return {part: compiled(fn, x, w, dy) for part, fn in zip(PARTS, fns, strict=True)}


def dense(x: Any, w: Any, dy: Any) -> dict[str, Call]:
    """cuBLAS through JAX, with one matrix."""
    fns = (lambda x, w, dy: x @ w, lambda x, w, dy: dy @ w.T, lambda x, w, dy: x.T @ dy)
    return {part: compiled(fn, x, w, dy) for part, fn in zip(PARTS, fns, strict=True)}


def torch_forms(sizes: Any, x: Any, w: Any, dy: Any) -> dict[str, dict[str, Call]]:
    """PyTorch on the same memory: its dense product and `grouped_mm`."""
    import torch  # pyrefly: ignore

    x, w, dy = (torch.from_dlpack(a) for a in (x, w, dy))
    ends, grouped = torch.from_dlpack(jnp.cumsum(sizes)), torch.nn.functional.grouped_mm
    one = w[0].clone()
    return {
        "torch dense": dict(zip(PARTS, (lambda: x @ one, lambda: dy @ one.T, lambda: x.T @ dy), strict=True)),
        "torch": {
            "forward": lambda: grouped(x, w, offs=ends),
            "row gradient": lambda: grouped(dy, w.transpose(1, 2), offs=ends),
            "weight gradient": lambda: grouped(x.T, dy, offs=ends),
        },
    }  # fmt: skip


def tokamax_forms(sizes: Any, x: Any, w: Any, dy: Any, tiles: Any) -> dict[str, Callable[[], Call]]:
    """tokamax's Pallas kernels with these tiles (None: its own choice), each compiled when asked for."""
    for name in ("xprof", "xprof.cli", "xprof.cli.tools"):  # only its own timing uses xprof
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["xprof.cli.tools"].get_kernel_stats_tool = None  # pyrefly: ignore
    import tokamax  # pyrefly: ignore
    from tokamax._src.ops.ragged_dot import base  # pyrefly: ignore
    from tokamax._src.ops.ragged_dot import pallas_mosaic_gpu as kernels  # pyrefly: ignore
    from tokamax._src.ops.ragged_dot.pallas_mosaic_gpu_common import Config, MatmulDimension  # pyrefly: ignore

    names = "block_m", "block_n", "block_k", "num_stages"
    more = {"split_k": 1, "grid_minor_dim": MatmulDimension.N, "grid_tile_width": 8}
    config = tiles and Config(**dict(zip(names, tiles, strict=True)), **more)
    form = kernels.PallasMosaicGpuRaggedDot(config=config)
    dots = (
        base.DEFAULT_RAGGED_DOT_DIM_NUMS,
        base.TRANS_RHS_RAGGED_DOT_DIM_NUMS,
        base.RAGGED_CONTRACTING_DOT_DIM_NUMS,
    )
    run = lambda dot: lambda a, b: tokamax.ragged_dot_general(
        a, b, group_sizes=sizes, ragged_dot_dimension_numbers=dot, implementation=[form],
        preferred_element_type=jnp.bfloat16,
    )  # fmt: skip
    made = zip(PARTS, dots, ((x, w), (dy, w), (x, dy)), strict=True)
    return {part: functools.partial(compiled, run(dot), *args) for part, dot, args in made}


@functools.cache
def draw(seed: int, *shape: int) -> Any:
    """Normal numbers in bfloat16."""
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def stack(experts: int, k: int, n: int) -> Any:
    """Weights of every expert, drawn one after the other: at once they would not fit beside their float32."""
    keys = jax.random.split(jax.random.key(2), experts)
    one = lambda key: jax.random.normal(key, (k, n), jnp.bfloat16) * jnp.bfloat16(k**-0.5)
    return jax.jit(lambda keys: jax.lax.map(one, keys))(keys)


def sampled(calls: dict[str, Call], sizes: tuple[int, ...], x: Any, w: Any, dy: Any) -> float:
    """Largest error against float64 of some rows, columns and matrix entries of three groups, of the largest number."""
    rng, worst = np.random.default_rng(0), 0.0
    y, dx, dw = (calls[part]() for part in PARTS)
    wide = lambda a: np.asarray(a, np.float64)
    for group in rng.choice(np.flatnonzero(sizes), min(3, np.count_nonzero(sizes)), replace=False):
        begin, end = int(sum(sizes[:group])), int(sum(sizes[: group + 1]))
        rows = np.unique([begin, end - 1, *rng.integers(begin, end, 6)])
        some = [np.sort(rng.choice(size, 48, replace=False)) for size in w.shape[1:]]
        own = wide(w[int(group)])
        left, right = wide(x[begin:end][:, some[0]]), wide(dy[begin:end][:, some[1]])
        pairs = (
            (y[rows], wide(x[rows]) @ own),
            (dx[rows], wide(dy[rows]) @ own.T),
            (dw[int(group)][some[0]][:, some[1]], left.T @ right),
        )
        worst = max(worst, *(float(np.abs(wide(a) - b).max() / np.abs(b).max()) for a, b in pairs))
    return worst


def installed(name: str) -> str | None:
    """Version of a package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def chosen_tiles(forms: Callable[[Any], dict[str, Callable[[], Call]]]) -> dict[str, Any]:
    """Fastest tiles of tokamax by part; those that fail to compile or run are passed over."""
    best: dict[str, Any] = {}
    for part in PARTS:
        taken = {}
        for tiles in (None, *TILES):
            try:
                call = forms(tiles)[part]()
                taken[tiles] = milliseconds({"": call}, 2, 1)[""]
            except Exception as error:  # other tiles may do
                print(f"tokamax {tiles} {part}: {str(error)[:120]}", file=sys.stderr, flush=True)
        if taken:
            best[part] = min(taken, key=lambda tiles: taken[tiles])
            print(f"tokamax {part}: {taken}", file=sys.stderr, flush=True)
    return best


def products(
    load: Callable[[int, int], tuple[int, ...]], shapes: Any, peers: bool, chosen: dict[str, Any]
) -> Any:
    """A row a shape and number of experts: milliseconds by part and form, and the error of a sample."""
    found = []
    for (k, n), experts in ((shape, e) for shape in shapes for e in EXPERTS):
        x, dy, w, many = (
            draw(0, ROWS, k),
            draw(1, ROWS, n),
            stack(experts, k, n),
            load(ROWS, experts),
        )
        sizes, error = jnp.asarray(many, jnp.int32), None
        own = ours(sizes, x, w, dy)
        if peers:
            error = sampled(own, many, x, w, dy)
        forms = {"dense": dense(x, w[0], dy), "ours": own}
        if installed("torch") and not SMALL:
            forms |= torch_forms(sizes, x, w, dy)
        if peers and installed("tokamax") and not SMALL:
            make = functools.partial(tokamax_forms, sizes, x, w, dy)
            chosen |= {} if chosen else chosen_tiles(make)
            forms["tokamax"] = {part: make(tiles)[part]() for part, tiles in chosen.items()}
        row: dict[str, Any] = {
            "k": k,
            "n": n,
            "experts": experts,
            "largest": max(many),
            "error": error,
        }
        for part in PARTS:
            row[part] = milliseconds(
                {name: calls[part] for name, calls in forms.items() if part in calls}
            )
        found.append(row)
        print(row, file=sys.stderr, flush=True)
        del forms, own, w
    return found


def thin() -> list[dict[str, Any]]:
    """One row an expert: milliseconds by part, and TB/s of the weights that are read or written."""
    found, (k, n) = [], SHAPES[0]
    for experts in EXPERTS:
        x, dy, w = draw(3, experts, k), draw(4, experts, n), stack(experts, k, n)
        sizes = jnp.ones(experts, jnp.int32)
        forms = {"ours": ours(sizes, x, w, dy)}
        if installed("torch") and not SMALL:
            forms["torch"] = torch_forms(sizes, x, w, dy)["torch"]
        row: dict[str, Any] = {"k": k, "n": n, "experts": experts}
        for part in PARTS:
            row[part] = milliseconds({name: calls[part] for name, calls in forms.items()})
        row["bytes"] = w.nbytes
        found.append(row)
        del forms, w
    return found


def swiglu() -> list[dict[str, Any]]:
    """Forward and all gradients of SwiGLU experts and of a dense unit of equal FLOPs: milliseconds."""
    found = []
    x, dy = draw(0, ROWS, WIDTH), draw(5, ROWS, WIDTH)

    def both(product: Callable[..., Any], x: Any, ws: Any, dy: Any) -> Any:
        unit = lambda x, ws: product(jax.nn.silu(product(x, ws[0])) * product(x, ws[1]), ws[2])
        out, pull = jax.vjp(unit, x, ws)
        return out, pull(dy)

    for experts in EXPERTS:
        sizes = jnp.asarray(dirichlet4(ROWS, experts), jnp.int32)
        product = functools.partial(grouped_matmul, group_sizes=sizes, implementation="mosaic_gpu")
        ws = tuple(stack(experts, *shape) for shape in (SHAPES[0], SHAPES[0], SHAPES[1]))
        one = tuple(w[0] for w in ws)
        calls = {
            "dense": compiled(functools.partial(both, jnp.matmul), x, one, dy),
            "ours": compiled(functools.partial(both, product), x, ws, dy),
        }
        found.append({"experts": experts, **milliseconds(calls, each=1)})
        del calls, ws
    return found


def rate(row: dict[str, Any], part: str, form: str) -> float:
    """TFLOP/s."""
    return 2e-9 * ROWS * row["k"] * row["n"] / row[part][form]


def table(result: dict[str, Any]) -> str:
    """TFLOP/s of every product, and their share of the dense one's."""
    lines = [f"{result['gpu']}, driver {result['driver']}, jax {result['jax']}, {result['date']}"]
    for name in ("products", "one_expert"):
        for row in result[name] if isinstance(result[name], list) else ():
            totals = {
                form: sum(row[part][form] for part in PARTS if form in row[part])
                for form in row["forward"]
            }
            lines.append(
                f"{name}: {row['k']} x {row['n']}, {row['experts']} experts, error {row['error']}"
            )
            for part in PARTS:
                rates = ", ".join(f"{form} {rate(row, part, form):.0f}" for form in row[part])
                lines.append(
                    f"  {part}: {rates}; of dense {row[part]['dense'] / row[part]['ours']:.3f}"
                )
            lines.append(f"  all three: of dense {totals['dense'] / totals['ours']:.3f}")
    return "\n".join(lines)


def main() -> None:
    """All parts; JSON, then the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--small", action="store_true")
    asked, chosen = parser.parse_args(), {}
    one = lambda rows, experts: (rows,) + (0,) * (experts - 1)
    parts = {
        "products": lambda: products(dirichlet4, SHAPES, True, chosen),
        "one_expert": lambda: products(one, SHAPES[:1], False, chosen),
        "one_row": thin,
        "swiglu": swiglu,
        "bandwidth": lambda: copy_rate(SMALL),
    }
    result: dict[str, Any] = {
        "grouped": True,
        "gpus": 1,
        **card(),
        "command": "python docs/bench/grouped_gpu.py",
    }
    result |= {name: installed(name) for name in ("torch", "tokamax")} | {"rows": ROWS}
    for name, part in parts.items():
        begin = time.perf_counter()
        try:
            result[name] = part()
        except Exception as error:  # one part's failure keeps the others' figures
            result[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    result["tokamax_tiles"] = chosen
    text = json.dumps(result, indent=1)
    print(text)
    if asked.json:
        asked.json.write_text(text + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
