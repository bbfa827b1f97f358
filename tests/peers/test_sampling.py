"""The sampler's distribution against the logits processors of Hugging Face transformers, in their order."""

import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.decoding import Sampler

pytestmark = pytest.mark.peers

GRID = [
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 20},
    {"temperature": 1.5, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 2.0, "top_k": 5, "top_p": 0.5, "min_p": 0.5},
]


@pytest.mark.parametrize("fields", GRID)
def test_probabilities(fields):
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    steps = [process.TemperatureLogitsWarper(fields["temperature"])]
    if "top_k" in fields:
        steps.append(process.TopKLogitsWarper(fields["top_k"]))
    if "top_p" in fields:
        steps.append(process.TopPLogitsWarper(fields["top_p"]))
    if "min_p" in fields:
        steps.append(process.MinPLogitsWarper(fields["min_p"]))
    logits = np.random.default_rng(0).normal(size=(8, 500)).astype(np.float32) * 3
    theirs = torch.from_numpy(logits)
    for step in steps:
        theirs = step(None, theirs)
    theirs = torch.softmax(theirs, -1).numpy()
    ours = np.asarray(Sampler(**fields).probabilities(jnp.asarray(logits)))
    np.testing.assert_array_equal(ours > 0, theirs > 0)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
