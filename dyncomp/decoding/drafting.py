"""Who drafts for speculative decoding: another model, the same one without some layers, or its first layers.

A drafter is a frozen dataclass of static choices and weights. All but `OtherModel` draft on the target's own cache and
take back what they wrote there. Letter: ``k`` tokens drafted at most, the compiled width.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from dyncomp.core.typing import Array, Float, Int
from dyncomp.decoding.net import Net
from dyncomp.decoding.reading import Reading
from dyncomp.models import DecoderLM

Choose = Callable[[Array, Float[Array, "b v"]], tuple[Int[Array, "b"], Any]]
"""(index of the draft, logits) -> (token, its distribution; None when greedy)."""


@struct.dataclass
class Request:
    """What a drafter is asked for.

    Attributes:
      reading: the target's, of all but the newest token.
      newest: int32 [b], that token.
      lengths: int32 [b], tokens to draft.
      going: bool [b], rows that have not ended.
      choose: how a token is drawn (static).
      k: static width.
    """

    reading: Reading
    newest: Int[Array, "b"]
    lengths: Int[Array, "b"]
    going: Array
    choose: Choose = struct.field(pytree_node=False)
    k: int = struct.field(pytree_node=False)


@struct.dataclass
class Drafted:
    """What comes back.

    Attributes:
      tokens: int32 [b k].
      proposed: float32 [b k v], the distributions that tokens were drawn from; None when greedy.
      reading: the target's, with what the drafter left for `Drafter.verify`.
      state: the drafter's.
      outputs: what `Drafter.verify` goes on from, or None.
      events: of the drafting.
    """

    tokens: Int[Array, "b k"]
    proposed: Any
    reading: Reading
    state: Any
    outputs: Any
    events: Any


@runtime_checkable
class Drafter(Protocol):
    """How tokens are guessed, and what the target then has left to do."""

    def check(self, target: DecoderLM) -> None:
        """Refuses a target that it cannot draft for."""
        ...

    def weights(self) -> Any:
        """Run-time arguments of the functions below."""
        ...

    def cost(self, target: DecoderLM) -> dict[str, Any]:
        """Prices of its events."""
        ...

    def start(
        self, weights: Any, tokens: Array, counts: Array, newest: Array, capacity: int
    ) -> tuple[Any, Any]:
        """Reads the prompts [b t]; (state, events or None)."""
        ...  # fmt: skip

    def draft(self, net: Net, weights: Any, state: Any, request: Request) -> Drafted:
        """Guesses."""
        ...

    def verify(
        self, net: Net, drafted: Drafted, tokens: Array, counts: Array
    ) -> tuple[Array, Reading, Any]:
        """The target reads the newest token and the drafts: `reading.read`, of what is left to do."""
        ...

    def settle(
        self, state: Any, request: Request, drafted: Drafted, accepted: Array, own: Array
    ) -> Any:
        """The state once so many drafts were kept and the target has said its own token."""
        ...  # fmt: skip


@struct.dataclass
class Round:
    """Drafting under way.

    Attributes:
      tokens: int32 [b k], drafted so far.
      proposed: their distributions, or None.
      memory: the drafter's: caches, outputs.
      events: so far.
    """

    tokens: Int[Array, "b k"]
    proposed: Any
    memory: Any
    events: Any


Turn = Callable[[Any, Int[Array, "b 1"], Array], tuple[Float[Array, "b v"], Any, Any]]
"""(memory, the token to read, index of the draft) -> (logits of the next token, memory, events)."""


def blank_round(request: Request, turn: Turn, memory: Any) -> Round:
    """Nothing drafted and nothing counted yet."""
    b, k = request.newest.shape[0], request.k
    given = memory, request.newest[:, None], jnp.int32(0)
    logits, events = jax.eval_shape(lambda *given: turn(*given)[::2], *given)
    drawn = jax.eval_shape(request.choose, jnp.int32(0), logits)
    proposed = jax.tree.map(lambda s: jnp.zeros((b, k, *s.shape[1:]), s.dtype), drawn[1])
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), events)
    return Round(jnp.zeros((b, k), jnp.int32), proposed, memory, zeros)


def draft_turns(now: Round, request: Request, turn: Turn, first: int) -> Round:
    """Drafts from index ``first`` on until the row that wants most has all."""

    def body(place: Array, now: Round) -> Round:
        own = lax.dynamic_slice_in_dim(now.tokens, jnp.maximum(place - 1, 0), 1, axis=1)
        token = jnp.where(place == 0, request.newest[:, None], own)
        return add_turn(now, request, place, *turn(now.memory, token, place))

    return lax.fori_loop(first, jnp.max(request.lengths), body, now)


def add_turn(
    now: Round, request: Request, place: Array, logits: Array, memory: Any, events: Any
) -> Round:
    """``now`` after a turn, with the token that is drawn from its logits."""
    token, distribution = request.choose(place, logits)
    put = lambda whole, one: lax.dynamic_update_slice_in_dim(whole, one[:, None], place, axis=1)
    return Round(
        tokens=put(now.tokens, token),
        proposed=jax.tree.map(put, now.proposed, distribution),
        memory=memory,
        events=jax.tree.map(jnp.add, now.events, events),
    )
