"""Parity with PyTorch and transformers: random small weights, no network. Run by ``pytest -m peers``.

A peer's tensors come over through one converter per network, the gradients through the same one, so a transposed
weight cannot hide. Tolerances: 1e-5 absolute and 1e-4 relative, in float32 on both sides unless a test says otherwise.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def pytest_ignore_collect(collection_path, config):
    """Without ``-m peers`` nothing here is imported: the main suite needs no PyTorch."""
    return True if config.getoption("markexpr") == "not peers" else None


def array(tensor) -> jax.Array:
    """A tensor as a JAX array of the same dtype."""
    return jnp.asarray(tensor.detach().cpu().numpy())


def close(ours, theirs, rtol=1e-4, atol=1e-5):
    """Every leaf of two trees of equal structure; a failure names the leaf."""
    a, b = (jax.tree_util.tree_flatten_with_path(tree) for tree in (ours, theirs))
    assert a[1] == b[1], f"{a[1]}\n{b[1]}"
    for (path, x), (_, y) in zip(a[0], b[0], strict=True):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol, err_msg=name)


def randomize(module, seed=0, scale=0.15):
    """Fills all parameters of a torch module, norms too: nothing stays at 0 or 1, where an error could hide."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(centre + scale * noise)
    return module.eval()


@pytest.fixture(scope="session")
def peer():
    """The helpers above; torch on one thread, like everything that is compared here."""
    import torch

    torch.set_num_threads(1)
    return SimpleNamespace(array=array, close=close, randomize=randomize)
