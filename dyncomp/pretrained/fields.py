"""A config.json whose values are checked as they are read."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dyncomp.attention import RopeScaling
from dyncomp.core.errors import DyncompError

REQUIRED: Any = object()
MAX_COUNT = 1 << 28


class Fields:
    """Typed access to a JSON object; a missing or senseless value is one clear error.

    Attributes:
      values: the object.
      where: what errors call it.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config.json"):
        self.values = values
        self.where = where

    def get(self, name: str, kind: type, default: Any = REQUIRED) -> Any:
        """The value of ``name``; null counts as missing.

        Raises:
          DyncompError: missing without default, or of another type.
        """
        value = self.values.get(name)
        if value is None:
            if default is REQUIRED:
                raise DyncompError(f"{self.where}: {name} is missing; is this a complete model?")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (kind is float and not math.isfinite(value)):
            raise DyncompError(f"{self.where}: {name}={value!r}; expected {kind.__name__}")
        return value

    def count(self, name: str, default: Any = REQUIRED) -> Any:
        """A positive integer, of a size that is believed."""
        value = self.get(name, int, default)
        if value is not default and not 0 < value < MAX_COUNT:
            raise DyncompError(f"{self.where}: {name}={value}; expected a positive count")
        return value

    def only(self, name: str, *allowed: Any) -> None:
        """Refuses a value that our backbone does not have; a missing one is the first of ``allowed``."""
        value = self.values.get(name)
        if value is not None and value not in allowed:
            raise DyncompError(
                f"{self.where}: {name}={value!r} is not supported; only {', '.join(map(repr, allowed))}"
            )

    def inner(self, name: str) -> "Fields":
        """An object inside this one, empty where missing."""
        return Fields(self.get(name, dict, {}), f"{self.where}: {name}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file.

    Raises:
      DyncompError: not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DyncompError(f"{path} is not JSON; fetch it again") from error
    if not isinstance(found, dict):
        raise DyncompError(f"{path} is not a JSON object; fetch it again")
    return found


def read_rope(fields: Fields, theta: float = 10_000.0) -> tuple[float, RopeScaling | None]:
    """Base and scaling of RoPE, as transformers 4 (``rope_theta``, ``rope_scaling``) or 5 (``rope_parameters``) say it.

    Raises:
      DyncompError: a scaling that depends on the length of the input (dynamic NTK, longrope), or of part of a head.
    """
    both = {**fields.inner("rope_scaling").values, **fields.inner("rope_parameters").values}
    inner = Fields(both, f"{fields.where}: rope_parameters")
    fields.only("partial_rotary_factor", 1.0)
    inner.only("partial_rotary_factor", 1.0)
    if any(isinstance(value, dict) for value in both.values()):
        raise DyncompError(f"{inner.where}: one RoPE for each kind of layer is not supported")
    base = inner.get("rope_theta", float, fields.get("rope_theta", float, theta))
    kind = inner.get("rope_type", str, inner.get("type", str, "default"))
    if not 1 < base < 1e12:
        raise DyncompError(f"{fields.where}: rope_theta={base}; expected a base above 1")
    if kind == "default":
        return base, None
    if kind not in ("linear", "llama3", "yarn"):
        raise DyncompError(
            f"{fields.where}: RoPE scaling {kind!r} is not supported (its angles would depend on the input's length);"
            " use 'default', 'linear', 'llama3' or 'yarn'"
        )
    return base, _scaling(kind, inner, fields)


def _scaling(kind: Any, inner: Fields, fields: Fields) -> RopeScaling:
    factor = inner.get("factor", float)
    if kind == "linear":
        return RopeScaling(kind=kind, factor=factor)
    name = "original_max_position_embeddings"
    length = fields.count(name, None) or inner.count(name, None)
    length = length or fields.count("max_position_embeddings")
    if kind == "llama3":
        low, high = inner.get("low_freq_factor", float), inner.get("high_freq_factor", float)
        return RopeScaling(
            kind=kind,
            factor=factor,
            original_length=length,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    return RopeScaling(
        kind=kind,
        factor=factor,
        original_length=length,
        beta_fast=inner.get("beta_fast", float, 32.0),
        beta_slow=inner.get("beta_slow", float, 1.0),
        truncate=inner.get("truncate", bool, True),
        attention_factor=_attention_factor(inner, factor),
    )


def _attention_factor(inner: Fields, factor: float) -> float | None:
    """Told, or from the two scales of DeepSeek; None for YaRN's own rule."""
    told = inner.get("attention_factor", float, None)
    above, below = inner.get("mscale", float, 0.0), inner.get("mscale_all_dim", float, 0.0)
    if told is not None or not (above and below):
        return told
    yarn = RopeScaling(kind="yarn", factor=factor, original_length=1).amplitude - 1.0
    return (above * yarn + 1.0) / (below * yarn + 1.0)


def write_rope(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """The inverse of `read_rope`, in a form that transformers 4 and 5 read."""
    if scaling is None:
        return {"rope_theta": theta}
    said: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        said["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "llama3":
        said["low_freq_factor"] = scaling.low_freq_factor
        said["high_freq_factor"] = scaling.high_freq_factor
    if scaling.kind == "yarn":
        said |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        said["truncate"] = scaling.truncate
        if scaling.attention_factor is not None:
            said["attention_factor"] = scaling.attention_factor
    return {"rope_theta": theta, "rope_scaling": said}
