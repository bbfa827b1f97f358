"""Groups: a period of blocks repeated n times, scanned or with separate weights."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from dyncomp.core.aux import Aux, nest
from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Factory, check_factory
from dyncomp.models.layout import STACKED

Execution = Literal["scan", "unroll"]
Remat = Literal["none", "full", "dots"]


@dataclasses.dataclass(frozen=True)
class Group:
    """A period of blocks and how often it repeats ("MoE every second layer" is a period of two).

    Attributes:
      blocks: factories of blocks, run in order.
      repeat: how often the period runs, each time with its own parameters.
    """

    blocks: Sequence[Factory]
    repeat: int = 1

    def __post_init__(self):
        object.__setattr__(self, "blocks", tuple(self.blocks))
        for index, block in enumerate(self.blocks):
            check_factory(block, f"Group.blocks[{index}]")
        if self.repeat < 1 or not self.blocks:
            raise DyncompError(
                f"Group: {len(self.blocks)} blocks x {self.repeat}; give at least one block and repeat >= 1"
            )


def check_execution(layers: str, remat: str) -> None:
    """Refuses unknown options.

    Raises:
      DyncompError: names the allowed values.
    """
    if layers not in ("scan", "unroll"):
        raise DyncompError(f"layers={layers!r}: use 'scan' or 'unroll'")
    if remat not in ("none", "full", "dots"):
        raise DyncompError(f"remat={remat!r}: use 'none', 'full' or 'dots'")


class Period(nn.Module):
    """The blocks of one repetition."""

    blocks: Sequence[Factory]
    dtypes: DTypes = DTypes()

    def setup(self):  # noqa: D102
        self.block = [make(dtypes=self.dtypes) for make in self.blocks]

    def __call__(self, x, positions, mask, cache, train, capture) -> tuple[Array, Aux]:
        """Runs the blocks in order; side results nest under ``block_j``."""
        parts = {}
        for index, block in enumerate(self.block):
            name = f"block_{index}"
            own = None if cache is None else cache[name]
            x, parts[name] = block(x, positions, mask, own, train=train, capture=capture)
        return x, nest(**parts)


class GroupStack(nn.Module):
    """Runs a `Group`.

    Parameters are always drawn in the stacked layout (key ``layers``), so that both executions mean the same
    numbers; ``execution="unroll"`` then expects them through `layout.unstack`.
    """

    group: Group
    execution: Execution = "scan"
    remat: Remat = "none"
    dtypes: DTypes = DTypes()

    def setup(self):  # noqa: D102
        check_execution(self.execution, self.remat)
        if self.scanned:
            self.layers = Period(self.group.blocks, self.dtypes)
        else:
            self.layers = [Period(self.group.blocks, self.dtypes) for _ in range(self.group.repeat)]

    @property
    def scanned(self) -> bool:
        """Whether this call scans (always while initialising)."""
        return self.execution == "scan" or self.is_initializing()

    def __call__(
        self, x, positions=None, mask=None, cache=None, train=False, capture=()
    ) -> tuple[Array, Aux]:
        """Runs all repetitions; every leaf of losses, events and plans gets a leading axis [repeat]."""

        def body(period: Period, x: Array, cache: Any) -> tuple[Array, Aux]:
            return period(x, positions, mask, cache, train, tuple(capture))

        own = cache or {}
        if self.scanned:
            body = self._remat(body, prevent_cse=False)
            scan = nn.scan(
                body,
                variable_axes={"params": 0, "controls": 0},
                split_rngs={"params": True, "router": True, "dropout": True},
                length=self.group.repeat,
                metadata_params={nn.PARTITION_NAME: STACKED},
            )
            x, aux = scan(self.layers, x, own.get(STACKED))
            return x, aux if aux.cache is None else dataclasses.replace(
                aux, cache={STACKED: aux.cache}
            )
        body = self._remat(body, prevent_cse=True)
        parts = []
        for index, period in enumerate(self.layers):
            x, part = body(period, x, own.get(f"{STACKED}_{index}"))
            parts.append(part)
        return x, join(parts)

    def _remat(self, body: Callable, *, prevent_cse: bool) -> Callable:
        if self.remat == "none":
            return body
        dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        policy = dots if self.remat == "dots" else None
        return nn.remat(body, prevent_cse=prevent_cse, policy=policy)

    def run(self, index: int, x: Array) -> tuple[Array, Aux]:
        """Runs block ``index`` (counted over repetitions) alone; needs separate weights."""
        if self.scanned:
            raise DyncompError("single blocks run on separate weights; set layers='unroll'")
        layer, block = divmod(index, len(self.group.blocks))
        return self.layers[layer].block[block](x)

    @property
    def depth(self) -> int:
        """Blocks in total."""
        return self.group.repeat * len(self.group.blocks)

    def cost(self, d_model: int, length: int) -> dict[str, Any]:
        """Prices per block of the period; the counts carry the layer axis."""
        return {
            f"block_{index}": make(parent=None, dtypes=self.dtypes).cost(d_model, length)
            for index, make in enumerate(self.group.blocks)
        }

    def init_cache(self, d_model: int, batch: int, max_length: int) -> dict[str, Any]:
        """An empty cache in the layout of the execution."""
        make = lambda: {
            f"block_{index}": block(parent=None, dtypes=self.dtypes).init_cache(
                d_model, batch, max_length
            )
            for index, block in enumerate(self.group.blocks)
        }
        layers = [make() for _ in range(self.group.repeat)]
        if self.execution == "scan":
            return {STACKED: jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}
        return {f"{STACKED}_{index}": layer for index, layer in enumerate(layers)}


def join(parts: Sequence[Aux]) -> Aux:
    """Side results of separate layers as a scan would return them; caches stay separate."""
    cache = {
        f"{STACKED}_{index}": part.cache
        for index, part in enumerate(parts)
        if part.cache is not None
    }
    bare = [dataclasses.replace(part, cache=None) for part in parts]
    joined = jax.tree.map(lambda *leaves: jnp.stack(leaves), *bare)
    return dataclasses.replace(joined, cache=cache or None)
