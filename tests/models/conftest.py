"""A tiny ffn and tiny models, so that these tests need no other family."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dyncomp import models
from dyncomp.attention import Attention
from dyncomp.core.aux import Aux, count
from dyncomp.core.dtypes import DTypes
from dyncomp.core.ledger import Cost
from dyncomp.core.sharding import param
from dyncomp.models import Block, DecoderLM, Group, VisionTransformer


class TinyFFN(nn.Module):
    """silu(x gate) * (x up), then down; with a loss, a plan and a control to see them pass through."""

    hidden: int = 12
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(self, x, mask=None, train=False, capture=()):
        init, d = nn.initializers.lecun_normal(), x.shape[-1]
        weight = lambda name, shape, axes: param(self, name, init, shape, axes).astype(x.dtype)
        gate, up = (weight(n, (d, self.hidden), ("embed", "ffn")) for n in ("gate", "up"))
        down = weight("down", (self.hidden, d), ("ffn", "embed"))
        scale = self.variable("controls", "scale", lambda: jnp.ones((), jnp.float32))
        y = (jax.nn.silu(x @ gate) * (x @ up)) @ down * scale.value.astype(x.dtype)
        if self.has_rng("router") and train:
            y = y + jax.random.normal(self.make_rng("router"), y.shape, y.dtype)
        rows = x.shape[0] * x.shape[1]
        needed = rows if mask is None else jnp.sum(mask.astype(bool), dtype=jnp.int32)
        plans = {"mean": jnp.mean(y, axis=-1)} if "plan" in capture else {}
        loss = jnp.mean(jnp.square(y.astype(jnp.float32)))
        return y, Aux({"size": loss}, {"rows": count(needed, rows)}, plans)

    def cost(self, d_model):
        return {"rows": Cost(6 * d_model * self.hidden, 2 * d_model * 4)}


STATIC = ("train", "capture", "method", "mutable")


@functools.lru_cache
def compiled(model, static, index):
    """One compiled `models.apply` for each set of static arguments."""
    return jax.jit(
        lambda variables, args, kwargs: models.apply(
            model, variables, *index, *args, **kwargs, **dict(static)
        )
    )


def apply(model, variables, *args, **kwargs):
    """`models.apply` as one compiled call (eager ones compile every operation); a leading integer is static."""
    static = tuple((key, kwargs.pop(key)) for key in STATIC if key in kwargs)
    index = tuple(a for a in args if isinstance(a, int))
    return compiled(model, static, index)(variables, args[len(index) :], kwargs)


def init(model, inputs):
    """Random variables in the stored layout: no compilation, and no bias or scale left at 0 or 1."""
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), inputs))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if "controls" in str(path[0]):
            return jnp.ones(leaf.shape, leaf.dtype)
        centre = 1.0 if "scale" in str(path[-1]) else 0.0
        return jnp.asarray(centre + 0.3 * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="session")
def tiny():
    """Factories of tiny models: ``lm(**fields)`` and ``vit(**fields)``, and the parts they use."""
    causal = functools.partial(Attention, heads=4, kv_heads=2, rope_theta=100.0)
    full = functools.partial(Attention, heads=4, causal=False, rope_theta=None)
    block = functools.partial(Block, mixer=causal, ffn=TinyFFN)
    image_block = functools.partial(Block, mixer=full, ffn=TinyFFN, norm="layer")
    lm_fields = {
        "vocab_size": 11,
        "d_model": 16,
        "groups": [Group([block, block], 2), Group([block], 1)],
    }
    vit_fields = {"classes": 5, "patch": 2, "d_model": 16, "groups": [Group([image_block], 3)]}
    return SimpleNamespace(
        lm=lambda **fields: DecoderLM(**{**lm_fields, **fields}),
        vit=lambda **fields: VisionTransformer(**{**vit_fields, **fields}),
        block=block,
        ffn=TinyFFN,
        causal=causal,
        tokens=jax.random.randint(jax.random.key(0), (2, 7), 0, 11),
        images=jax.random.normal(jax.random.key(1), (3, 6, 4, 1)),
        init=init,
        apply=apply,
    )


@pytest.fixture(params=["scan", "unroll"])
def layers(request):
    """Both executions."""
    return request.param
