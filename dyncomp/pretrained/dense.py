"""Architectures whose every token takes the whole network: Llama, Mistral, Qwen2, Qwen3, GPT-2."""

import dataclasses
from typing import Any

from dyncomp.core.errors import DyncompError
from dyncomp.pretrained.fields import Fields
from dyncomp.pretrained.layout import Entry
from dyncomp.pretrained.spec import Layer, Spec
from dyncomp.pretrained.tables import (
    LLAMA,
    Architecture,
    depth,
    read_attention,
    read_whole,
    write_whole,
)


def _read_llama(fields: Fields) -> Spec:
    fields.only("mlp_bias", False)
    bias = fields.get("attention_bias", bool, False)
    attention = read_attention(fields, qkv_bias=bias, out_bias=bias)
    layer = Layer(hidden=fields.count("intermediate_size"), **attention)
    return read_whole(fields, [layer] * depth(fields))


def _write_llama(spec: Spec) -> dict[str, Any]:
    return write_whole(spec, attention_bias=spec.layers[0].out_bias, mlp_bias=False)


def _read_mistral(fields: Fields) -> Spec:
    fields.only("layer_types", None)
    fields.count("num_key_value_heads")  # transformers' default is a number, not that of the heads
    attention = read_attention(fields, window=mistral_window(fields, 4096))
    layer = Layer(hidden=fields.count("intermediate_size"), **attention)
    return read_whole(fields, [layer] * depth(fields))


def mistral_window(fields: Fields, default: int | None) -> int | None:
    """A window for all layers: null says none, and only a missing key means the default."""
    return fields.count("sliding_window", None if "sliding_window" in fields.values else default)


def _write_mistral(spec: Spec) -> dict[str, Any]:
    return write_whole(spec, sliding_window=spec.layers[0].window)


def _windows(fields: Fields, layers: list[Layer]) -> list[Layer]:
    """Qwen's windows: by a list of layer types, else for the layers from ``max_window_layers`` on."""
    types = fields.get("layer_types", list, None)
    if not fields.get("use_sliding_window", bool, False):
        return layers
    if types is None:
        first = fields.get("max_window_layers", int, 28)
        types = [
            "sliding_attention" if i >= first else "full_attention" for i in range(len(layers))
        ]
    known = {"full_attention": None, "sliding_attention": fields.count("sliding_window", 4096)}
    if len(types) != len(layers) or not all(isinstance(t, str) and t in known for t in types):
        raise DyncompError(
            f"{fields.where}: layer_types must be full_attention or sliding_attention for each of {len(layers)} layers"
        )
    pairs = zip(layers, types, strict=True)
    return [dataclasses.replace(layer, window=known[kind]) for layer, kind in pairs]


def _write_windows(spec: Spec) -> dict[str, Any]:
    windows = [layer.window for layer in spec.layers]
    if not any(windows):
        return {"use_sliding_window": False}
    types = ["sliding_attention" if window else "full_attention" for window in windows]
    size = max(window or 0 for window in windows)
    first = types.index("sliding_attention")
    said = {"use_sliding_window": True, "sliding_window": size, "max_window_layers": first}
    return {**said, "layer_types": types}


def _read_qwen2(fields: Fields) -> Spec:
    fields.count("num_key_value_heads")
    attention = read_attention(fields, qkv_bias=True)
    layer = Layer(hidden=fields.count("intermediate_size"), **attention)
    return read_whole(fields, _windows(fields, [layer] * depth(fields)))


def _write_qwen2(spec: Spec) -> dict[str, Any]:
    return write_whole(spec, **_write_windows(spec))


def _read_qwen3(fields: Fields) -> Spec:
    fields.count("num_key_value_heads")
    fields.count("head_dim")
    bias = fields.get("attention_bias", bool, False)
    attention = read_attention(fields, qkv_bias=bias, out_bias=bias, qk_norm=True)
    layer = Layer(hidden=fields.count("intermediate_size"), **attention)
    return read_whole(fields, _windows(fields, [layer] * depth(fields)))


def _write_qwen3(spec: Spec) -> dict[str, Any]:
    bias = spec.layers[0].out_bias
    return write_whole(spec, attention_bias=bias, **_write_windows(spec))


GPT2_BLOCK = "transformer.h.{i}."
GPT2 = (
    Entry("embed", "transformer.wte.weight", "v d -> v d"),
    Entry("positions", "transformer.wpe.weight", "t d -> t d"),
    Entry("head", "lm_head.weight", "v d -> d v"),
    *(
        Entry(f"{ours}/{n}", f"{theirs}.{end}", "d -> d")
        for ours, theirs in (
            ("final_norm", "transformer.ln_f"),
            ("mixer_norm", GPT2_BLOCK + "ln_1"),
            ("ffn_norm", GPT2_BLOCK + "ln_2"),
        )
        for n, end in (("scale", "weight"), ("bias", "bias"))
    ),
    *(
        Entry(f"mixer/{n}", GPT2_BLOCK + "attn.c_attn.weight", "d (3 h p) -> d h p", part)
        for part, n in enumerate(("q", "k", "v"))
    ),
    *(
        Entry(f"mixer/{n}_bias", GPT2_BLOCK + "attn.c_attn.bias", "(3 h p) -> h p", part)
        for part, n in enumerate(("q", "k", "v"))
    ),
    Entry("mixer/out", GPT2_BLOCK + "attn.c_proj.weight", "(h p) d -> h p d"),
    Entry("mixer/out_bias", GPT2_BLOCK + "attn.c_proj.bias", "d -> d"),
    Entry("ffn/up", GPT2_BLOCK + "mlp.c_fc.weight", "d f -> d f"),
    Entry("ffn/up_bias", GPT2_BLOCK + "mlp.c_fc.bias", "f -> f"),
    Entry("ffn/down", GPT2_BLOCK + "mlp.c_proj.weight", "f d -> f d"),
    Entry("ffn/down_bias", GPT2_BLOCK + "mlp.c_proj.bias", "d -> d"),
)
_GELU = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu": "relu", "silu": "silu"}


def _read_gpt2(fields: Fields) -> Spec:
    fields.only("activation_function", *_GELU)
    fields.only("scale_attn_weights", True)
    fields.only("scale_attn_by_inverse_layer_idx", False)
    fields.only("add_cross_attention", False)
    heads, width = fields.count("n_head"), fields.count("n_embd")
    layer = Layer(
        heads=heads,
        kv_heads=heads,
        head_dim=max(1, width // heads),
        theta=None,
        qkv_bias=True,
        out_bias=True,
        hidden=fields.count("n_inner", 4 * width),
        activation=_GELU[fields.get("activation_function", str, "gelu_new")],  # type: ignore[arg-type]
    )
    return Spec(
        vocab_size=fields.count("vocab_size"),
        d_model=width,
        layers=(layer,) * depth(fields, "n_layer"),
        tie_embeddings=fields.get("tie_word_embeddings", bool, True),
        norm="layer",
        eps=fields.get("layer_norm_epsilon", float, 1e-5),
        learned_positions=fields.count("n_positions"),
    )


def _write_gpt2(spec: Spec) -> dict[str, Any]:
    first = spec.layers[0]
    activations = {ours: theirs for theirs, ours in reversed(_GELU.items())}
    return {
        "vocab_size": spec.vocab_size,
        "n_embd": spec.d_model,
        "n_layer": len(spec.layers),
        "n_head": first.heads,
        "n_inner": first.hidden,
        "n_positions": spec.learned_positions or 1,
        "activation_function": activations.get(first.activation, "gelu_new"),
        "layer_norm_epsilon": spec.eps,
        "tie_word_embeddings": spec.tie_embeddings,
    }


ARCHITECTURES = (
    Architecture("llama", "LlamaForCausalLM", _read_llama, _write_llama, LLAMA),
    Architecture("mistral", "MistralForCausalLM", _read_mistral, _write_mistral, LLAMA),
    Architecture("qwen2", "Qwen2ForCausalLM", _read_qwen2, _write_qwen2, LLAMA),
    Architecture("qwen3", "Qwen3ForCausalLM", _read_qwen3, _write_qwen3, LLAMA),
    Architecture("gpt2", "GPT2LMHeadModel", _read_gpt2, _write_gpt2, GPT2, "transformer."),
)
