"""The decode loop: prefill, then one compiled step a token, with donated caches."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Ledger
from dyncomp.core.typing import Variables
from dyncomp.decoding.batch import bucket, pad_left
from dyncomp.decoding.generated import Generated, Tick, collect
from dyncomp.decoding.net import separate
from dyncomp.decoding.policies import FullDepth, Policy
from dyncomp.decoding.sampling import GREEDY, Sampler
from dyncomp.decoding.steps import Steps
from dyncomp.decoding.written import check_lengths, position_limit
from dyncomp.models import DecoderLM

FULL_DEPTH = FullDepth()


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
        self.policy = policy
        self.prompt_ledger, self.ledger = Ledger({}), Ledger({})
        steps = Steps(self.model, policy, sampler, tuple(eos), keep_logits)
        self._prefill_step, self._decode_step = steps.prefill, steps.decode
        self._prefill = jax.jit(steps.prefill, static_argnums=(3,))
        self._step = jax.jit(steps.decode, donate_argnums=(1,))

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
        check_lengths(self.model, prompts, max_new)
        tokens, mask = pad_left(prompts, self.model.vocab_size, position_limit(self.model))
        capacity = self._capacity(tokens.shape[1], max_new, capacity)
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

    def _capacity(self, padded: int, max_new: int, capacity: int | None) -> int:
        needed = padded + max_new + self.policy.slack()
        if capacity is not None and needed > capacity:
            raise DyncompError(
                f"prompts padded to {padded} and {max_new} new tokens need {needed} slots, the cache has {capacity};"
                " cut the prompt, lower max_new or raise capacity"
            )
        return capacity or bucket(needed)
