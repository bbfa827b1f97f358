"""Small configurable classes: each kind of field that a config can set."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from flax import linen as nn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    rate: float = 0.1
    clip: float | None = None


def make_optimizer(rate: float, steps: int = 10) -> Optimizer:
    return Optimizer(rate=rate / steps)


class FFN(nn.Module):
    hidden: int = 8
    kind: Literal["silu", "gelu"] = "silu"


class Block(nn.Module):
    ffn: Callable[..., Any]
    norm: Callable[..., Any] | None = None


class Model(nn.Module):
    width: int
    blocks: Sequence[Callable[..., Any]] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    name: str = "code"
    sizes: tuple[int, ...] = (1, 2)
    shuffle: bool = True
    pair: tuple[int, str] = (1, "a")
    table: Mapping[str, Sequence[float | None]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not self.name:
            raise ValueError("name='': give it a name\nmore detail")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Root:
    model: nn.Module
    optimizer: Optimizer
    data: Data | None = None
    seed: int = 0
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    arms: Mapping[str, Data] = dataclasses.field(default_factory=dict)
