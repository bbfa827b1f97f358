"""Kept layers in batches, at what price, and what the caches of skipped layers matter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp import depth, models
from dyncomp.decoding import Generator, KeepLayers

NEW, KEPT = 5, (0, 3, 5)


@pytest.fixture(scope="module")
def generator(lm):
    return Generator(*lm[:2], KeepLayers(KEPT), keep_logits=True)


def test_a_padded_batch_keeps_as_single_runs_do(lm, generator):
    batch = generator.generate(lm[2], NEW)
    for prompt, one in zip(lm[2], batch, strict=True):
        (alone,) = generator.generate([prompt], NEW)
        assert alone.tokens == one.tokens
        np.testing.assert_allclose(alone.logits, one.logits, atol=1e-5)


def test_every_sample_costs_the_same_known_price(generator):
    """n blocks over the tokens so far and the head, by hand; whatever the tokens are."""
    d, v, hidden, h, g, p = 32, 61, 48, 4, 2, 8
    weights = len(KEPT) * (d * p * (2 * h + 2 * g) + 3 * d * hidden) + d * v
    for prompt in ([1, 2, 3, 4], [9, 9, 9, 9], [60, 0, 17, 30]):
        generator.generate([prompt], NEW)
        seen = sum(len(prompt) + step + 1 for step in range(NEW - 1))
        wanted = 2 * weights * (NEW - 1) + len(KEPT) * 4 * h * p * seen
        assert generator.ledger.total("needed") == wanted
        mixer = "group_0/block_0/mixer/pairs"
        assert generator.ledger.events(under=mixer) * 6 == len(KEPT) * 6 * seen


def test_caches_of_skipped_layers_are_never_read(lm, generator):
    """NaN in them changes no bit of what follows the prompt, and no other layer's cache."""
    tokens, mask = jnp.asarray([lm[2][1]]), jnp.ones((1, 6), bool)
    key = jax.random.key(0)
    decoding, *_ = generator._prefill(generator.variables, tokens, mask, 16, None, key)
    caches = models.layer_caches(decoding.cache)
    spoil = lambda x: jnp.full_like(x, jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x
    spoilt = [c if i in KEPT else jax.tree.map(spoil, c) for i, c in enumerate(caches)]
    other = decoding.replace(cache=models.with_layer_caches(decoding.cache, spoilt))
    step = jax.jit(functools.partial(generator._decode_step, generator.variables))
    for _ in range(3):
        decoding, told, _ = step(decoding, None, key)
        other, changed, _ = step(other, None, key)
        np.testing.assert_array_equal(told["logits"], changed["logits"])
    ours, theirs = (models.layer_caches(one.cache) for one in (decoding, other))
    for index in KEPT:
        assert_same(ours[index], theirs[index])
    for index in set(range(6)) - set(KEPT):  # as the prompt left them
        assert_same(ours[index], caches[index])


def assert_same(one, other):
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_first_token_comes_from_full_depth(lm):
    sets = [depth.layer_set(rule, 6, 2) for rule in ("even", "bottom", "top")]
    assert len(set(sets)) == 3
    first = [
        Generator(*lm[:2], KeepLayers(kept), keep_logits=True).generate(lm[2][:1], 1)[0].logits
        for kept in sets
    ]
    for other in first[1:]:
        np.testing.assert_array_equal(first[0], other)
