"""Batch norm against its formulas: statistics of the batch, and running ones that are controls."""

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp.models import BatchNorm


def test_training_uses_the_batch_and_evaluation_what_was_seen(strict):
    rng, module = np.random.default_rng(0), BatchNorm(momentum=0.25)
    batches = [rng.normal(size=(4, 3, 2)).astype(np.float32) * (1 + i) + i for i in range(2)]
    params = {"scale": jnp.float32([2.0, 0.5]), "bias": jnp.float32([-1.0, 3.0])}
    controls = {"mean": jnp.zeros(2), "var": jnp.ones(2)}
    train = jax.jit(lambda v, x: module.apply(v, x, train=True, mutable=["controls"]))
    mean, var = np.zeros(2), np.ones(2)
    for x in batches:
        y, moved = train({"params": params, "controls": controls}, x)
        rows = x.reshape(-1, 2).astype(np.float64)
        wanted = (x - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5) * [2.0, 0.5] + [-1.0, 3.0]
        np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)
        mean, var = 0.75 * mean + 0.25 * rows.mean(0), 0.75 * var + 0.25 * rows.var(0, ddof=1)
        controls = moved["controls"]
    np.testing.assert_allclose(controls["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(controls["var"], var, rtol=1e-5)
    y = module.apply({"params": params, "controls": controls}, jnp.asarray(batches[0][:1]))
    wanted = (batches[0][:1] - mean) / np.sqrt(var + 1e-5) * [2.0, 0.5] + [-1.0, 3.0]
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)


def test_initialising_moves_nothing():
    found = BatchNorm().init(jax.random.key(0), 5.0 + jnp.ones((3, 2)), train=True)["controls"]
    np.testing.assert_array_equal(found["mean"], np.zeros(2))
    np.testing.assert_array_equal(found["var"], np.ones(2))
