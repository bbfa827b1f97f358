"""What an architecture is to us: config.json to numbers and back, tensor names to parameters; and what most share."""

import dataclasses
from collections.abc import Callable
from typing import Any

from dyncomp.core.errors import DyncompError
from dyncomp.pretrained.fields import Fields, read_rope, write_rope
from dyncomp.pretrained.layout import Entry
from dyncomp.pretrained.spec import MAX_LAYERS, Layer, Spec


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One family of checkpoints.

    Attributes:
      model_type: its name in config.json.
      cls: the class of transformers.
      read: config.json to numbers.
      write: the inverse, or nonsense where an architecture cannot say it (`find_for` reads it back to see).
      entries: tensors and parameters.
      optional_prefix: start of their names that some files leave out.
    """

    model_type: str
    cls: str
    read: Callable[[Fields], Spec]
    write: Callable[[Spec], dict[str, Any]]
    entries: tuple[Entry, ...]
    optional_prefix: str = ""


BLOCK = "model.layers.{i}."


def _linear(ours: str, theirs: str) -> Entry:
    return Entry(ours, f"{BLOCK}{theirs}.weight", "f d -> d f")


def swiglu(ours: str, theirs: str, names=("gate_proj", "up_proj", "down_proj")) -> list[Entry]:
    """A gated unit's three matrices, or those of a bank of them."""
    return [
        _linear(f"{ours}/{n}", f"{theirs}.{t}")
        for n, t in zip(("gate", "up", "down"), names, strict=True)
    ]


LLAMA = (
    Entry("embed", "model.embed_tokens.weight", "v d -> v d"),
    Entry("final_norm/scale", "model.norm.weight", "d -> d"),
    Entry("head", "lm_head.weight", "v d -> d v"),
    Entry("mixer_norm/scale", BLOCK + "input_layernorm.weight", "d -> d"),
    Entry("ffn_norm/scale", BLOCK + "post_attention_layernorm.weight", "d -> d"),
    *(
        Entry(f"mixer/{n}", f"{BLOCK}self_attn.{n}_proj.weight", "(h p) d -> d h p")
        for n in ("q", "k", "v")
    ),
    *(
        Entry(f"mixer/{n}_bias", f"{BLOCK}self_attn.{n}_proj.bias", "(h p) -> h p")
        for n in ("q", "k", "v")
    ),
    Entry("mixer/out", BLOCK + "self_attn.o_proj.weight", "d (h p) -> h p d"),
    Entry("mixer/out_bias", BLOCK + "self_attn.o_proj.bias", "d -> d"),
    *(Entry(f"mixer/{n}_norm", f"{BLOCK}self_attn.{n}_norm.weight", "p -> p") for n in ("q", "k")),
    *swiglu("ffn", "mlp"),
)


def depth(fields: Fields, name: str = "num_hidden_layers") -> int:
    """How many layers.

    Raises:
      DyncompError: more than is believed.
    """
    found = fields.count(name)
    if found > MAX_LAYERS:
        raise DyncompError(
            f"{fields.where}: {name}={found}; more than {MAX_LAYERS} is not believed"
        )
    return found


def read_attention(fields: Fields, theta: float = 10_000.0, **more: Any) -> dict[str, Any]:
    """The numbers of attention that all Llama-like configs say alike."""
    fields.only("hidden_act", "silu", "swish")
    heads, width = fields.count("num_attention_heads"), fields.count("hidden_size")
    base, scaling = read_rope(fields, theta)
    return {
        "heads": heads,
        "kv_heads": fields.count("num_key_value_heads", heads),
        "head_dim": fields.count("head_dim", max(1, width // heads)),
        "theta": base,
        "scaling": scaling,
        **more,
    }


def read_whole(fields: Fields, layers: list[Layer], eps: float = 1e-6) -> Spec:
    """What all Llama-like configs say alike about the rest."""
    return Spec(
        vocab_size=fields.count("vocab_size"),
        d_model=fields.count("hidden_size"),
        layers=tuple(layers),
        tie_embeddings=fields.get("tie_word_embeddings", bool, False),
        eps=fields.get("rms_norm_eps", float, eps),
        max_length=fields.count("max_position_embeddings", None),
    )


def write_whole(spec: Spec, **more: Any) -> dict[str, Any]:
    """The inverse of `read_whole` and `read_attention`."""
    first = spec.layers[0]
    said = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.d_model,
        "intermediate_size": first.hidden,
        "num_hidden_layers": len(spec.layers),
        "num_attention_heads": first.heads,
        "num_key_value_heads": first.kv_heads,
        "head_dim": first.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": spec.eps,
        "tie_word_embeddings": spec.tie_embeddings,
        **write_rope(first.theta or 0.0, first.scaling),
    }
    if spec.max_length is not None:
        said["max_position_embeddings"] = spec.max_length
    return said | more
