"""The pyramid against published counts and its own ledger; dense prediction of a vision transformer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dyncomp import config
from dyncomp.attention import BiLevelRouting
from dyncomp.core.aux import flatten
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Ledger
from dyncomp.models import ConvBlock, Group, Level, Pyramid
from dyncomp.parallel.counts import executed_at_most


def small(tiny, **fields):
    mixer = functools.partial(BiLevelRouting, heads=2, regions=2, top=2)
    block = functools.partial(ConvBlock, mixer=mixer, ffn=tiny.ffn, norm="layer")
    full = functools.partial(block, mixer=functools.partial(mixer, top=None))
    levels = [Level(8, Group([block], 2)), Level(12, Group([full]))]
    return Pyramid(classes=5, levels=levels, **fields)


def test_the_published_variant_has_the_published_size():
    """BiFormer-S: 25.5 M parameters, 4.5 G multiply-adds at 224 pixels (paper, table 2)."""
    model = config.load("biformer_paper").model
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
    variables = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), images))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables))
    prices, counts = flatten(model.cost(images.shape)), executed_at_most(model, variables, images)
    flops = sum(prices[path].flops * (counts[path] or 0) for path in counts)
    assert round(parameters / 1e6, 1) == 25.5 and round(flops / 2e9, 1) == 4.5


def test_scan_and_unroll_agree_and_the_ledger_counts(tiny):
    x = jax.random.normal(jax.random.key(2), (3, 16, 16, 1))
    model = small(tiny)
    variables = tiny.init(model, x)
    mask = jnp.asarray([1.0, 1.0, 0.0])
    logits, aux = tiny.apply(model, variables, x, mask=mask)
    other, _ = tiny.apply(small(tiny, layers="unroll"), variables, x[:2])
    np.testing.assert_allclose(logits[:2], other, rtol=1e-5, atol=1e-5)
    ledger = Ledger(model.cost(x.shape)).record(aux.events)
    pairs = ledger.total("needed", under="group_0/block_0/mixer/pairs")
    assert pairs == 2 * 2 * (16 * 8) * 4 * 8  # images, blocks, pairs, FLOPs of a pair
    assert ledger.total("needed", under="group_1/block_0/mixer/pairs") == 2 * 16 * 4 * 12
    assert ledger.total("needed", under="stem") == 2 * 2 * 9 * (64 * 4 + 16 * 4 * 8)
    assert 3 * ledger.total("needed", under="head") == 2 * ledger.total("executed", under="head")


def test_the_position_convolution_is_added_first(tiny):
    x = jax.random.normal(jax.random.key(3), (1, 16, 8))
    full = functools.partial(BiLevelRouting, heads=2, regions=1, top=None)
    block = ConvBlock(mixer=full, ffn=tiny.ffn, norm="layer")
    variables = tiny.init(block, x)
    y, _ = block.apply(variables, x)
    kernel, bias = (np.asarray(variables["params"]["position"][n]) for n in ("kernel", "bias"))
    wide = np.pad(np.asarray(x).reshape(4, 4, 8), ((1, 1), (1, 1), (0, 0)))
    moved = sum(wide[i : i + 4, j : j + 4] * kernel[i, j] for i in range(3) for j in range(3))
    off = {
        **variables["params"],
        "position": jax.tree.map(jnp.zeros_like, variables["params"]["position"]),
    }
    shifted = x + (moved + bias).reshape(1, 16, 8)
    without, _ = block.apply({**variables, "params": off}, shifted)
    np.testing.assert_allclose(y, without, rtol=1e-5, atol=1e-5)


def test_every_token_is_classified(tiny):
    dense, mean = tiny.vit(pool="tokens"), tiny.vit(pool="mean")
    variables = tiny.init(dense, tiny.images)
    logits, aux = tiny.apply(dense, variables, tiny.images)
    assert logits.shape == (3, 6, 5)
    ledger = Ledger(dense.cost(tiny.images.shape)).record(aux.events)
    assert ledger.total(under="head") == 3 * 6 * 2 * 16 * 5
    pooled, _ = tiny.apply(mean, variables, tiny.images)
    np.testing.assert_allclose(logits.mean(axis=1), pooled, rtol=1e-5, atol=1e-5)
    with pytest.raises(DyncompError, match="needs pool='cls' or 'mean'"):
        jax.eval_shape(functools.partial(dense.apply, method="features"), variables, tiny.images)


def test_no_levels_are_refused():
    with pytest.raises(DyncompError, match="at least one Level"):
        Pyramid(classes=2, levels=[])
