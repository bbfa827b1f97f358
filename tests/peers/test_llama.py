"""models.DecoderLM against transformers' LlamaForCausalLM: RoPE, grouped queries, SwiGLU, RMSNorm, cache."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dyncomp import models
from dyncomp.attention import Attention
from dyncomp.experts import SwiGLU
from dyncomp.models import Block, DecoderLM, Group

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peers

V, D, F, LAYERS, HEADS, KV, EPS, THETA = 61, 32, 48, 3, 4, 2, 1e-5, 5000.0
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, V, (3, 11)), jnp.int32)


def make_theirs(peer, tie):
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV,
        rms_norm_eps=EPS,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=tie,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,  # so that generation never stops early
    )
    config._attn_implementation = "eager"
    return peer.randomize(transformers.LlamaForCausalLM(config))


def make_ours(tie, layers):
    block = functools.partial(
        Block,
        mixer=functools.partial(Attention, heads=HEADS, kv_heads=KV, rope_theta=THETA),
        ffn=functools.partial(SwiGLU, hidden=F),
        eps=EPS,
    )
    return DecoderLM(
        vocab_size=V,
        d_model=D,
        groups=[Group([block], LAYERS)],
        layers=layers,
        tie_embeddings=tie,
        eps=EPS,
    )


def convert(tensors, tie):
    """Their parameters, or gradients, by name -> our stacked tree."""
    get = lambda name: tensors[name]
    each = lambda name: jnp.stack([get(f"model.layers.{i}.{name}.weight") for i in range(LAYERS)])
    heads = lambda name: each(f"self_attn.{name}").reshape(LAYERS, -1, D // HEADS, D)
    out = each("self_attn.o_proj").reshape(LAYERS, D, HEADS, D // HEADS)
    block = {
        "mixer_norm": {"scale": each("input_layernorm")},
        "mixer": {
            **{n: heads(f"{n}_proj").transpose(0, 3, 1, 2) for n in ("q", "k", "v")},
            "out": out.transpose(0, 2, 3, 1),
        },
        "ffn_norm": {"scale": each("post_attention_layernorm")},
        "ffn": {n: each(f"mlp.{n}_proj").transpose(0, 2, 1) for n in ("gate", "up", "down")},
    }
    head = {} if tie else {"head": get("lm_head.weight").T}
    return {
        "embed": get("model.embed_tokens.weight"),
        "group_0": {"layers": {"block_0": block}},
        "final_norm": {"scale": get("model.norm.weight")},
        **head,
    }


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def pair(peer, request):
    """Both networks with the same weights."""
    tie = request.param
    theirs = make_theirs(peer, tie)
    weights = {name: peer.array(p) for name, p in theirs.named_parameters()}
    variables = {"params": convert(weights, tie)}
    return SimpleNamespace(theirs=theirs, variables=variables, tie=tie, peer=peer)


@functools.lru_cache
def compiled(tie, layers):
    model = make_ours(tie, layers)
    return model, jax.jit(functools.partial(models.apply, model))


def long(tokens):
    return torch.from_numpy(np.array(tokens)).long()


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_logits(pair, layers):
    _, apply = compiled(pair.tie, layers)
    logits, _ = apply(pair.variables, TOKENS)
    theirs = pair.theirs(long(TOKENS)).logits
    assert float(theirs.detach().std()) > 0.5  # something to compare
    pair.peer.close(logits, pair.peer.array(theirs))


def test_gradients_of_the_loss(pair):
    model = make_ours(pair.tie, "scan")

    def loss_fn(params):
        logits, _ = model.apply({"params": params}, TOKENS[:, :-1])
        ce = optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:])
        return jnp.mean(ce)

    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(pair.variables["params"])
    theirs = pair.theirs(long(TOKENS), labels=long(TOKENS)).loss
    theirs.backward()
    pair.peer.close(loss, pair.peer.array(theirs))
    by_name = {name: pair.peer.array(p.grad) for name, p in pair.theirs.named_parameters()}
    pair.peer.close(grads, convert(by_name, pair.tie))


def test_left_padding_is_never_seen(pair):
    mask = np.ones(TOKENS.shape, np.int32)
    mask[0, :4], mask[2, :1] = 0, 0
    _, apply = compiled(pair.tie, "scan")
    logits, _ = apply(pair.variables, TOKENS, jnp.asarray(mask, jnp.float32))
    theirs = pair.theirs(long(TOKENS), attention_mask=long(mask)).logits
    real = mask.astype(bool)
    pair.peer.close(np.asarray(logits)[real], np.asarray(pair.peer.array(theirs))[real])


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_cached_decode(pair, layers):
    """Prefill of six tokens, then one at a time: the logits of every step."""
    model, apply = compiled(pair.tie, layers)
    cache, past, start = model.init_cache(len(TOKENS), TOKENS.shape[1]), None, 0
    for stop in (6, *range(7, TOKENS.shape[1] + 1)):
        part = TOKENS[:, start:stop]
        logits, aux = apply(pair.variables, part, cache=cache)
        out = pair.theirs(long(part), past_key_values=past, use_cache=True)
        pair.peer.close(logits, pair.peer.array(out.logits))
        cache, past, start = aux.cache, out.past_key_values, stop


def test_greedy_tokens(pair):
    prompt, steps = TOKENS[:, :5], 16
    model, apply = compiled(pair.tie, "unroll")
    cache, part, tokens = model.init_cache(len(prompt), 5 + steps), prompt, []
    for _ in range(steps):
        logits, aux = apply(pair.variables, part, cache=cache)
        part, cache = jnp.argmax(logits[:, -1:], axis=-1).astype(jnp.int32), aux.cache
        tokens.append(part)
    theirs = pair.theirs.generate(long(prompt), do_sample=False, max_new_tokens=steps)
    np.testing.assert_array_equal(np.concatenate(tokens, axis=1), theirs[:, 5:].numpy())
    assert len(np.unique(tokens)) > len(prompt)  # more than one token over and over
