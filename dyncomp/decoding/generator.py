"""The decode loop: prefill, then one compiled step a token, with donated caches."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Ledger
from dyncomp.core.typing import Array, Bool, Float, Int, Variables
from dyncomp.decoding.batch import bucket, pad_left
from dyncomp.decoding.generated import Generated, Tick, collect
from dyncomp.decoding.net import Net, separate
from dyncomp.decoding.policies import FullDepth, Policy
from dyncomp.decoding.sampling import GREEDY, Sampler
from dyncomp.models import DecoderLM

FULL_DEPTH = FullDepth()


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


class Generator:
    """Generates with one model and one policy; a program is compiled once for its batch, prompt and cache buckets.

    Finished rows of a batch go on as padding: nothing sees them and the ledger does not need them.

    Args:
      model, variables: as stored (stacked, or separate already).
      policy: what a step computes.
      sampler: how a token is drawn.
      eos: tokens that end a sequence.
      keep_logits: give every step's logits to the host (slow; for tests and pictures).

    Attributes:
      prompt_ledger, ledger: FLOPs of the last call, of its prompts and of its steps.
    """

    def __init__(
        self,
        model: DecoderLM,
        variables: Variables,
        policy: Policy = FULL_DEPTH,
        sampler: Sampler = GREEDY,
        eos: Sequence[int] = (),
        keep_logits: bool = False,
    ):
        self.model, self.variables = separate(model, variables)
        policy.check(self.model)
        self.policy, self.sampler, self.eos = policy, sampler, tuple(eos)
        self.keep_logits = keep_logits
        self.prompt_ledger, self.ledger = Ledger({}), Ledger({})
        self._prefill = jax.jit(self._prefill_step, static_argnums=(3,))
        self._step = jax.jit(self._decode_step, donate_argnums=(1,))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new: int,
        *,
        listener: Callable[[Tick], Any] | None = None,
        **options: Any,
    ) -> list[Generated]:
        """Runs `stream` to the end; ``listener`` and what it returns as in `generated.collect`."""
        return collect(self.stream(prompts, max_new, **options), len(prompts), listener)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new: int,
        *,
        seed: int = 0,
        controls: Any = None,
        capacity: int | None = None,
    ) -> Iterator[Tick]:
        """Yields each step as it is drawn, at most ``max_new``, until all sequences have ended.

        Args:
          prompts: token ids, at least one each; of any lengths.
          controls: the policy's run-time arguments; its defaults where None.
          capacity: slots of the cache; the bucket of what may be needed where None.

        Raises:
          DyncompError: an empty prompt, an id outside the vocabulary, or more than ``capacity`` or the model takes.
        """
        tokens, mask = pad_left(prompts, self.model.vocab_size)
        longest = max(map(len, prompts))
        capacity = self._capacity(longest, tokens.shape[1], max_new, capacity)
        controls = self.policy.controls() if controls is None else controls
        key, costs = jax.random.key(seed), self.costs()
        self.prompt_ledger, self.ledger = Ledger(costs), Ledger(costs)
        decoding, told, events = self._prefill(
            self.variables, tokens, mask, capacity, controls, key
        )
        self.prompt_ledger.record(jax.device_get(events))
        finished = np.zeros(len(prompts), bool)
        for turn in range(max_new):
            tick = Tick(**jax.device_get(told))
            yield tick
            finished |= tick.ended
            if turn == max_new - 1 or finished.all():
                return
            decoding, told, events = self._step(self.variables, decoding, controls, key)
            self.ledger.record(jax.device_get(events))

    def costs(self) -> dict[str, Any]:
        """Prices of what the model and the policy count."""
        own = getattr(self.policy, "cost", None)
        return {**self.model.cost((1, 1)), **({} if own is None else own(self.model))}

    def _capacity(self, longest: int, padded: int, max_new: int, capacity: int | None) -> int:
        if max_new < 1:
            raise DyncompError(f"max_new={max_new}: ask for at least one token")
        limit, needed = self.model.max_length, padded + max_new + self.policy.slack()
        if limit is not None and longest + max_new > limit:
            raise DyncompError(
                f"{longest} tokens of prompt and {max_new} new ones exceed the model's {limit}; cut the prompt"
            )
        if capacity is not None and needed > capacity:
            raise DyncompError(
                f"prompts padded to {padded} and {max_new} new tokens need {needed} slots, the cache has {capacity};"
                " cut the prompt, lower max_new or raise capacity"
            )
        return capacity or bucket(needed)

    def _prefill_step(self, variables, tokens, mask, capacity: int, controls, key) -> Any:
        """Runs the prompts [b t], left-padded, through everything and draws the first tokens."""
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

    def _decode_step(self, variables, decoding: Decoding, controls: Any, key) -> Any:
        """Reads the last tokens and draws the next."""
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
