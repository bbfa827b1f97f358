"""Architectures whose FFN is a mixture of experts: Mixtral, Qwen2-MoE, Qwen3-MoE."""

import dataclasses
from typing import Any

from dyncomp.core.errors import DyncompError
from dyncomp.pretrained.dense import mistral_window
from dyncomp.pretrained.fields import Fields
from dyncomp.pretrained.layout import Entry
from dyncomp.pretrained.spec import Layer, Spec
from dyncomp.pretrained.tables import (
    BLOCK,
    LLAMA,
    Architecture,
    depth,
    read_attention,
    read_whole,
    swiglu,
    write_whole,
)

MIXTRAL = (
    *(entry for entry in LLAMA if not entry.ours.startswith("ffn/")),
    Entry("ffn/router/kernel", BLOCK + "block_sparse_moe.gate.weight", "e d -> d e"),
    *swiglu("ffn", "block_sparse_moe.experts.{e}", ("w1", "w3", "w2")),
)

DENSE_FFN = tuple(entry for entry in LLAMA if entry.ours.startswith("ffn/"))
"""For the layers of a Qwen model that have no experts."""

QWEN_MOE = (
    *(entry for entry in LLAMA if not entry.ours.startswith("ffn/")),
    Entry("ffn/router/kernel", BLOCK + "mlp.gate.weight", "e d -> d e"),
    *swiglu("ffn", "mlp.experts.{e}"),
    *swiglu("ffn/shared", "mlp.shared_expert"),
    Entry("ffn/shared_gate", BLOCK + "mlp.shared_expert_gate.weight", "o d -> d o"),
    *DENSE_FFN,
)


def _read_mixtral(fields: Fields) -> Spec:
    fields.count("num_key_value_heads")
    attention = read_attention(fields, 1e6, window=mistral_window(fields, None))
    layer = Layer(
        hidden=fields.count("intermediate_size"),
        experts=fields.count("num_local_experts", 8),
        k=fields.count("num_experts_per_tok", 2),
        **attention,
    )
    return read_whole(fields, [_checked(fields, layer)] * depth(fields), 1e-5)


def _write_mixtral(spec: Spec) -> dict[str, Any]:
    first = spec.layers[0]
    said = {"num_local_experts": first.experts, "num_experts_per_tok": first.k}
    return write_whole(spec, sliding_window=first.window, **said)


def _checked(fields: Fields, layer: Layer) -> Layer:
    if layer.k > layer.experts:
        raise DyncompError(
            f"{fields.where}: num_experts_per_tok={layer.k} of {layer.experts} experts; expected at most all"
        )
    return layer


def _read_qwen_moe(fields: Fields, shared: int = 0, **attention: Any) -> Spec:
    fields.only("use_sliding_window", False)
    fields.count("num_key_value_heads")
    same = read_attention(fields, **attention)
    sparse = Layer(
        hidden=fields.count("moe_intermediate_size"),
        experts=fields.count("num_experts", None) or fields.count("num_local_experts"),
        k=fields.count("num_experts_per_tok"),
        renormalize=fields.get("norm_topk_prob", bool, False),
        shared=shared,
        **same,
    )
    dense = dataclasses.replace(
        sparse, hidden=fields.count("intermediate_size"), experts=0, k=0, shared=0, renormalize=True
    )
    only, step = fields.get("mlp_only_layers", list, []), fields.count("decoder_sparse_step", 1)
    _checked(fields, sparse)
    layers = [dense if i in only or (i + 1) % step else sparse for i in range(depth(fields))]
    return read_whole(fields, layers)


def _write_qwen_moe(spec: Spec, **more: Any) -> dict[str, Any]:
    dense = [i for i, layer in enumerate(spec.layers) if not layer.experts]
    first = next((layer for layer in spec.layers if layer.experts), spec.layers[0])
    said = {
        "intermediate_size": spec.layers[dense[0]].hidden if dense else first.hidden,
        "moe_intermediate_size": first.hidden,
        "num_experts": first.experts,
        "num_experts_per_tok": first.k,
        "norm_topk_prob": first.renormalize,
        "mlp_only_layers": dense,
        "decoder_sparse_step": 1,
        "use_sliding_window": False,
    }
    if first.shared:
        said["shared_expert_intermediate_size"] = first.shared
    return write_whole(spec, **said, **more)


def _read_qwen2_moe(fields: Fields) -> Spec:
    shared = fields.count("shared_expert_intermediate_size")
    return _read_qwen_moe(fields, shared, qkv_bias=fields.get("qkv_bias", bool, True))


def _write_qwen2_moe(spec: Spec) -> dict[str, Any]:
    return _write_qwen_moe(spec, qkv_bias=spec.layers[0].qkv_bias)


def _read_qwen3_moe(fields: Fields) -> Spec:
    bias = fields.get("attention_bias", bool, False)
    return _read_qwen_moe(fields, qk_norm=True, qkv_bias=bias, out_bias=bias)


def _write_qwen3_moe(spec: Spec) -> dict[str, Any]:
    return _write_qwen_moe(spec, attention_bias=spec.layers[0].out_bias)


ARCHITECTURES = (
    Architecture("mixtral", "MixtralForCausalLM", _read_mixtral, _write_mixtral, MIXTRAL),
    Architecture("qwen2_moe", "Qwen2MoeForCausalLM", _read_qwen2_moe, _write_qwen2_moe, QWEN_MOE),
    Architecture("qwen3_moe", "Qwen3MoeForCausalLM", _read_qwen3_moe, _write_qwen3_moe, QWEN_MOE),
)
