"""`export`: a backbone's parameters as safetensors that transformers loads."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from dyncomp.core.errors import DyncompError
from dyncomp.models import DecoderLM, is_stacked, stack
from dyncomp.pretrained import architectures, weights
from dyncomp.pretrained.params import Leaf, leaves
from dyncomp.pretrained.spec import Spec
from dyncomp.pretrained.tokenizer import Tokenizer

Part = tuple[Leaf, tuple[int, ...]]


def export(
    folder: str | Path,
    model: DecoderLM,
    params: Mapping[str, Any],
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes config.json, model.safetensors and the tokenizer's files.

    The architecture is the first of those that load which can express the model exactly; one leaf at a time is on the
    host.

    Args:
      folder: made if missing; files of these names are replaced.
      model: a backbone.
      params: its parameters (not the variables), stacked or not.
      tokenizer: saved beside them.

    Raises:
      DyncompError: no architecture can express the model, or the parameters are not this model's.
    """
    architecture, config = architectures.find_for(Spec.of(model))
    params = nn.meta.unbox(params)
    params = params if is_stacked(params) else stack(params)
    parts: dict[str, list[Part]] = {}
    for leaf in leaves(model, architecture):
        _value(params, leaf)
        for place in leaf.places:
            parts.setdefault(leaf.tensor(place), []).append((leaf, place))
    planned = {name: _planned(found) for name, found in parts.items()}
    dtypes = {dtype for dtype, _ in planned.values()}
    config["torch_dtype"] = model.dtypes.param if len(dtypes) > 1 else dtypes.pop()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        config |= {name: value for name, value in ids.items() if value is not None}
        tokenizer.save(folder)
    weights.write(folder / "model.safetensors", planned, _arrays(params, parts, planned))
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _value(params: Mapping[str, Any], leaf: Leaf) -> Any:
    node: Any = params
    for key in leaf.path:
        node = node[key] if isinstance(node, Mapping) and key in node else None
    shape = getattr(node, "shape", None)
    if shape != leaf.shape:
        raise DyncompError(
            f"parameter {'/'.join(leaf.path)} is {shape}, the model has {leaf.shape}; export a model with its own"
            " parameters"
        )
    return node


def _planned(found: list[Part]) -> tuple[str, tuple[int, ...]]:
    leaf, _ = found[0]
    return str(leaf.dtype), leaf.entry.shape(leaf.inner)


def _arrays(
    params: Mapping[str, Any],
    parts: Mapping[str, list[Part]],
    planned: Mapping[str, tuple[str, tuple[int, ...]]],
) -> Iterator[np.ndarray]:
    """Their tensors in order; parts of a fused one are put together."""
    for name, (dtype, shape) in planned.items():
        tensor = np.empty(shape, weights.numpy_dtype(dtype))
        for leaf, place in parts[name]:
            value = _value(params, leaf)[place] if place else _value(params, leaf)
            leaf.entry.view(tensor, leaf.inner)[...] = np.asarray(jax.device_get(value))
        yield tensor
