"""Groups: a period of blocks repeated n times, scanned or with separate weights."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from dyncomp.attention import CacheState
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

    def __call__(self, x, below, positions, mask, cache, train, capture) -> tuple[Array, Any, Aux]:
        """Runs the blocks in order; side results nest under ``block_j``. Returns x, what goes up, and the rest."""
        parts = {}
        for index, block in enumerate(self.block):
            name = f"block_{index}"
            own = None if cache is None else cache[name]
            handed = {"below": below} if below else {}
            x, aux = block(x, positions, mask, own, train=train, capture=capture, **handed)
            below, parts[name] = aux.below, dataclasses.replace(aux, below={})
        return x, below, nest(**parts)


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
        self, x, positions=None, mask=None, cache=None, train=False, capture=(), below=None
    ) -> tuple[Array, Aux]:
        """Runs all repetitions; every leaf of losses, events and plans gets a leading axis [repeat].

        ``below`` is carried from block to block and comes back as ``Aux.below``, without such an axis.
        """

        def body(period: Period, carry: tuple[Array, Any], cache: Any) -> tuple[Any, Aux]:
            x, up, aux = period(*carry, positions, mask, cache, train, tuple(capture))
            return (x, up), aux

        own, carry = cache or {}, (x, dict(below or {}))
        if self.scanned:
            body = self._remat(body, prevent_cse=False)
            scan = nn.scan(
                body,
                variable_axes={"params": 0, "controls": 0},
                split_rngs={"params": True, "router": True, "dropout": True},
                length=self.group.repeat,
                metadata_params={nn.PARTITION_NAME: STACKED},
            )
            (x, up), aux = scan(self.layers, carry, own.get(STACKED))
            kept = None if aux.cache is None else {STACKED: aux.cache}
            return x, dataclasses.replace(aux, cache=kept, below=up)
        body = self._remat(body, prevent_cse=True)
        parts = []
        for index, period in enumerate(self.layers):
            carry, part = body(period, carry, own.get(f"{STACKED}_{index}"))
            parts.append(part)
        return carry[0], dataclasses.replace(join(parts), below=carry[1])

    def _remat(self, body: Callable, *, prevent_cse: bool) -> Callable:
        if self.remat == "none":
            return body
        dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        policy = dots if self.remat == "dots" else None
        return nn.remat(body, prevent_cse=prevent_cse, policy=policy)

    def run(self, index: int, x: Array, *args: Any, **kwargs: Any) -> tuple[Array, Aux]:
        """Runs block ``index`` (counted over repetitions) alone; needs separate weights."""
        if self.scanned:
            raise DyncompError("single blocks run on separate weights; set layers='unroll'")
        layer, block = divmod(index, len(self.group.blocks))
        call = lambda block, x, args: block(x, *args, **kwargs)
        body = self._remat(call, prevent_cse=True)
        return body(self.layers[layer].block[block], x, args)

    def below_like(self, batch: int, length: int) -> dict[str, Any]:
        """What the blocks hand up, as the first one sees it.

        Raises:
          DyncompError: two blocks hand up the same name in different shapes.
        """
        found: dict[str, Any] = {}
        for make in self.group.blocks:
            like = getattr(make(parent=None, dtypes=self.dtypes), "below_like", None)
            for name, value in ({} if like is None else like(batch, length)).items():
                if name in found and found[name].shape != value.shape:
                    raise DyncompError(
                        f"blocks hand up {name!r} as {found[name].shape} and {value.shape}; give both layers"
                        " equally many experts"
                    )
                found[name] = value
        return found

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


def first_below(stacks: Sequence[GroupStack], batch: int, length: int) -> dict[str, Any]:
    """What the first block of a whole model finds handed up from below.

    Raises:
      DyncompError: groups hand up the same name in different shapes.
    """
    found: dict[str, Any] = {}
    for stack in stacks:
        for name, value in stack.below_like(batch, length).items():
            if name in found and found[name].shape != value.shape:
                raise DyncompError(
                    f"groups hand up {name!r} as {found[name].shape} and {value.shape}; give all layers equally"
                    " many experts"
                )
            found[name] = value
    return found


def first_handed(cache: Any, stacked: bool) -> dict[str, Any]:
    """What the first block's cache policy finds handed up from below: zeros, in the shapes of what its like hands up.

    Args:
      stacked: each group's caches lie in one, with a leading layer axis.

    Raises:
      DyncompError: two caches hand up the same name in different shapes.
    """
    found: dict[str, Any] = {}
    is_state = lambda node: isinstance(node, CacheState)
    states = [x for x in jax.tree.leaves(cache, is_leaf=is_state) if is_state(x)]
    for state in states:
        for name, value in state.handed().items():
            blank = jnp.zeros(value.shape[1:] if stacked else value.shape, value.dtype)
            if name in found and found[name].shape != blank.shape:
                raise DyncompError(
                    f"caches hand up {name!r} as {found[name].shape} and {blank.shape}; give them one policy"
                )
            found[name] = blank
    return found


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
