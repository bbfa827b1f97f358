"""Each way of choosing keys, on the real SmolLM2: a wrong index loses the pass key, which no test of shapes sees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp import models, pretrained
from dyncomp.attention import (
    AShape,
    Assigned,
    ClusterSelection,
    SinkWindow,
    TokenSelection,
    VerticalSlash,
)
from dyncomp.tasks.long_text import draw, passkey

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not pretrained.smollm2(), reason="DYNCOMP_SMOLLM2 is not set"),
]

LENGTH = 1000
LINES = functools.partial(VerticalSlash, vertical=128, slash=256)
PATTERNS = {
    "vertical_slash": (LINES, 0.3),
    "assigned": (functools.partial(Assigned, (VerticalSlash(128, 256),)), 0.3),
    "a_shape": (functools.partial(AShape, window=256, sink=64), None),
}
"""Nats a token of the key at most; None where it lies outside of what is read. (Means of blocks lose it by nature.)"""
POLICIES = {
    "token_selection": (functools.partial(TokenSelection, sink=16, top=240, local=64), 0.5),
    "cluster_selection": (ClusterSelection, 1.5),
    "sink_window": (functools.partial(SinkWindow, sink=4, window=316), None),
}
LOST = 2.0
"""More than guessing digits without the key costs (ln 10 and a little, less what the first digits' form tells)."""


@pytest.fixture(scope="module")
def model():
    loaded = pretrained.load(pretrained.smollm2())
    rng = np.random.default_rng(0)
    filler = draw(loaded.tokenizer, "prose", LENGTH, rng)
    ids, answer = passkey(loaded.tokenizer, filler, LENGTH, rng)
    return loaded.model.clone(layers="scan"), loaded.variables, ids, answer


def nats(logits, ids):
    found = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -float(jnp.mean(found[jnp.arange(len(ids)), jnp.asarray(ids)]))


def check(found, most):
    assert found > LOST if most is None else found < most


@pytest.mark.parametrize("name", PATTERNS)
def test_prefill_finds_the_key_where_the_pattern_reads_it(model, name):
    base, variables, ids, answer = model
    pattern, most = PATTERNS[name]
    own = models.with_mixer(base, pattern=pattern)
    logits, _ = jax.jit(own.apply)(variables, jnp.asarray([ids]))
    check(nats(logits[0, -answer - 1 : -1], ids[-answer:]), most)


@pytest.mark.parametrize("name", POLICIES)
def test_decoding_finds_the_key_where_the_policy_keeps_it(model, name):
    base, variables, ids, answer = model
    cache, most = POLICIES[name]
    own = models.with_mixer(base, cache=cache)

    @jax.jit
    def step(tokens, cache):
        logits, aux = own.apply(variables, tokens, cache=cache)
        return logits[:, -1], aux.cache

    logits, state = step(jnp.asarray([ids[:-answer]]), own.init_cache(1, LENGTH + 24))
    found = [logits]
    for token in ids[-answer:-1]:
        logits, state = step(jnp.asarray([[token]]), state)
        found.append(logits)
    check(nats(jnp.concatenate(found), ids[-answer:]), most)
