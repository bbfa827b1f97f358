"""What the compiler of a TPU makes of the grouped product, without a TPU: ``python docs/bench/tpu.py``.

Prints JSON, a row a chip and kernel: FLOPs counted in the compiled product over the ideal, and for the kernel's main
region (the stretch of the static schedule without a branch that uses the matrix units most) its bundles, one cycle
each, and the share of the matrix units' slots that they fill. Needs jax with libtpu. Nothing is run.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
ROWS, INNER, COLUMNS, GROUPS = 8192, 1024, 2048, 8
CHIPS = ("v5e:2x2", "v6e:2x2")
KERNELS = {
    "forward": "ragged-dot-none",
    "row_gradient": "grouped_row_gradient",
    "weight_gradient": "grouped_weight_gradient",
    "megablox": "gmm",
}
"""What the compiler calls them; the forward product is its own kernel, megablox's stands for comparison."""
MEGABLOX = (512, 1024, 1024)
QUIET = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
LABEL = re.compile(r"\s*(0x[0-9a-f]+|\d+)\s+(LB|LH|LE|PB|PF|CT)\s*:")


def chip_of(topology: str) -> Any:
    """Where to compile to."""
    import jax
    from jax.experimental import topologies

    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return jax.sharding.SingleDeviceSharding(chips[0])


def ratios(topology: str) -> dict[str, float]:
    """FLOPs counted over the ideal, by product."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from dyncomp_kernels.grouped_matmul.selfcheck import flop_ratios

    rows = jax.ShapeDtypeStruct((ROWS, INNER), jnp.bfloat16)
    weights = jax.ShapeDtypeStruct((GROUPS, INNER, COLUMNS), jnp.bfloat16)
    even = np.full(GROUPS, ROWS // GROUPS)
    with warnings.catch_warnings(action="ignore"):
        return flop_ratios(rows, weights, even, sharding=chip_of(topology))


def compile_all(topology: str) -> None:
    """The product with its gradients, and megablox's product beside it."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    from dyncomp_kernels.grouped_matmul.api import grouped_matmul

    def ours(x: Any, w: Any, sizes: Any, dy: Any) -> Any:
        y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
        return y, pull(dy)

    one = chip_of(topology)
    shaped = lambda dtype, *s: jax.ShapeDtypeStruct(s, dtype, sharding=one)  # noqa: E731
    x, dy = (shaped(jnp.bfloat16, ROWS, n) for n in (INNER, COLUMNS))
    w, sizes = shaped(jnp.bfloat16, GROUPS, INNER, COLUMNS), shaped(jnp.int32, GROUPS)
    jax.jit(ours).lower(x, w, sizes, dy).compile()
    theirs = lambda x, w, s: gmm(x, w, s, preferred_element_type=x.dtype, tiling=MEGABLOX)  # noqa: E731
    jax.jit(theirs).lower(x, w, sizes).compile()


def main_region(folder: Path, kernel: str) -> dict[str, Any]:
    """Bundles of the region that uses the matrix units most, and the share of their slots that it fills."""
    (table,) = folder.glob(f"*-{kernel}*final_hlo-static-per-bundle-utilization.txt")
    (code,) = (p for p in folder.glob(f"*-{kernel}*-final_bundles.txt") if "analysis" not in p.name)
    head, body = table.read_text().split("== UTILIZATION:\n")
    slots = int(head.splitlines()[2].split()[0])
    used = [int(line.split()[0]) for line in body.splitlines() if line.strip()]
    marks = [int(m[1], 0) for line in code.read_text().splitlines() if (m := LABEL.match(line))]
    edges = [0, *marks, len(used)]
    regions = [(sum(used[a:b]), b - a) for a, b in zip(edges, edges[1:], strict=False) if b > a]
    units, bundles = max(regions)
    return {"bundles": bundles, "matrix_slots": units / bundles / slots}


def rows(topology: str) -> list[dict[str, Any]]:
    """One row a kernel; a child process compiles, since libtpu reads where to dump only once."""
    counted = ratios(topology)
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        told = {**os.environ, **QUIET, "LIBTPU_INIT_ARGS": dump}
        child = [sys.executable, __file__, topology]
        subprocess.run(child, env=told, check=True, stderr=subprocess.DEVNULL)
        return [
            {
                "chip": topology.split(":")[0],
                "kernel": part,
                "flop_ratio": counted.get(part),
                **main_region(Path(folder), name),
            }
            for part, name in KERNELS.items()
        ]


def main() -> None:
    """Every chip."""
    os.environ |= QUIET
    shape = {"rows": ROWS, "inner": INNER, "columns": COLUMNS, "groups": GROUPS}
    print(json.dumps({"shape": shape, "rows": [r for chip in CHIPS for r in rows(chip)]}, indent=1))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        compile_all(sys.argv[1])
    else:
        main()
