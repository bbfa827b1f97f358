"""The config.json of a GGUF file's metadata."""

from typing import Any

import numpy as np

from dyncomp.attention import RopeScaling
from dyncomp.core.errors import DyncompError
from dyncomp.pretrained.fields import Fields, write_rope

ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
}
"""Their name -> model_type. Mistral and Mixtral files say "llama"."""

LLAMA3_LENGTH = 8192
"""Training length of Llama 3, which its GGUF files do not give."""


def config_of(
    file: str, metadata: dict[str, Any], present: set[str], factors: np.ndarray | None
) -> dict[str, Any]:
    """What transformers would have in config.json.

    Args:
      file: name, for errors.
      metadata: key -> value.
      present: names of the tensors.
      factors: what the frequencies are divided by (tensor ``rope_freqs``), for Llama 3.1 and later.

    Raises:
      DyncompError: an architecture or option that is not supported.
    """
    said = Fields(metadata, file)
    arch = said.get("general.architecture", str)
    if arch not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise DyncompError(f"{file}: architecture {arch!r} is not supported; known: {known}")
    own = Fields({k.removeprefix(f"{arch}."): v for k, v in metadata.items()}, file)
    heads = own.count("attention.head_count")
    width = own.count("embedding_length")
    head_dim = own.count("attention.key_length", width // heads)
    config = {
        "model_type": ARCHITECTURES[arch],
        "vocab_size": len(said.get("tokenizer.ggml.tokens", list, [])) or own.count("vocab_size"),
        "hidden_size": width,
        "num_hidden_layers": own.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": own.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": _short(own.get("attention.layer_norm_rms_epsilon", float)),
        "max_position_embeddings": own.count("context_length"),
        "tie_word_embeddings": "output.weight" not in present,
        "attention_bias": arch == "llama" and "blk.0.attn_q.bias" in present,
        **_rope(own, head_dim, factors),
        **_ids(said),
    }
    if "feed_forward_length" in own.values:
        config["intermediate_size"] = own.count("feed_forward_length")
    if own.get("expert_count", int, 0):
        config |= _experts(own, arch)
    window = own.count("attention.sliding_window", None)
    if window and arch == "llama":
        kind = "mixtral" if "num_local_experts" in config else "mistral"
        config |= {"model_type": kind, "sliding_window": window}
    return config


def _short(value: float) -> float:
    """A number that was stored as float32, as it was written: 9.99999974e-06 means 1e-05."""
    return float(str(np.float32(value)))


def _ids(said: Fields) -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos"}
    found = {k: said.get(f"tokenizer.ggml.{n}_token_id", int, None) for k, n in names.items()}
    return {key: value for key, value in found.items() if value is not None}


def _experts(own: Fields, arch: str) -> dict[str, Any]:
    experts, k = own.count("expert_count"), own.count("expert_used_count")
    if arch == "llama":
        return {"model_type": "mixtral", "num_local_experts": experts, "num_experts_per_tok": k}
    found = {
        "num_experts": experts,
        "num_experts_per_tok": k,
        "moe_intermediate_size": own.count("expert_feed_forward_length"),
        "norm_topk_prob": own.get("expert_weights_norm", bool, arch == "qwen3moe"),
    }
    if arch == "qwen2moe":
        found["shared_expert_intermediate_size"] = own.count("expert_shared_feed_forward_length")
    return found


def _rope(own: Fields, head_dim: int, factors: np.ndarray | None) -> dict[str, Any]:
    theta = own.get("rope.freq_base", float, 10_000.0)
    if own.count("rope.dimension_count", head_dim) != head_dim:
        raise DyncompError(f"{own.where}: RoPE on part of a head is not supported")
    kind = own.get("rope.scaling.type", str, "none")
    factor = own.get("rope.scaling.factor", float, 1.0)
    if factors is not None:
        return write_rope(theta, _llama3(own, head_dim, theta, factors))
    if kind == "none" or factor == 1.0:
        return write_rope(theta, None)
    if kind not in ("linear", "yarn"):
        raise DyncompError(f"{own.where}: RoPE scaling {kind!r} is not supported")
    length = own.count("rope.scaling.original_context_length", 0)
    scaling = RopeScaling(kind=kind, factor=factor, original_length=length)  # type: ignore[arg-type]
    return write_rope(theta, scaling)


def _llama3(own: Fields, head_dim: int, theta: float, factors: np.ndarray) -> RopeScaling:
    """Llama 3's rule, if it gives the divisors that the file holds.

    Raises:
      DyncompError: they follow another rule.
    """
    length = own.count("rope.scaling.original_context_length", LLAMA3_LENGTH)
    factor = max(1.0, float(np.max(factors)))
    scaling = RopeScaling(kind="llama3", factor=factor, original_length=length)
    expected = scaling.divisors(head_dim, theta)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise DyncompError(
            f"{own.where}: its rope_freqs follow no rule we know (Llama 3's neither)"
        )
    return scaling
