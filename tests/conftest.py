"""Environment of every test: four simulated CPU devices, no accelerator looked for, no windows opened.

Shapes and types of our packages are checked at run time: pyproject.toml sets ``--jaxtyping-packages``.
"""

import gc
import importlib.metadata
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
# Where machine code is not optimised, XLA's newer fusion emitter is most of what is left of compiling. jaxlib 0.11 no
# longer knows the flag, and XLA ends the process for one that it does not know.
old_emitters = importlib.metadata.version("jaxlib").startswith("0.10.")
if os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") and old_emitters:
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("MPLBACKEND", "agg")

import jax  # noqa: E402
import psutil  # noqa: E402
import pytest  # noqa: E402

MOST_BYTES = 3 * 2**30
LONG = ("tests/docs/", "tests/bench/", "training/test_faults.py", "training/test_processes.py")


def pytest_collection_modifyitems(items):
    """Long tests first: one that began last would keep the other process waiting."""
    items.sort(key=lambda item: not any(part in item.path.as_posix() for part in LONG))


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """Drops compiled programs after a module of tests once the process has grown large; they are what it holds."""
    yield
    if psutil.Process().memory_info().rss > MOST_BYTES:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def unchecked():
    """Without the run-time type checks of the tests, which would speak first."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


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


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder with a Llama of four layers, random weights, and a tokenizer of bytes, as transformers would save it."""
    import functools

    import jax.numpy as jnp
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    from dyncomp import pretrained
    from dyncomp.attention import Attention
    from dyncomp.experts import SwiGLU
    from dyncomp.models import Block, DecoderLM, Group

    mixer = functools.partial(Attention, heads=4, kv_heads=2)
    block = functools.partial(Block, mixer=mixer, ffn=functools.partial(SwiGLU, hidden=48))
    model = DecoderLM(vocab_size=260, d_model=32, groups=[Group([block], 4)], max_length=128)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, "<s>", "</s>"])}
    backend = Backend(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = pretrained.Tokenizer(backend, {"eos": "</s>"})
    path = tmp_path_factory.mktemp("tiny")
    pretrained.export(path, model, variables["params"], tokenizer)
    return path
