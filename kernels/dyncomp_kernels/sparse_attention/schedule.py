"""How full the matrix units are, by the compiler: ``python -m dyncomp_kernels.sparse_attention.schedule``.

For a v5e and a v6e, without either: our forward kernel with all causal blocks listed, and jax's `splash_attention` with
a causal mask, both in tiles of 512 by 512 with heads of 128 in bfloat16. Of the static schedule the stretches without
a branch that use the matrix units most: bundles (one a cycle) for each tile, the share of the matrix units' slots that
they fill, and spilled registers. Of ours "masked" serves blocks on the diagonal, "full" all others; splash masks in
both. Prints one line of JSON a row. Needs libtpu; nothing is run.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CHIPS = ("v5e:2x2", "v6e:2x2")
LENGTH, WIDTH, TILE = 4096, 128, 512
KERNELS = {
    "ours": ("sparse_attention_forward", ("masked", "full"), 2),
    "splash": ("splash", ("masked",), 1),
}
"""Name in the compiler's files, the busiest stretches, and tiles that each computes."""

LINE = re.compile(r"\s*(0x[0-9a-f]+|\d+)\s+([A-Z]{2})?\s*:\s*(>*)")


def compile_both(topology: str) -> None:
    """Compiles both kernels; the compiler writes its schedules where it was told to."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    from dyncomp_kernels.sparse_attention import pallas_tpu
    from dyncomp_kernels.sparse_attention.lists import causal_lists
    from dyncomp_kernels.sparse_attention.xla import Seeing

    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    one = jax.sharding.SingleDeviceSharding(chips[0])
    shaped = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=one)
    lists = causal_lists(LENGTH, LENGTH, TILE, TILE)
    ours = lambda q, k, v: pallas_tpu.forward(q, k, v, lists, jnp.int32(0), None, Seeing())
    jax.jit(ours).lower(*(shaped(1, LENGTH, 2, WIDTH),) * 3).compile()
    blocks = splash.BlockSizes(block_q=TILE, block_kv=TILE, block_kv_compute=TILE)
    mask = masks.MultiHeadMask([masks.CausalMask((LENGTH, LENGTH))] * 2)
    theirs = splash.make_splash_mha(
        mask, block_sizes=blocks, head_shards=1, q_seq_shards=1, save_residuals=True
    )
    jax.jit(theirs).lower(*(shaped(2, LENGTH, WIDTH),) * 3).compile()


def stretches(folder: Path, kernel: str) -> list[dict[str, Any]]:
    """What the stretches between labels use, the one with most of the matrix units first.

    A stretch ends with the last bundle of its label's nesting: what follows a loop belongs to what is around it.
    """
    (table,) = folder.glob(f"*-{kernel}*final_hlo-static-per-bundle-utilization.txt")
    (code,) = (p for p in folder.glob(f"*-{kernel}*-final_bundles.txt") if "analysis" not in p.name)
    head, body = table.read_text().split("== UTILIZATION:\n")
    slots = int(head.splitlines()[2].split()[0])
    used = [[int(n) for n in line.split()] for line in body.splitlines() if line.strip()]
    found = (LINE.match(line) for line in code.read_text().splitlines())
    lines = [(int(m[1], 0), m[2], len(m[3])) for m in found if m]
    starts = [i for i, (_, label, _) in enumerate(lines) if label]
    rows = []
    for begin, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        nested = [i for i in range(begin, end) if lines[i][2] >= lines[begin][2]]
        own = used[lines[begin][0] : lines[nested[-1]][0] + 1]
        units, spills = (sum(row[column] for row in own) for column in (0, 8))
        fill = units / len(own) / slots
        rows.append({"bundles": len(own), "units": units, "fill": fill, "spills": spills})
    return sorted(rows, key=lambda row: -row["units"])


def table(topology: str) -> list[dict[str, Any]]:
    """One row a stretch; a child process compiles, since libtpu reads where to write only once."""
    quiet = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        child = [sys.executable, "-m", "dyncomp_kernels.sparse_attention.schedule", topology]
        told = {**os.environ, **quiet, "LIBTPU_INIT_ARGS": dump}
        subprocess.run(child, env=told, check=True, stderr=subprocess.DEVNULL)
        rows = []
        for who, (name, kinds, tiles) in KERNELS.items():
            for kind, row in zip(kinds, stretches(Path(folder), name), strict=False):
                where = {"chip": topology.split(":")[0], "kernel": who, "tile": kind}
                a_tile = {"bundles": row["bundles"] / tiles, "spills": row["spills"] / tiles}
                rows.append({**where, **a_tile, "fill": round(row["fill"], 3)})
        return rows


def main() -> None:
    """Every chip."""
    for chip in CHIPS:
        for row in table(chip):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        compile_both(sys.argv[1])
    else:
        main()
