"""GGUF files, dequantised into a folder as transformers saves it; read by the `gguf` package.

llama.cpp stores queries and keys of "llama" models for rotation of neighbouring elements; transformers and we rotate
halves, so their rows are put back in order. Tensors are found by name: their order in the file is not that of layers.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.pretrained import weights
from dyncomp.pretrained.gguf_config import config_of
from dyncomp.pretrained.gguf_tokenizer import write_tokenizer

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{n}": f"self_attn.{n}_proj" for n in ("q", "k", "v")},
    **{f"attn_{n}_norm": f"self_attn.{n}_norm" for n in ("q", "k")},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{n}": f"mlp.{n}_proj" for n in ("gate", "up", "down")},
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    **{f"ffn_{n}_shexp": f"mlp.shared_expert.{n}_proj" for n in ("gate", "up", "down")},
    **{f"ffn_{n}_exps": f"mlp.experts.{{e}}.{n}_proj" for n in ("gate", "up", "down")},
}
MIXTRAL = {
    "mlp.gate.": "block_sparse_moe.gate.",
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
    "mlp.experts": "block_sparse_moe.experts",
}
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")
MAX_ITEMS = 1 << 20


def convert(path: Path, folder: Path, tokenizer: Path | None = None) -> None:
    """Writes config.json, model.safetensors and the tokenizer's files.

    Args:
      path: the file.
      folder: an empty folder.
      tokenizer: a tokenizer.json that lies beside the file, which then wins over what the file says.

    Raises:
      DyncompError: damaged, or of an architecture, quantisation or tokenizer that is not supported.
    """
    reader = _open(path)
    fields = {name: _value(path, field) for name, field in reader.fields.items()}
    factors = [t.data for t in reader.tensors if t.name == "rope_freqs.weight"]
    present = {tensor.name for tensor in reader.tensors}
    config = config_of(path.name, fields, present, np.asarray(factors[0]) if factors else None)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    planned: dict[str, tuple[str, tuple[int, ...]]] = {}
    makers: list[tuple[Any, list[str], Callable[[np.ndarray], np.ndarray]]] = []
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            continue
        names, shape = _targets(path, tensor, config)
        planned |= {name: (_dtype(tensor), shape) for name in names}
        makers.append((tensor, names, _order(tensor.name, config)))
    weights.write(folder / "model.safetensors", planned, _arrays(makers))
    write_tokenizer(path.name, fields, folder, tokenizer)


def _open(path: Path) -> Any:
    """A reader whose header was parsed.

    Raises:
      DyncompError: the `gguf` package is missing, or the file is damaged.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise DyncompError(
            "GGUF files need the gguf package: pip install 'dyncomp[llm]'"
        ) from error
    with path.open("rb") as file:
        head = file.read(24)
    tensors, items = (int.from_bytes(head[i : i + 8], "little") for i in (8, 16))
    if head[:4] != b"GGUF" or max(tensors, items) > MAX_ITEMS:
        raise DyncompError(f"{path.name} is damaged or no GGUF file; fetch it again")
    try:
        return GGUFReader(path)
    except Exception as error:  # the reader trusts its file: a damaged one may raise anything
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DyncompError:
    reason = (str(error).strip().splitlines() or [""])[0][:120]
    return DyncompError(
        f"{path.name} is damaged ({type(error).__name__}: {reason}); fetch it again"
    )


def _value(path: Path, field: Any) -> Any:
    try:
        return field.contents()
    except Exception as error:
        raise _damaged(path, error) from error


def _targets(path: Path, tensor: Any, config: dict[str, Any]) -> tuple[list[str], tuple[int, ...]]:
    """Names that transformers gives a tensor (one for each expert), and the shape of each."""
    found = _NAME.fullmatch(tensor.name)
    if not found or found[2] not in NAMES:
        raise DyncompError(f"{path.name}: no place for tensor {tensor.name[:80]!r}")
    layer, kind, end = found.groups()
    name = NAMES[kind]
    if config["model_type"] == "mixtral":
        for theirs, ours in MIXTRAL.items():
            name = (name + ".").replace(theirs, ours).removesuffix(".")
    name = f"{name}.{end}" if layer is None else f"model.layers.{layer}.{name}.{end}"
    shape = tuple(int(n) for n in reversed(tensor.shape))
    if kind == "ffn_gate_inp_shexp" and len(shape) == 1:
        shape = (1, *shape)
    if "{e}" not in name:
        return [name], shape
    return [name.format(e=e) for e in range(shape[0])], shape[1:]


def _dtype(tensor: Any) -> str:
    return {"F16": "float16", "BF16": "bfloat16"}.get(tensor.tensor_type.name, "float32")


def _order(name: str, config: dict[str, Any]) -> Callable[[np.ndarray], np.ndarray]:
    """What puts the rows of a tensor into the order of half rotation."""
    found = _NAME.fullmatch(name)
    kind = found[2] if found else ""
    if config["model_type"] not in ("llama", "mistral", "mixtral") or kind not in (
        "attn_q",
        "attn_k",
    ):
        return lambda array: array
    heads = config["num_attention_heads" if kind == "attn_q" else "num_key_value_heads"]

    def unpermute(array: np.ndarray) -> np.ndarray:
        pairs = array.reshape(heads, -1, 2, *array.shape[1:])
        return pairs.swapaxes(1, 2).reshape(array.shape)

    return unpermute


def _arrays(makers: list[Any]) -> Iterator[np.ndarray]:
    """The dequantised tensors in order, one at a time."""
    for tensor, names, order in makers:
        array = order(_dequantized(tensor))
        if len(names) == 1:
            yield array if array.ndim > 1 or "shared_expert_gate" not in names[0] else array[None]
        else:
            yield from array


def _dequantized(tensor: Any) -> np.ndarray:
    from gguf.quants import dequantize

    if tensor.tensor_type.name == "BF16":
        return tensor.data.view(weights.numpy_dtype("bfloat16"))
    if tensor.tensor_type.name in ("F16", "F32"):
        return tensor.data
    try:
        return dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise DyncompError(
            f"tensor {tensor.name}: quantisation {tensor.tensor_type.name} is not supported; use another file"
        ) from error
