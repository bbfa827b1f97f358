"""Registers, spills and shared memory of sparse attention's Hopper kernels: ``python docs/bench/sparse_registers.py``.

Compiles outputs and gradients for an H100 without one, at tiles of 128 by 128 and at the others that the kernels take,
and reads what `ptxas` says of each. Prints JSON. Needs jax 0.11 with its CUDA 13 plugin (no GPU) and `ptxas` on the
PATH. Nothing is run.
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
LIMIT = 232_448
"""Bytes of shared memory that a block of threads may have on an H100."""
LENGTH, HEADS, GROUPS = 8192, 16, 4
CASES = tuple((p, rows, 128) for p in (128, 64) for rows in (128, 64))
"""Width of a head, queries and keys of a block."""
SAID = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


def compile_case(p: int, rows: int, columns: int) -> None:
    """Compiles; the kernels' compiler writes what ptxas said where MOSAIC_GPU_DUMP_TO names a folder."""
    import jax
    import jax.numpy as jnp

    from dyncomp.parallel.topology import find
    from dyncomp_kernels.sparse_attention.api import sparse_attention
    from dyncomp_kernels.sparse_attention.lists import BlockLists

    one = jax.sharding.SingleDeviceSharding(find("h100:1").devices[0])
    shaped = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=one)
    heads = lambda n: shaped((1, LENGTH, n, p), jnp.bfloat16)
    blocks = LENGTH // rows
    lists = BlockLists(
        shaped((1, GROUPS, blocks, 16), jnp.int32), shaped((1, GROUPS, blocks), jnp.int32), rows, columns
    )  # fmt: skip

    def both(q: Any, k: Any, v: Any, d_out: Any, lists: Any) -> Any:
        attend = lambda *x: sparse_attention(*x, lists, implementation="mosaic_gpu")[0]
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(d_out)

    jax.jit(both).lower(heads(HEADS), heads(GROUPS), heads(GROUPS), heads(HEADS), lists).compile()


def read(folder: Path) -> list[dict[str, Any]]:
    """A row a kernel."""
    rows = []
    for path in sorted(folder.glob("*.ptxas")):
        text = path.read_text()
        spilled = max(int(n) for found in SAID.findall(text) for n in found)
        (threads,) = re.findall(r"Used (\d+) registers", text)
        shared = path.with_suffix(".resources.txt").read_text()
        (memory,) = re.findall(r"smem_scratch_bytes=(\d+)", shared)
        name = re.sub(r"_\d+$", "", path.stem).removeprefix("sparse_attention_")
        rows.append(
            {"kernel": name, "registers": int(threads), "spilled": spilled, "shared": int(memory)}
        )
    return rows


def main() -> None:
    """Every case."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    rows = []
    for p, own, columns in CASES:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["MOSAIC_GPU_DUMP_TO"] = folder
            compile_case(p, own, columns)
            case = {"head": p, "rows": own, "columns": columns}
            rows += [{**case, **row} for row in read(Path(folder))]
    import jax

    print(json.dumps({"sparse_registers": rows, "jax": jax.__version__, "limit": LIMIT}, indent=1))


if __name__ == "__main__":
    main()
