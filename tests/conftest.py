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


@pytest.fixture(scope="session")
def random_checkpoint():
    """``make(folder, config)``: a folder as transformers saves it; every weight follows from its tensor's name."""
    import json
    import zlib

    import numpy as np

    from dyncomp.pretrained import architectures, fields, params, weights

    def make(folder, config, scale=0.15, dtype="float32"):
        said = fields.Fields(config)
        known = architectures.find(said)
        model = known.read(said).model()
        shapes = {
            leaf.tensor(place): leaf.entry.shape(leaf.inner)
            for leaf in params.leaves(model, known)
            for place in leaf.places
        }

        def draw(name):
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            noise = rng.standard_normal(shapes[name], np.float32)
            centre = 1.0 if "norm" in name or ".ln_" in name and name.endswith("weight") else 0.0
            return (centre + scale * noise).astype(weights.numpy_dtype(dtype))

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        planned = {name: (dtype, shape) for name, shape in shapes.items()}
        weights.write(folder / "model.safetensors", planned, map(draw, shapes))
        return folder

    return make
