"""What routers hand up over depth: the same scanned, unrolled and layer by layer."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp import attention, experts, models, routers
from dyncomp.core.errors import DyncompError

E, D = 4, 8
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, 6)), jnp.int32)


def language_model(router, layers="scan", dense_between=False, **options):
    mixer = functools.partial(attention.Attention, heads=2)
    moe = functools.partial(experts.MoE, router=router, num_experts=E, hidden=8, **options)
    block = functools.partial(models.Block, mixer=mixer, ffn=moe)
    dense = functools.partial(
        models.Block, mixer=mixer, ffn=functools.partial(experts.SwiGLU, hidden=8)
    )
    blocks = [block, dense] if dense_between else [block]
    return models.DecoderLM(
        vocab_size=16, d_model=D, groups=[models.Group(blocks, 3)], layers=layers
    )


@pytest.mark.parametrize("dense_between", [False, True])
def test_scan_and_unrolled_hand_up_the_same(dense_between):
    router = functools.partial(routers.TopK, k=2, residual=True)
    scanned = language_model(router, dense_between=dense_between)
    variables = nn.unbox(jax.jit(scanned.init)(jax.random.key(0), TOKENS))
    unrolled = language_model(router, "unroll", dense_between)
    ours, aux = models.apply(scanned, variables, TOKENS)
    np.testing.assert_allclose(ours, models.apply(unrolled, variables, TOKENS)[0], atol=1e-5)
    assert aux.below == {}
    # Without the residual's weights in the second layer its routing changes: the logits did arrive.
    kernel = variables["params"]["group_0"]["layers"]["block_0"]["ffn"]["router"]["residual"]
    kernel["kernel"] = kernel["kernel"] * 200
    assert not np.allclose(models.apply(scanned, variables, TOKENS)[0], ours, atol=1e-5)


def test_the_first_layer_gets_zeros():
    router = functools.partial(routers.TopK, k=2, residual=True)
    net = language_model(router, free=("copy", "zero"))
    variables = nn.unbox(jax.jit(net.init)(jax.random.key(0), TOKENS))
    before, _ = models.apply(net, variables, TOKENS)
    kernel = variables["params"]["group_0"]["layers"]["block_0"]["ffn"]["router"]["residual"]
    kernel["kernel"] = kernel["kernel"].at[0].multiply(1e3)
    np.testing.assert_array_equal(before, models.apply(net, variables, TOKENS)[0])


def test_hash_routers_see_the_tokens():
    net = language_model(functools.partial(routers.Hash, k=1))
    variables = nn.unbox(jax.jit(net.init)(jax.random.key(0), TOKENS))
    _, aux = models.apply(net, variables, TOKENS, capture=("plan",))
    experts_of = np.asarray(aux.plans["group_0"]["block_0"]["ffn"]["route"].experts)[..., 0]
    flat = np.asarray(TOKENS).ravel()
    for layer in experts_of:
        for token in set(flat):
            assert len(set(layer[flat == token])) == 1
    assert (experts_of[0] != experts_of[1]).any()  # every layer has a salt of its own


def test_images_have_no_tokens_to_hash():
    moe = functools.partial(experts.MoE, router=routers.Hash, num_experts=E, hidden=8)
    mixer = functools.partial(attention.Attention, heads=2, causal=False, rope_theta=None)
    block = functools.partial(models.Block, mixer=mixer, ffn=moe)
    net = models.VisionTransformer(classes=3, patch=4, d_model=D, groups=[models.Group([block], 2)])
    with pytest.raises(DyncompError, match="no token ids"):
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
