"""models.VisionTransformer against transformers' ViTForImageClassification.

Ours is pre-norm with a class token and biases everywhere, like theirs. The one difference is GELU: `experts.MLP` uses
the tanh form, transformers' default ``hidden_act="gelu"`` is the exact one; ``"gelu_pytorch_tanh"`` is the same form.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dyncomp import models
from dyncomp.attention import Attention
from dyncomp.experts import MLP
from dyncomp.models import Block, Group, VisionTransformer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peers

CLASSES, PATCH, D, F, LAYERS, HEADS, EPS = 5, 4, 32, 48, 3, 4, 1e-6
RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(
    RNG.normal(size=(3, 8, 12, 3)), jnp.float32
)  # not square: no axis can be swapped
LABELS = jnp.asarray([4, 0, 2], jnp.int32)


def make_theirs(peer, activation="gelu_pytorch_tanh"):
    config = transformers.ViTConfig(
        hidden_size=D,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=F,
        hidden_act=activation,
        layer_norm_eps=EPS,
        image_size=IMAGES.shape[1:3],
        patch_size=PATCH,
        num_channels=3,
        num_labels=CLASSES,
    )
    config._attn_implementation = "eager"
    return peer.randomize(transformers.ViTForImageClassification(config))


def make_ours(layers):
    mixer = functools.partial(Attention, heads=HEADS, causal=False, rope_theta=None, bias=True)
    ffn = functools.partial(MLP, hidden=F, activation="gelu")
    block = functools.partial(Block, mixer=mixer, ffn=ffn, norm="layer", eps=EPS)
    groups = [Group([block], LAYERS)]
    return VisionTransformer(
        classes=CLASSES, patch=PATCH, d_model=D, groups=groups, layers=layers, eps=EPS
    )


def convert(tensors):
    """Their parameters, or gradients, by name -> our stacked tree."""
    each = lambda name: jnp.stack([tensors[f"vit.layers.{i}.{name}"] for i in range(LAYERS)])
    norm = lambda name: {"scale": each(f"{name}.weight"), "bias": each(f"{name}.bias")}
    mixer = {}
    for name in ("q", "k", "v"):
        weight = each(f"attention.{name}_proj.weight").reshape(LAYERS, HEADS, -1, D)
        mixer[name] = weight.transpose(0, 3, 1, 2)
        mixer[f"{name}_bias"] = each(f"attention.{name}_proj.bias").reshape(LAYERS, HEADS, -1)
    out = each("attention.o_proj.weight").reshape(LAYERS, D, HEADS, -1)
    mixer |= {"out": out.transpose(0, 2, 3, 1), "out_bias": each("attention.o_proj.bias")}
    ffn = {
        "up": each("mlp.fc1.weight").transpose(0, 2, 1),
        "up_bias": each("mlp.fc1.bias"),
        "down": each("mlp.fc2.weight").transpose(0, 2, 1),
        "down_bias": each("mlp.fc2.bias"),
    }
    block = {"mixer_norm": norm("layernorm_before"), "mixer": mixer}
    block |= {"ffn_norm": norm("layernorm_after"), "ffn": ffn}
    embed = "vit.embeddings."
    conv = tensors[f"{embed}patch_embeddings.projection.weight"]  # [d c row column]
    return {
        "patches": {
            "kernel": conv.transpose(2, 3, 1, 0).reshape(-1, D),
            "bias": tensors[f"{embed}patch_embeddings.projection.bias"],
            "cls": tensors[f"{embed}cls_token"][0, 0],
            "positions": tensors[f"{embed}position_embeddings"][0],
        },
        "group_0": {"layers": {"block_0": block}},
        "final_norm": {
            "scale": tensors["vit.layernorm.weight"],
            "bias": tensors["vit.layernorm.bias"],
        },
        "head": {"kernel": tensors["classifier.weight"].T, "bias": tensors["classifier.bias"]},
    }


@pytest.fixture(scope="module")
def pair(peer):
    """Both networks with the same weights, and the images as theirs wants them."""
    theirs = make_theirs(peer)
    params = convert({name: peer.array(p) for name, p in theirs.named_parameters()})
    pixels = torch.from_numpy(np.array(IMAGES)).permute(0, 3, 1, 2)
    return SimpleNamespace(theirs=theirs, params=params, pixels=pixels, peer=peer)


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_logits(pair, layers):
    apply = jax.jit(functools.partial(models.apply, make_ours(layers)))
    logits, _ = apply({"params": pair.params}, IMAGES)
    pair.peer.close(logits, pair.peer.array(pair.theirs(pair.pixels).logits))


def test_features_of_every_block(pair):
    """Theirs: the final norm on the class token of each hidden state (what an exit head reads)."""
    model = make_ours("scan")
    features, _ = model.apply({"params": pair.params}, IMAGES, method="features")
    with torch.no_grad():
        hidden = pair.theirs(pair.pixels, output_hidden_states=True).hidden_states[1:]
        expected = torch.stack([pair.theirs.vit.layernorm(h)[:, 0] for h in hidden])
    assert len(hidden) == LAYERS
    pair.peer.close(features, pair.peer.array(expected))


def test_gradients_of_the_loss(pair):
    model = make_ours("scan")

    def loss_fn(params):
        logits, _ = model.apply({"params": params}, IMAGES)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, LABELS))

    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(pair.params)
    labels = torch.from_numpy(np.array(LABELS)).long()
    theirs = torch.nn.functional.cross_entropy(pair.theirs(pair.pixels).logits, labels)
    names, parameters = zip(*pair.theirs.named_parameters(), strict=True)
    by_name = dict(zip(names, torch.autograd.grad(theirs, parameters), strict=True))
    pair.peer.close(loss, pair.peer.array(theirs))
    pair.peer.close(grads, convert({name: pair.peer.array(g) for name, g in by_name.items()}))


def test_the_two_gelus_differ_but_little(pair):
    """The tolerance above tells them apart: parity is with the tanh form and no other."""
    exact = make_theirs(pair.peer, "gelu")(pair.pixels).logits
    gap = float((exact - pair.theirs(pair.pixels).logits).detach().abs().max())
    assert 1e-4 < gap < 0.05
