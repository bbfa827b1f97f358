"""Packed weights are the same weights, and decode in bfloat16 what the model says."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dyncomp import models
from dyncomp.core.dtypes import DTypes
from dyncomp.decoding import Generator, packing


def test_unpacking_gives_the_parameters_back(lm):
    params = models.unstack(nn.meta.unbox(lm[1]))["params"]
    packed = packing.pack(params)
    found = [
        leaf
        for leaf in jax.tree.leaves(packed, is_leaf=lambda x: isinstance(x, packing.Packed))
        if isinstance(leaf, packing.Packed)
    ]
    assert len(found) == 6 * 7 + 1  # q, k, v, out, gate, up, down of each block, and the head
    jax.tree.map(np.testing.assert_array_equal, packing.unpacked(packed), params)


def test_bfloat16_decodes_what_the_model_says(lm):
    model, variables, prompts = lm
    half = model.clone(dtypes=DTypes(param="bfloat16", compute="bfloat16"))
    own = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), nn.meta.unbox(variables))
    generator = Generator(half, own, keep_logits=True)
    apply = jax.jit(lambda tokens: models.apply(half, own, tokens)[0])
    for prompt, one in zip(prompts, generator.generate(prompts, 5), strict=True):
        want = apply(jnp.asarray([prompt + one.tokens]))[0, len(prompt) - 1 : -1]
        np.testing.assert_allclose(one.logits, want, atol=0.1)
