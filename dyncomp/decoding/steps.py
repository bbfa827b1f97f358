"""The two steps of the decode loop as pure functions: `Generator` runs them, ``dyncomp compile`` compiles them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dyncomp.core.typing import Array, Bool, Float, Int, Variables
from dyncomp.decoding.net import Net
from dyncomp.decoding.policies import FullDepth, Policy
from dyncomp.decoding.sampling import GREEDY, Sampler
from dyncomp.models import DecoderLM


@struct.dataclass
class Decoding:
    """Where a batch of sequences stands; donated to the next step.

    Attributes:
      cache: of all tokens but the last.
      token: int32 [b], the last one, not yet read by the network.
      position: int32 [b], its place in its sequence.
      done: bool [b].
      policy: the policy's state.
      step: int32 [], tokens drawn so far.
    """

    cache: Any
    token: Int[Array, "b"]
    position: Int[Array, "b"]
    done: Bool[Array, "b"]
    policy: Any
    step: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Steps:
    """Prefill and decode with one model and one policy.

    Attributes:
      model: with ``layers="unroll"``.
      policy: what a step computes.
      sampler: how a token is drawn.
      eos: tokens that end a sequence.
      keep_logits: give every step's logits too.
    """

    model: DecoderLM
    policy: Policy = FullDepth()
    sampler: Sampler = GREEDY
    eos: tuple[int, ...] = ()
    keep_logits: bool = False

    def prefill(
        self,
        variables: Variables,
        tokens: Any,
        mask: Any,
        capacity: int,
        controls: Any,
        key: Any,
    ) -> tuple[Decoding, dict[str, Any], Any]:
        """Runs left-padded prompts through everything and draws the first tokens.

        Args:
          variables: separate (`net.separate`).
          tokens: int32 [b t].
          mask: [b t], 1 for real tokens.
          capacity: slots of the cache, static.
          controls: of the policy.
          key: of the whole text.

        Returns:
          Where the batch stands, what the host is told (arrays [b]), and events.
        """
        net = Net(self.model, variables)
        cache = self.model.init_cache(tokens.shape[0], capacity)
        positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
        captures = getattr(self.policy, "captures", ())
        x, aux = net.hidden(tokens, positions, mask, cache, captures)
        first = self.policy.start(net, x, aux, controls)
        token = self.sampler(jax.random.fold_in(key, 0), first.logits)
        ended = self._ends(token)
        decoding = Decoding(
            first.cache, token, positions[:, -1] + 1, ended, first.state, jnp.int32(1)
        )
        told = self._told(token, ~ended, first.depth, ended, jnp.zeros_like(ended), first.logits)
        return decoding, told, first.events

    def decode(
        self, variables: Variables, decoding: Decoding, controls: Any, key: Any
    ) -> tuple[Decoding, dict[str, Any], Any]:
        """Reads the last tokens and draws the next; arguments and results as in `prefill`."""
        net, going = Net(self.model, variables), ~decoding.done
        now = decoding.token[:, None], decoding.position[:, None], going[:, None]
        out = self.policy.step(net, *now, decoding.cache, decoding.policy, controls)
        token = self.sampler(jax.random.fold_in(key, decoding.step), out.logits)
        stopped = jnp.zeros_like(going) if out.stop is None else going & out.stop
        ended = going & self._ends(token) | stopped
        after = Decoding(
            cache=out.cache,
            token=token,
            position=decoding.position + 1,
            done=decoding.done | ended,
            policy=out.state,
            step=decoding.step + 1,
        )
        told = self._told(token, going & ~ended, out.depth, ended, stopped, out.logits)
        return after, told, out.events

    def _told(self, token, emitted, depths, ended, stopped, logits: Float[Array, "b v"]):
        told = {"tokens": token, "emitted": emitted, "depths": depths, "ended": ended}
        told["stopped"] = stopped
        return {**told, "logits": logits} if self.keep_logits else told

    def _ends(self, token: Int[Array, "b"]) -> Bool[Array, "b"]:
        ids = jnp.asarray(self.eos, jnp.int32)
        return jnp.any(token[:, None] == ids, axis=1)
