"""Where a decode step may end early: what an exit says, and who leaves there."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from dyncomp.core.ledger import Cost
from dyncomp.core.typing import Array, Bool, Float
from dyncomp.decoding.net import Net


@runtime_checkable
class Readout(Protocol):
    """Logits at an exit. Its weights are in ``net.variables["exits"]``, where it has any."""

    def logits(self, net: Net, exit: int, x: Float[Array, "b 1 d"]) -> Float[Array, "b v"]:
        """Next-token logits of exit ``exit`` from the output of its block, float32."""
        ...

    def cost(self, model: Any) -> Cost:
        """Price of one row."""
        ...


@dataclasses.dataclass(frozen=True)
class SharedHead:
    """The model's own final norm and head at every exit (Sorted LLaMA, arXiv 2309.08968)."""

    def logits(self, net, exit, x):
        """The model's classifier."""
        return net.classify(x)[:, -1]

    def cost(self, model: Any) -> Cost:
        """The head's."""
        return model.cost((1, 1))["head"]["tokens"]


@dataclasses.dataclass(frozen=True)
class OwnHeads:
    """A linear head d -> v an exit, on the block's raw output, without a norm (arXiv 2401.09964).

    Weights: ``exits/heads`` [y d v], without bias.
    """

    def logits(self, net, exit, x):
        """x W of the exit, accumulated in float32."""
        head = net.variables["exits"]["heads"][exit]
        return jnp.einsum("bd,dv->bv", x[:, -1], head, preferred_element_type=jnp.float32)

    def cost(self, model: Any) -> Cost:
        """A matrix-vector product."""
        return model.cost((1, 1))["head"]["tokens"]


def mapped(x: Float[Array, "*n d"], change: Float[Array, "d d"]) -> Float[Array, "*n d"]:
    """x + x M, what `MappedHead` gives to the model's norm and head."""
    return x + jnp.einsum("...d,de->...e", x, change.astype(x.dtype))


@dataclasses.dataclass(frozen=True)
class MappedHead:
    """A linear map d -> d an exit, then the model's own norm and head: small beside a head for each exit.

    Weights: ``exits/maps`` [y d d], added to the identity.
    """

    def logits(self, net, exit, x):
        """The model's classifier on x + x M of the exit."""
        return net.classify(mapped(x, net.variables["exits"]["maps"][exit]))[:, -1]

    def cost(self, model: Any) -> Cost:
        """The map and the head."""
        d = model.d_model
        return Cost(2 * d * d) + model.cost((1, 1))["head"]["tokens"]


@runtime_checkable
class LeaveRule(Protocol):
    """Who leaves at an exit, and who ends there; ``controls`` are run-time arguments."""

    def controls(self, exits: int) -> Any:
        """Arguments with which nobody leaves early; leaves have a leading axis [y]."""
        ...

    def leave(
        self, net: Net, logits: Float[Array, "b v"], x: Float[Array, "b 1 d"], controls: Any
    ) -> tuple[Bool[Array, "b"], Bool[Array, "b"]]:
        """(rows that take this exit's token, rows that end without one), ``controls`` being the exit's."""
        ...


@dataclasses.dataclass(frozen=True)
class Confident:
    """Leaves where the highest probability reaches the exit's threshold (Sorted LLaMA, arXiv 2309.08968)."""

    def controls(self, exits: int) -> Float[Array, "y"]:
        """Thresholds above 1."""
        return jnp.full((exits,), 2.0, jnp.float32)

    def leave(self, net, logits, x, controls):
        """max softmax >= threshold."""
        best = jnp.max(jax.nn.softmax(logits, axis=-1), axis=-1)
        return best >= controls, jnp.zeros(best.shape, bool)
