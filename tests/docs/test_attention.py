"""The example of docs/attention.md builds a model that runs."""

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp import models


def test_the_example_runs(document):
    _, blocks = document("docs/attention.md")
    (code,) = (body for language, _, body in blocks if language == "python")
    names = {}
    exec(code, names)
    tokens = jnp.zeros((1, 8), jnp.int32)
    variables = jax.jit(names["model"].init)(jax.random.key(0), tokens)
    logits, _ = models.apply(names["model"], variables, tokens)
    assert np.isfinite(logits).all()
