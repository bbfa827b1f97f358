"""What docs/experts.md says about NVIDIA GPUs: ``python docs/bench/gpus.py`` on a machine with Hopper GPUs.

Prints JSON. With one GPU: the grouped product's Hopper form against float64, what ptxas says of its kernels, its speed
and the portable form's. With several: the exchange of experts against one device (largest differences of outputs and
gradients) and milliseconds of a layer under each exchange. Needs jax for CUDA and flax.
"""

import functools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import linen as nn  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from dyncomp.core.dtypes import DTypes  # noqa: E402
from dyncomp.core.plans import RoutePlan  # noqa: E402
from dyncomp.experts import Exchange, HopperSwiGLUBank, MoE, SwiGLUBank  # noqa: E402
from dyncomp.parallel import MeshSpec, use  # noqa: E402
from dyncomp.parallel.shardings import shardings_for  # noqa: E402
from dyncomp.routers import TopK  # noqa: E402
from dyncomp_kernels.grouped_matmul.api import grouped_matmul  # noqa: E402
from dyncomp_kernels.grouped_matmul.cases import LANES, LARGE, Case, dirichlet4  # noqa: E402

SHAPES = ((8192, 4096, 3584), (16384, 2048, 1408))
GROUPS = (8, 64)
EXCHANGES = {
    "weights gathered (slices=0)": ("dropless", {"slices": 0}),
    "rows, padded (ragged=False, pair_factor=2.0)": (
        "dropless",
        {"slices": 1, "ragged": False, "pair_factor": 2.0},
    ),
    "rows, capacity 1.25": ("capacity", {"slices": 1}),
    "rows, capacity 1.25, four chunks": ("capacity", {"slices": 1, "chunks": 4}),
    "rows, ragged (default)": ("dropless", {"slices": 1}),
}
ROWS, WIDTH, HIDDEN, EXPERTS, K = 32768, 2048, 1408, 64, 6


def milliseconds(call: Callable[..., Any], *args: Any, calls: int = 10, times: int = 15) -> float:
    """Median over ``times`` of the mean of ``calls`` calls in a row."""
    jax.block_until_ready(call(*args))
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        for _ in range(calls):
            out = call(*args)
        jax.block_until_ready(out)
        found.append((time.perf_counter() - begin) / calls)
    return 1e3 * float(np.median(found))


def spills() -> dict[str, Any]:
    """Registers and spilled bytes of every kernel of a product and its gradients, as ptxas tells a child process."""
    told = {**os.environ, "MOSAIC_GPU_DUMP_PTXAS": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    child = subprocess.run(
        [sys.executable, __file__, "once"], env=told, capture_output=True, text=True, check=True
    )
    said = child.stdout + child.stderr
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    most = max((int(n) for pair in spilled for n in pair), default=None)
    return {"kernels": len(registers), "registers": max(registers, default=None), "bytes": most}


def once() -> None:
    """Every product and its gradients once, of both shapes and numbers of groups."""
    for (m, k, n), groups in ((shape, g) for shape in SHAPES for g in GROUPS):
        sizes = jnp.asarray(dirichlet4(m, groups), jnp.int32)
        product = functools.partial(grouped_matmul, group_sizes=sizes, implementation="mosaic_gpu")
        total = lambda x, w, p=product: jnp.sum(p(x, w).astype(jnp.float32))
        args = jnp.ones((m, k), jnp.bfloat16), jnp.ones((groups, k, n), jnp.bfloat16)
        jax.block_until_ready(jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(*args))


def products() -> list[dict[str, Any]]:
    """TFLOP/s of one grouped product in bfloat16 under a Dirichlet(4) load, by form: [forward, with gradients]."""
    found = []
    for (m, k, n), groups in ((shape, g) for shape in SHAPES for g in GROUPS):
        sizes, key = jnp.asarray(dirichlet4(m, groups), jnp.int32), jax.random.key(0)
        draw = lambda *shape, key=key: jax.random.normal(key, shape, jnp.bfloat16)
        x, w, dy = draw(m, k), draw(groups, k, n) * 0.02, draw(m, n)
        form = lambda name, s=sizes: lambda a, b: grouped_matmul(a, b, s, implementation=name)
        forms = {
            "dense": jnp.matmul,  # with the weights of one group, or its gradient would fill all
            "hopper": form("mosaic_gpu"),
            "portable": form("xla"),
        }
        row: dict[str, Any] = {"rows": m, "inner": k, "columns": n, "groups": groups}
        for name, product in forms.items():
            both = lambda x, w, dy, p=product: (lambda y, pull: (y, *pull(dy)))(*jax.vjp(p, x, w))
            own = w[0] if name == "dense" else w
            seconds = (
                milliseconds(jax.jit(product), x, own),
                milliseconds(jax.jit(both), x, own, dy),
            )
            row[name] = [
                round(f * m * k * n / s / 1e9, 1) for f, s in zip((2, 6), seconds, strict=True)
            ]
        found.append(row)
    return found


def checked() -> dict[str, Any]:
    """The Hopper form against float64, group by group: how many problems, and the worst error of value and gradients.

    Loads: the shared ones whose widths fit, and 40 random ones with empty groups and unused rows. An error is relative
    to the largest number of its array; bfloat16 rounds to 2^-9 = 0.002 of a number.
    """
    rng, worst = np.random.default_rng(0), 0.0
    cases = [*LANES, *LARGE]
    for number in range(40):
        sizes = rng.integers(0, 120, size=16) * (rng.random(16) < 0.7)
        cases.append(
            Case(f"random_{number}", int(sizes.sum()) + 37, 256, 128, tuple(map(int, sizes)))
        )
    for case in cases:
        draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
        x, w, dy = draw(case.m, case.k), draw(len(case.sizes), case.k, case.n), draw(case.m, case.n)
        sizes = jnp.asarray(case.sizes, jnp.int32)
        product = functools.partial(grouped_matmul, group_sizes=sizes, implementation="mosaic_gpu")
        y, pull = jax.vjp(product, x, w)
        for ours, exact in zip((y, *pull(dy)), by_hand(x, w, case.sizes, dy), strict=True):
            scale = max(np.abs(exact).max(initial=0.0), 1e-9)
            worst = max(worst, float(np.abs(np.asarray(ours, np.float64) - exact).max() / scale))
    return {"problems": len(cases), "worst": worst}


def by_hand(x: Any, w: Any, sizes: tuple[int, ...], dy: Any) -> tuple[Any, Any, Any]:
    """Value and gradients of the grouped product in float64, group by group."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw, begin = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w), 0
    for group, size in enumerate(sizes):
        own = slice(begin, begin + size)
        y[own], dx[own], dw[group] = x[own] @ w[group], dy[own] @ w[group].T, x[own].T @ dy[own]
        begin += size
    return y, dx, dw


def differences(devices: int) -> list[dict[str, Any]]:
    """Largest differences of outputs and gradients between many devices and one, on a lopsided plan, float32."""
    n, d, f, e, rng = 64, 16, 32, 8, np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    liking = np.array([5.0, 3, 2, 1, 1, 1, 0.5, 0]) / 13.5
    experts = np.stack([rng.choice(e, 2, replace=False, p=liking) for _ in range(n)])
    keep = jnp.asarray(rng.random((n, 2)) < 0.9)
    weights = {
        name: 0.4 * draw(*s)
        for name, s in (("gate", (e, d, f)), ("up", (e, d, f)), ("down", (e, f, d)))
    }
    given = draw(n, d), jnp.abs(draw(n, 2)), weights

    def program(kind: str, options: dict[str, Any]) -> Any:
        moe = MoE(router=functools.partial(TopK, k=2), num_experts=e, hidden=f, dispatch=kind,
                  capacity_factor=8.0, exchange=Exchange(**options))  # fmt: skip

        def loss(x: Any, gates: Any, bank: Any) -> Any:
            plan = RoutePlan(jnp.asarray(experts, jnp.int32), jnp.where(keep, gates, 0.0), keep)
            y, _, _ = moe._run(plan, x, SwiGLUBank(**bank))
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))

    largest = lambda a, b: max(
        float(np.abs(p - q).max())
        for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
    with jax.default_matmul_precision("highest"):
        (_, y), grads = jax.device_get(program("dropless", {})(*given))
        found = []
        for name, (kind, options) in EXCHANGES.items():
            with use(MeshSpec(expert=devices).build()):
                (_, ours), theirs = jax.device_get(
                    program(kind, {**options, "pair_factor": None})(*given)
                )
            found.append(
                {"exchange": name, "output": largest(ours, y), "gradients": largest(theirs, grads)}
            )
    return found


def layer(devices: int) -> list[dict[str, Any]]:
    """Milliseconds of a bfloat16 layer with the Hopper bank: forward, and gradients of parameters and rows."""
    mesh, found = MeshSpec(expert=devices).build(), []
    x = jax.random.normal(jax.random.key(0), (devices, ROWS // devices, WIDTH), jnp.bfloat16)
    dtypes = DTypes(param="bfloat16", compute="bfloat16")
    for name, (kind, options) in EXCHANGES.items():
        moe = MoE(router=functools.partial(TopK, k=K), num_experts=EXPERTS, hidden=HIDDEN, bank=HopperSwiGLUBank,
                  dispatch=kind, exchange=Exchange(**options), dtypes=dtypes)  # fmt: skip
        with use(mesh):
            boxed = jax.eval_shape(moe.init, jax.random.key(0), x[:1, :256])
            where = shardings_for(boxed, nn.meta.unbox(boxed), mesh)[0]
            make = jax.jit(lambda k, x, m=moe: nn.meta.unbox(m.init(k, x)), out_shardings=where)
            variables = make(jax.random.key(0), x[:1, :256])
            rows = jax.device_put(x, NamedSharding(mesh, PartitionSpec("expert")))
            forward = jax.jit(lambda v, x, m=moe: m.apply(v, x)[0])
            loss = lambda v, x, m=moe: jnp.sum(jnp.square(m.apply(v, x)[0].astype(jnp.float32)))
            backward = jax.jit(jax.grad(loss, argnums=(0, 1)))
            times = [milliseconds(f, variables, rows, calls=1) for f in (forward, backward)]
        found.append({"exchange": name, "forward_ms": times[0], "gradients_ms": times[1]})
    return found


def main() -> None:
    """Kernels on one GPU, exchanges on several."""
    found = spills()  # first: later this process holds the memory
    gpus = jax.devices()
    about = {"gpu": gpus[0].device_kind, "gpus": len(gpus), "jax": jax.__version__}
    if len(gpus) > 1:
        result = {"differences": differences(len(gpus)), "layer": layer(len(gpus))}
    else:
        result = {"checked": checked(), "spills": found, "products": products()}
    print(json.dumps({**about, **result}, indent=1))


if __name__ == "__main__":
    once() if sys.argv[1:] == ["once"] else main()
