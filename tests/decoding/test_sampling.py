"""The sampler against filters spelled out in float64; what a row draws depends on nothing but its key and logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from dyncomp.core.errors import DyncompError
from dyncomp.decoding import Sampler

V = 8
RNG = np.random.default_rng(0)
quick = settings(deadline=None, derandomize=True, max_examples=40)
GRID = [
    {"temperature": 1.0},
    {"temperature": 0.5, "top_k": 3},
    {"temperature": 2.0, "top_p": 0.7},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 0.7, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
]
LAWS = [jax.jit(Sampler(**fields).probabilities) for fields in GRID]


@pytest.fixture(autouse=True)
def strictly(strict):
    """No implicit promotion anywhere in this file."""


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def filtered(row, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """Probabilities by the definition, one token at a time, float64."""
    z = np.asarray(row, np.float64) / temperature
    if top_k:
        z = np.where(z < np.sort(z)[::-1][top_k - 1], -np.inf, z)
    if top_p < 1:
        p, mass = softmax(z), 0.0
        kept = np.full(len(z), -np.inf)
        for token in sorted(range(len(z)), key=lambda i: -z[i]):
            if mass >= top_p:
                break
            kept[token] = z[token]
            mass += p[token]
        z = kept
    if min_p:
        p = softmax(z)
        z = np.where(p < min_p * p.max(), -np.inf, z)
    return softmax(z)


@quick
@given(st.integers(0, 10_000), st.sampled_from(range(len(GRID))))
def test_probabilities_are_the_filtered_softmax(seed, which):
    rows = np.random.default_rng(seed).normal(size=(3, V)).astype(np.float32) * 2
    ours = LAWS[which](jnp.asarray(rows))
    assert ours.dtype == jnp.float32
    wanted = [filtered(row, **GRID[which]) for row in rows]
    np.testing.assert_allclose(ours, wanted, atol=1e-6)


def test_ties():
    """Top-k keeps all that tie with the k-th; top-p breaks ties by index."""
    row = jnp.zeros((1, 4), jnp.float32)
    p = Sampler(temperature=1.0, top_k=2).probabilities(row)
    np.testing.assert_allclose(p, [[0.25] * 4], rtol=1e-6)
    p = Sampler(temperature=1.0, top_p=0.5).probabilities(row)
    np.testing.assert_allclose(p, [[0.5, 0.5, 0.0, 0.0]], rtol=1e-6)


def test_ends_of_the_filters():
    rows = jnp.asarray(RNG.normal(size=(4, V)), jnp.float32)
    plain = jax.nn.softmax(rows, axis=-1)
    for off in ({"top_k": V}, {"top_k": 100}, {"top_p": 1.0}, {"min_p": 0.0}):
        same = Sampler(temperature=1.0, **off).probabilities(rows)
        np.testing.assert_array_equal(same, plain)
    best = jax.nn.one_hot(jnp.argmax(rows, -1), V)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        np.testing.assert_allclose(Sampler(temperature=1.0, **narrow).probabilities(rows), best)


def test_greedy():
    rows = jnp.asarray([[0.0, 3.0, 3.0], [-jnp.inf, -5.0, -jnp.inf]], jnp.float32)
    greedy = Sampler()
    np.testing.assert_array_equal(greedy.probabilities(rows), [[0, 1, 0], [0, 1, 0]])
    tokens = greedy(jax.random.key(0), rows)
    assert tokens.tolist() == [1, 1] and tokens.dtype == jnp.int32


def test_samples_follow_the_probabilities_and_are_int32():
    row = jnp.asarray(RNG.normal(size=V), jnp.float32)
    n, sampler = 4000, Sampler(temperature=1.3, top_k=6, min_p=0.05)
    tokens = jax.jit(sampler)(jax.random.key(3), jnp.broadcast_to(row, (n, V)))
    assert tokens.dtype == jnp.int32
    p = np.asarray(sampler.probabilities(row[None])[0], np.float64)
    counts = np.bincount(tokens, minlength=V)
    assert (counts[p == 0] == 0).all() and (p == 0).any()
    live = p > 0
    statistic = ((counts[live] - n * p[live]) ** 2 / (n * p[live])).sum()
    assert statistic < chi2.ppf(0.9999, live.sum() - 1)


def test_a_row_does_not_depend_on_the_batch():
    rows = jnp.asarray(RNG.normal(size=(6, V)), jnp.float32)
    sampler, key = Sampler(temperature=1.0, top_p=0.95), jax.random.key(1)
    whole = sampler(key, rows)
    np.testing.assert_array_equal(sampler(key, rows[:2]), whole[:2])
    changed = sampler(key, rows.at[3:].set(0.0))
    np.testing.assert_array_equal(changed[:3], whole[:3])
    keys, order = jax.random.split(key, 6), RNG.permutation(6)
    np.testing.assert_array_equal(sampler(keys[order], rows[order]), sampler(keys, rows)[order])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"min_p": -0.1}, "min_p=-0.1"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(DyncompError, match=message):
        Sampler(**fields)


def test_samplers_are_hashable():
    assert hash(Sampler(top_k=3)) == hash(Sampler(top_k=3)) and Sampler() != Sampler(top_k=3)
