"""Self-ensembles of a small language model with sampled attention: means of probabilities, fresh draws, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dyncomp import models
from dyncomp.attention import Attention, RandomKeys, ShuffledWindows
from dyncomp.experts import SwiGLU

TOKENS = jax.random.randint(jax.random.key(3), (2, 16), 0, 11)


def make(sampler=functools.partial(ShuffledWindows, reduction=4, sigma=2.0), **options):
    mixer = functools.partial(Attention, heads=2, sampler=sampler)
    block = functools.partial(models.Block, mixer=mixer, ffn=functools.partial(SwiGLU, hidden=8))
    return models.DecoderLM(vocab_size=11, d_model=8, groups=[models.Group([block], 2)], **options)


@pytest.fixture(scope="module")
def variables():
    found = nn.unbox(jax.jit(make().init)(jax.random.key(0), TOKENS))
    keys = iter(jax.random.split(jax.random.key(1), 99))
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), found)


def test_the_mean_is_of_probabilities(variables):
    keys = jax.random.split(jax.random.key(4), 3)
    got, aux = jax.jit(functools.partial(models.self_ensemble, make()))(variables, TOKENS, keys)
    call = jax.jit(lambda key: models.apply(make(), variables, TOKENS, rngs={"dropout": key}))
    each = [call(key) for key in keys]
    logits = np.asarray([out for out, _ in each], np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(got, np.log(shares.mean(axis=0)), atol=1e-5)
    pairs = lambda a: int(np.sum(a.events["group_0"]["block_0"]["mixer"]["pairs"].needed))
    assert pairs(aux) == sum(pairs(one) for _, one in each)
    assert np.abs(logits[0] - logits[1]).max() > 0.01


def test_equal_seeds_are_one_pass(variables):
    keys = jax.random.split(jax.random.key(4), 1)
    one, _ = models.self_ensemble(make(), variables, TOKENS, keys)
    four, _ = models.self_ensemble(make(), variables, TOKENS, jnp.repeat(keys, 4, axis=0))
    np.testing.assert_allclose(four, one, atol=2e-6)


def test_losses_of_growing_ensembles():
    shares = np.random.default_rng(0).uniform(0.01, 1.0, (6, 3, 5))
    want = [-np.log(shares[: s + 1].mean(axis=0)) for s in range(6)]
    got = models.ensemble_nll(jnp.asarray(-np.log(shares), jnp.float32))
    np.testing.assert_allclose(got, want, atol=1e-5)
    # Jensen: never above the mean loss of its members.
    assert np.all(np.asarray(got[-1]) <= -np.log(shares).mean(axis=0) + 1e-6)


def test_layers_examples_and_steps_draw_their_own(variables):
    @jax.jit
    def tables(key):
        _, aux = models.apply(make(), variables, TOKENS, rngs={"dropout": key}, capture=("plan",))
        return aux.plans["group_0"]["block_0"]["mixer"]["sampled"].sets

    sets = np.asarray([tables(jax.random.key(step)) for step in (0, 1)])  # [step l b c w]
    assert len({row.tobytes() for row in sets.reshape(8, -1)}) == 8
    np.testing.assert_array_equal(sets[0], tables(jax.random.key(0)))


@pytest.mark.parametrize("layers", ["scan", "unroll"])
@pytest.mark.parametrize("sampler", [ShuffledWindows, RandomKeys])
def test_rematerialisation_draws_the_same(variables, layers, sampler):
    def grads(remat):
        model = make(sampler, layers=layers, remat=remat)

        def loss(variables):
            rngs = {"dropout": jax.random.key(7)}
            logits, _ = models.apply(model, variables, TOKENS, train=True, rngs=rngs)
            return jnp.mean(jax.nn.log_softmax(logits)[..., 0])

        return jax.jit(jax.grad(loss))(variables)

    for got, want in zip(*map(jax.tree.leaves, (grads("full"), grads("none"))), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_without_the_stream_it_is_dense(variables):
    plain, _ = models.apply(make(None), variables, TOKENS)
    np.testing.assert_array_equal(models.apply(make(), variables, TOKENS)[0], plain)


def test_the_future_changes_no_sampled_logits(variables):
    call = jax.jit(
        lambda tokens: models.apply(make(), variables, tokens, rngs={"dropout": jax.random.key(1)})[
            0
        ]
    )
    other = TOKENS.at[:, 9:].set((TOKENS[:, 9:] + 3) % 11)
    np.testing.assert_array_equal(call(TOKENS)[:, :9], call(other)[:, :9])
