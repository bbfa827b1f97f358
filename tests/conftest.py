"""Environment of every test: four simulated CPU devices, no accelerator looked for, no windows opened.

Shapes and types of our packages are checked at run time: pyproject.toml sets ``--jaxtyping-packages``.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
os.environ.setdefault("MPLBACKEND", "agg")

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture
def strict():
    """No implicit dtype or rank promotion (optax steps can't run under it)."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def counting_jit():
    """``jax.jit`` of a function, and a list that grows by one at every trace.

    The size of jax's own call cache counts nothing in a long process: it drops entries when many programs are alive.
    """

    def make(fn, **options):
        traces = []

        def counted(*args):
            traces.append(1)
            return fn(*args)

        return jax.jit(counted, **options), traces

    return make
