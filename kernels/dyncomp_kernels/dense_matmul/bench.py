"""GB/s of weights of one product: ``taskset -c 1 python -m dyncomp_kernels.dense_matmul.bench``.

By the process's processor time: pin it to one core, with XLA_FLAGS=--xla_cpu_multi_thread_eigen=false.
"""

import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp_kernels.dense_matmul.api import dense_matmul

INNER, COLUMNS, COPIES, TURNS = 576, 1536, 30, 15
ROWS = (1, 2, 8, 32)


def rows() -> list[dict[str, Any]]:
    """One dict a number of rows and form: GB/s."""
    rng, found = np.random.default_rng(0), []
    exact = [rng.normal(size=(INNER, COLUMNS)).astype(np.float32) / 30 for _ in range(COPIES)]
    half = [jnp.asarray(w, jnp.bfloat16) for w in exact]
    turned = [jnp.asarray(w.T.copy(), jnp.bfloat16) for w in exact]
    forms = {
        "bfloat16, plain": (jnp.matmul, half, jnp.bfloat16),
        "bfloat16": (dense_matmul, half, jnp.bfloat16),
        "bfloat16, weights transposed": (_transposed, turned, jnp.bfloat16),
        "float32": (dense_matmul, [jnp.asarray(w) for w in exact], jnp.float32),
        "float32, weights transposed": (
            _transposed,
            [jnp.asarray(w.T.copy()) for w in exact],
            jnp.float32,
        ),
    }
    for m in ROWS:
        for name, (product, weights, dtype) in forms.items():
            seconds = _seconds(product, jnp.ones((1, m, INNER), dtype), weights)
            moved = COPIES * INNER * COLUMNS * jnp.dtype(dtype).itemsize
            found.append({"rows": m, "form": name, "GB/s": round(moved / seconds / 1e9, 2)})
    return found


def _transposed(x: Any, w: Any) -> Any:
    return dense_matmul(x, w.T, transposed=True)


def _seconds(product: Any, x: Any, weights: list[Any]) -> float:
    """Median processor seconds of all products, one behind the other."""

    @jax.jit
    def chain(x: Any, weights: list[Any]) -> Any:
        for w in weights:
            x = x + product(x, w)[..., :INNER]
        return x

    jax.block_until_ready(chain(x, weights))
    found = []
    for _ in range(TURNS):
        begin = time.process_time()
        jax.block_until_ready(chain(x, weights))
        found.append(time.process_time() - begin)
    return float(np.median(found))


if __name__ == "__main__":
    for line in rows():
        print(json.dumps(line))
