"""Where a decode step may end early: what an exit says, and who leaves there."""

import dataclasses
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from dyncomp.core.ledger import Cost
from dyncomp.core.typing import Array, Bool, Float
from dyncomp.decoding.net import Net
from dyncomp.depth import EXIT, STOP, decision


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
    """Who leaves at an exit, and who ends there; ``controls`` are run-time arguments.

    Attributes:
      reads_logits: whether it wants the exit's logits. One that does not is also asked after the last block (where only
        ending means anything), and an exit's head then runs for the rows that leave there alone.
    """

    reads_logits: ClassVar[bool]

    def controls(self, exits: int) -> Any:
        """Arguments with which nobody leaves early; leaves have a leading axis [y], or [x] if asked after the last."""
        ...

    def leave(
        self, net: Net, logits: Array | None, x: Float[Array, "b 1 d"], controls: Any
    ) -> tuple[Bool[Array, "b"], Bool[Array, "b"]]:
        """(rows that take this exit's token, rows that end without one), ``controls`` being the exit's."""
        ...

    def cost(self, model: Any) -> Cost:
        """Price of asking for one row."""
        ...


@dataclasses.dataclass(frozen=True)
class Confident:
    """Leaves where the highest probability reaches the exit's threshold (Sorted LLaMA, arXiv 2309.08968)."""

    reads_logits: ClassVar[bool] = True

    def controls(self, exits: int) -> Float[Array, "y"]:
        """Thresholds above 1."""
        return jnp.full((exits,), 2.0, jnp.float32)

    def leave(self, net, logits, x, controls):
        """max softmax >= threshold."""
        best = jnp.max(jax.nn.softmax(logits, axis=-1), axis=-1)
        return best >= controls, jnp.zeros(best.shape, bool)

    def cost(self, model: Any) -> Cost:
        """The logits are there."""
        return Cost(0)


@dataclasses.dataclass(frozen=True)
class Controlled:
    """Leaves or ends as a trained controller says (arXiv 2401.09964); see `dyncomp.depth.decision`.

    Weights: ``exits/controller`` [d 3], of `models.StoppingLM`. Controls: ``exit`` and ``stop``, thresholds of each
    exit, the last one included; 1 never happens, 0 lets the argmax decide.
    """

    reads_logits: ClassVar[bool] = False

    def controls(self, exits: int) -> dict[str, Float[Array, "x"]]:
        """Thresholds of 1."""
        return {name: jnp.ones((exits + 1,), jnp.float32) for name in ("exit", "stop")}

    def leave(self, net, logits, x, controls):
        """Rows whose decision is to exit, and to stop."""
        weights = net.variables["exits"]["controller"].astype(x.dtype)
        said = jnp.einsum("bd,dc->bc", x[:, -1], weights, preferred_element_type=jnp.float32)
        found = decision(said, controls["exit"], controls["stop"])
        return found == EXIT, found == STOP

    def cost(self, model: Any) -> Cost:
        """A map d -> 3."""
        return Cost(2 * 3 * model.d_model)
