"""What the scripts for one GPU share: which it is, how calls are timed, how fast its memory is read. Needs jax only."""

import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PEAK = {"H100": 989e12, "H200": 989e12}
"""bfloat16 FLOP/s of the dense tensor cores, by the data sheet."""


def card() -> dict[str, Any]:
    """The GPU, its driver, and what is known of its arithmetic."""
    name = jax.devices()[0].device_kind
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError):
        driver = "none"
    peak = next((flops for part, flops in PEAK.items() if part in name), None)
    return {
        "gpu": name, "driver": driver, "jax": jax.__version__, "peak": peak,
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def seconds(call: Callable[[], Any], calls: int = 5, times: int = 7) -> float:
    """Median over ``times`` of the mean of ``calls`` calls in a row."""
    jax.block_until_ready(call())
    jax.block_until_ready(call())
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        for _ in range(calls):
            out = call()
        jax.block_until_ready(out)
        found.append((time.perf_counter() - begin) / calls)
    return float(np.median(found))


def copy_rate(small: bool) -> float:
    """Bytes a second that a large bfloat16 matrix-vector product reads."""
    rows, columns = (512, 512) if small else (16_384, 65_536)
    matrix, x = jnp.ones((rows, columns), jnp.bfloat16), jnp.ones((1, rows), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    return matrix.nbytes / seconds(lambda: product(x, matrix), 10)
