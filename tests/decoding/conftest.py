"""A small language model for the decode loop."""

import functools

import jax
import jax.numpy as jnp
import pytest

from dyncomp.attention import Attention
from dyncomp.experts import SwiGLU
from dyncomp.models import Block, DecoderLM, Group

PROMPTS = [[1, 2, 3], [5, 6, 7, 8, 9, 10], [4]]


@pytest.fixture(scope="session")
def lm():
    """(model, variables, prompts); weights are large enough that logits differ clearly."""
    mixer = functools.partial(Attention, heads=4, kv_heads=2)
    block = functools.partial(Block, mixer=mixer, ffn=functools.partial(SwiGLU, hidden=48))
    model = DecoderLM(vocab_size=61, d_model=32, groups=[Group([block], 6)])
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    return model, variables, PROMPTS


@pytest.fixture(scope="session")
def make_lm(lm):
    """``make(layers, seed, vocab_size)``: (model, variables) like ``lm``, of another depth."""

    def make(layers, seed, vocab_size=61):
        group = Group(lm[0].groups[0].blocks, layers)
        model = lm[0].clone(groups=(group,), vocab_size=vocab_size)
        return model, jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))

    return make
