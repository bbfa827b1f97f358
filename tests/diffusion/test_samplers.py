"""Schedules against tables and finite differences, samplers against Gaussian data, distances against closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from dyncomp.core.errors import DyncompError
from dyncomp.diffusion import (
    DDIM,
    EulerMaruyama,
    Moments,
    NoiseSchedule,
    Sampler,
    frechet_distance,
    sample,
    sample_scanned,
    time_embedding,
)

KINDS = ("linear", "scaled_linear", "cosine")


def at(f, t):
    return np.asarray(f(jnp.asarray(t, jnp.float32)), np.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_beta_is_the_slope_of_the_signal(kind):
    schedule, t, h = NoiseSchedule(kind=kind), np.linspace(0.05, 0.9, 18), 5e-3
    slope = (at(schedule.log_signal, t + h) - at(schedule.log_signal, t - h)) / (2 * h)
    np.testing.assert_allclose(at(schedule.beta, t), -slope, rtol=1e-2)
    assert abs(at(schedule.log_signal, [0.0])[0]) < 1e-6
    signal, noise = schedule.scales(jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(np.square(signal) + np.square(noise), 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "betas"),
    [
        ("linear", np.linspace(1e-4, 2e-2, 1000)),
        ("scaled_linear", np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2),
    ],
)
def test_continuous_schedules_follow_the_tables(kind, betas):
    table = np.cumsum(np.log1p(-betas))
    t = (np.arange(1000) + 1) / 1000
    np.testing.assert_allclose(
        at(NoiseSchedule(kind=kind).log_signal, t), table, rtol=0.03, atol=2e-3
    )


def test_cosine_and_noised():
    schedule = NoiseSchedule(kind="cosine")
    wanted = [math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0.25, 0.7)]
    start = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    np.testing.assert_allclose(
        np.exp(at(schedule.log_signal, [0.25, 0.7])), np.asarray(wanted) / start, rtol=1e-4
    )
    x, e, t = jnp.full((2, 1, 1), 2.0), jnp.full((2, 1, 1), -1.0), jnp.float32([0.25, 0.7])
    s, n = (np.asarray(v) for v in schedule.scales(t))
    np.testing.assert_allclose(schedule.noised(x, e, t)[:, 0, 0], 2 * s - n, rtol=1e-6)


def test_time_embedding():
    found = np.asarray(time_embedding(jnp.float32([0.0, 0.002]), 4))
    np.testing.assert_allclose(found[0], [1, 1, 0, 0], atol=1e-6)
    rates = np.asarray([1.0, 0.01])
    np.testing.assert_allclose(found[1], [*np.cos(2 * rates), *np.sin(2 * rates)], rtol=1e-5)
    with pytest.raises(DyncompError, match="even"):
        time_embedding(jnp.float32([0.0]), 3)


SPREAD = 0.5


def exact(schedule):
    """The best estimate of the noise in x_t where the data are N(0, SPREAD^2)."""

    def denoise(x, times, index):
        signal, noise = schedule.scales(jnp.asarray(times))
        scale = noise / (jnp.square(signal * SPREAD) + jnp.square(noise))
        return scale[:, None] * x, index

    return denoise


@pytest.mark.parametrize("kind", KINDS)
def test_samplers_reach_gaussian_data(kind):
    schedule = NoiseSchedule(kind=kind)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2000, 2)).astype(np.float32))
    keys = jax.random.split(jax.random.key(0), 2000)
    samplers = [DDIM(schedule=schedule, steps=400), DDIM(schedule=schedule, steps=400, eta=1.0)]
    if kind == "linear":  # the others are stiff near t = 1, where Euler steps of this size fail
        samplers.append(EulerMaruyama(schedule=schedule, steps=400))
    for sampler in samplers:
        assert isinstance(sampler, Sampler)
        run = jax.jit(lambda x, s=sampler: sample_scanned(s, exact(schedule), x, keys)[0])
        found = np.asarray(run(x))
        assert abs(found.std() / SPREAD - 1) < 0.06 and abs(found.mean()) < 0.03
    # Without noise of its own DDIM is a map: here nearly the multiplication with SPREAD.
    line = jax.jit(lambda x: sample_scanned(samplers[0], exact(schedule), x)[0])(x[:5])
    np.testing.assert_allclose(line, SPREAD * np.asarray(x[:5]), rtol=0.06)


def test_one_ddim_step_by_hand():
    sampler = DDIM(steps=2, clip=1.0)
    signal, noise = (float(v[0]) for v in sampler.schedule.scales(jnp.float32([0.5])))
    x, said = jnp.float32([[0.9, -0.1]]), jnp.float32([[-0.4, 0.0]])
    clean = np.clip((np.asarray(x) - noise * np.asarray(said)) / signal, -1, 1)
    assert np.abs(clean[0, 0]) == 1 and np.abs(clean[0, 1]) < 1
    np.testing.assert_allclose(
        sampler.step(x, said, 1), clean, rtol=1e-5
    )  # the last step gives x_0


@pytest.mark.parametrize("sampler", [DDIM(steps=4, eta=0.7), EulerMaruyama(steps=4)])
def test_batches_are_images_alone_and_scans_are_loops(sampler):
    denoise = exact(sampler.schedule)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2)).astype(np.float32))
    keys = jax.random.split(jax.random.key(7), 3)
    whole, extras = sample(sampler, denoise, x, keys)
    assert extras == [0, 1, 2, 3]
    scanned, stacked = sample_scanned(sampler, denoise, x, keys)
    np.testing.assert_allclose(whole, scanned, rtol=1e-4, atol=1e-5)
    assert stacked.tolist() == extras
    alone, _ = sample(sampler, denoise, x[1:2], keys[1:2])
    np.testing.assert_allclose(alone[0], whole[1], rtol=1e-5, atol=1e-6)
    with pytest.raises(DyncompError, match="keys"):
        sample(sampler, denoise, x)


def test_frechet_distance():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 4)), 1 + rng.normal(size=(40, 4)) @ rng.normal(size=(4, 4))
    one, two = Moments.of(a), Moments.of(b)
    root = scipy.linalg.sqrtm(one.covariance @ two.covariance).real
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum()
    wanted += np.trace(one.covariance + two.covariance - 2 * root)
    np.testing.assert_allclose(frechet_distance(one, two), wanted, rtol=1e-6)
    assert abs(frechet_distance(one, one)) < 1e-9
    # Diagonal covariances: squared differences of means and of deviations. Here one of them is singular.
    flat = (
        Moments(np.zeros(2), np.diag([4.0, 0.0])),
        Moments(np.asarray([3.0, 0.0]), np.diag([1.0, 9.0])),
    )
    np.testing.assert_allclose(frechet_distance(*flat), 9 + 1 + 9, rtol=1e-9)
    with pytest.raises(DyncompError, match="give"):
        Moments.of(np.zeros((1, 3)))


def test_bad_options(unchecked):
    for make in (
        lambda: NoiseSchedule(kind="square"),
        lambda: DDIM(steps=0),
        lambda: DDIM(eta=-1.0),
        lambda: EulerMaruyama(last=0.0),
    ):
        with pytest.raises(DyncompError, match="use"):
            make()
