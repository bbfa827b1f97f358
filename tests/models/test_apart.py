"""Blocks with factories of their own: the same model, and other mixers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp import models
from dyncomp.attention import AShape, Attention
from dyncomp.core.errors import DyncompError
from dyncomp.experts import SwiGLU
from dyncomp.models import Block, DecoderLM, Group, apart, with_mixers

mixer = functools.partial(Attention, heads=2)
block = functools.partial(Block, mixer=mixer, ffn=functools.partial(SwiGLU, hidden=12))
MODEL = DecoderLM(vocab_size=13, d_model=8, groups=[Group([block, block], 2), Group([block], 1)])
TOKENS = jnp.asarray([[1, 5, 2, 9, 0, 3]], jnp.int32)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(MODEL.init)(jax.random.key(0), TOKENS)


def logits(model, variables):
    return jax.jit(functools.partial(models.apply, model))(variables, TOKENS)[0]


def test_the_same_numbers(variables):
    model, own = apart(MODEL, variables)
    assert [len(group.blocks) for group in model.groups] == [4, 1]
    np.testing.assert_array_equal(logits(model, own), logits(MODEL, variables))
    again = apart(MODEL, models.unstack(variables))[1]
    jax.tree.map(np.testing.assert_array_equal, own, again)


def test_each_block_has_its_mixer(variables):
    model, own = apart(MODEL, variables)
    narrow = functools.partial(AShape, window=1, tile=2)
    whole = with_mixers(model, [{}] * 5)
    np.testing.assert_array_equal(logits(whole, own), logits(MODEL, variables))
    found = [
        logits(with_mixers(model, [{"pattern": narrow} if i == j else {} for i in range(5)]), own)
        for j in range(5)
    ]
    assert len({np.asarray(one).tobytes() for one in found}) == 5


def test_what_cannot_be_told_apart_is_refused():
    with pytest.raises(DyncompError, match="apart"):
        with_mixers(MODEL, [{}] * 3)
