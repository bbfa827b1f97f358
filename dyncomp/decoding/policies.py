"""What one decode step computes: the seam of the decode loop.

A policy is a frozen dataclass of static choices. Its state is a pytree that lives on the device; thresholds and budgets
are ``controls``, run-time arguments, so that changing them compiles nothing.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp

from dyncomp.core.aux import count
from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Float, Int
from dyncomp.decoding.net import Net, gather_events
from dyncomp.models import layer_caches, with_layer_caches


class Step(NamedTuple):
    """What a step gives.

    Attributes:
      logits: float32 [b v], of the next token.
      cache: the extended cache.
      state: the policy's.
      events: counts, nested as the model's.
      depth: int32 [b], blocks that the new token ran.
      stop: bool [b], end the sequence here, without a token; None where a policy never does.
    """

    logits: Float[Array, "b v"]
    cache: Any
    state: Any
    events: Any
    depth: Int[Array, "b"]
    stop: Array | None = None


@runtime_checkable
class Policy(Protocol):
    """How a decode step runs the network."""

    def controls(self) -> Any:
        """Run-time arguments at their defaults."""
        ...

    def check(self, model: Any) -> None:
        """Refuses what ``model`` cannot do."""
        ...

    def slack(self) -> int:
        """Slots of the cache beyond the tokens that a step may use."""
        ...

    def start(self, net: Net, hidden: Array, aux: Any, controls: Any) -> Step:
        """After the prompt ran through all blocks: ``hidden`` [b t d] is the last one's output."""
        ...

    def step(self, net: Net, token: Array, positions: Array, mask: Array, cache: Any, state: Any,
             controls: Any) -> Step:  # fmt: skip
        """One token [b 1] for every sequence."""
        ...


@dataclasses.dataclass(frozen=True)
class Plain:
    """What most policies need not say."""

    def controls(self) -> Any:
        """None."""
        return None

    def check(self, model: Any) -> None:
        """Takes every model."""

    def slack(self) -> int:
        """No more slots than tokens."""
        return 0

    def start(self, net: Net, hidden: Array, aux: Any, controls: Any) -> Step:
        """The first token comes from full depth; no state."""
        depth = jnp.full(hidden.shape[:1], net.model.depth, jnp.int32)
        return Step(net.classify(hidden[:, -1:])[:, 0], aux.cache, None, aux.events, depth)


@dataclasses.dataclass(frozen=True)
class FullDepth(Plain):
    """Every block, every token."""

    def step(self, net, token, positions, mask, cache, state, controls) -> Step:
        """One token through everything."""
        x, aux = net.hidden(token, positions, mask, cache)
        depth = jnp.full(token.shape[:1], net.model.depth, jnp.int32)
        return Step(net.classify(x)[:, -1], aux.cache, state, aux.events, depth)


@dataclasses.dataclass(frozen=True)
class KeepLayers(Plain):
    """Generated tokens run the same few blocks; the prompt ran all (Unified Layer Skipping, arXiv 2404.06954).

    A skipped block passes its input on, and its cache stays as the prompt left it: nothing ever looks at it again.

    Attributes:
      layers: indices of the blocks that run, in order (`dyncomp.depth`).
    """

    layers: tuple[int, ...]

    def check(self, model: Any) -> None:
        """Refuses blocks that the model does not have."""
        ordered = sorted(set(self.layers))
        if (
            not ordered
            or list(self.layers) != ordered
            or not 0 <= ordered[0] <= ordered[-1] < model.depth
        ):
            raise DyncompError(
                f"KeepLayers.layers={self.layers}: give increasing indices below {model.depth}"
            )

    def step(self, net, token, positions, mask, cache, state, controls) -> Step:
        """One token through the kept blocks."""
        caches, x, found = layer_caches(cache), net.embed(token, positions), []
        for index in self.layers:
            x, caches[index], events = net.block(index, x, positions, mask, caches[index])
            found.append((index, events))
        seen = count(jnp.sum(mask, dtype=jnp.int32), mask.size)
        events = {"embed": {"tokens": seen}, **gather_events(net, found), "head": {"tokens": seen}}
        depth = jnp.full(token.shape[:1], len(self.layers), jnp.int32)
        cache = with_layer_caches(cache, caches)
        return Step(net.classify(x)[:, -1], cache, state, events, depth)
