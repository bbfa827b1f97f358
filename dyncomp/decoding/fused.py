"""A large model steered, token by token, by what small experts learned (arXiv 2406.15480).

All T + 2 models read every token; one compiled step runs them, chooses expert and weight (`fusion`), and draws the
token that all read next. A grid of one value is a fixed weight (proxy tuning).
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Ledger
from dyncomp.core.typing import Array, Bool, Int, Variables
from dyncomp.decoding.batch import bucket
from dyncomp.decoding.fusion import Terms, alpha_grid, choose_fusion, fuse
from dyncomp.decoding.generated import Generated, Tick, collect
from dyncomp.decoding.net import Net, separate
from dyncomp.decoding.reading import Reading, begin, check_rows, newest, read
from dyncomp.decoding.sampling import GREEDY, Sampler
from dyncomp.decoding.session import Account, pad_right
from dyncomp.decoding.written import check_lengths, check_vocabularies, position_limit
from dyncomp.models import DecoderLM


@dataclasses.dataclass(frozen=True)
class FusedTick(Tick):
    """A step, and who steered it; ``depths`` is 0, several models ran.

    Attributes:
      expert: int32 [b].
      alpha: float32 [b].
      mismatch: float32 [b], J at the choice.
    """

    expert: Any = None
    alpha: Any = None
    mismatch: Any = None


@struct.dataclass
class Together:
    """Where all models stand; donated to the next step.

    Attributes:
      readings: by name, of all tokens but the newest.
      token: int32 [b], the newest.
      done: bool [b].
      step: int32 [].
    """

    readings: dict[str, Reading]
    token: Int[Array, "b"]
    done: Bool[Array, "b"]
    step: Int[Array, ""]


class FusedGenerator:
    """Generates with a large model, a small base and experts made from it, of one vocabulary.

    Args:
      large, base: (model, variables) as stored.
      experts: by name, the same.
      grid: weights to choose from, a run-time argument of every step; one value fixes the weight; None for 0..2 by 0.1.
      terms: see `fusion.mismatch`.
      allowed: bool [v], tokens that all vocabularies have; None for all.
      sampler: how a token is drawn from the fused logits.
      eos: tokens that end a sequence.
      keep_logits: give every step's fused logits to the host.

    Attributes:
      prompt_ledger, ledger: FLOPs of the last call, under ``large``, ``base`` and the experts' names.

    Raises:
      DyncompError: vocabularies differ in size (`pretrained.check_pair` compares the tokenizers too), no expert, a name
        taken twice.
    """

    def __init__(
        self,
        large: tuple[DecoderLM, Variables],
        base: tuple[DecoderLM, Variables],
        experts: Mapping[str, tuple[DecoderLM, Variables]],
        grid: Sequence[float] | np.ndarray | None = None,
        *,
        terms: Terms = "both",
        allowed: Any = None,
        sampler: Sampler = GREEDY,
        eos: Sequence[int] = (),
        keep_logits: bool = False,
    ):
        if not experts or {"large", "base"} & experts.keys():
            raise DyncompError(
                f"experts {sorted(experts)}: give at least one, not named 'large' or 'base'"
            )
        pairs = {"large": large, "base": base, **experts}
        check_vocabularies(**{name: pair[0] for name, pair in pairs.items()})
        self.models, self.variables = {}, {}
        for name, pair in pairs.items():
            self.models[name], self.variables[name] = separate(*pair)
        self.grid = np.asarray(alpha_grid() if grid is None else grid, np.float32)
        self.terms, self.allowed = terms, allowed
        self.sampler, self.eos, self.keep_logits = sampler, tuple(eos), keep_logits
        self._prompts, self._steps = Account(), Account()
        self._start = jax.jit(self._started, static_argnums=(5,))
        self._step = jax.jit(self._stepped, donate_argnums=(1,))

    @property
    def prompt_ledger(self) -> Ledger:
        """FLOPs of the prompts."""
        return self._prompts.settle()

    @property
    def ledger(self) -> Ledger:
        """FLOPs of the steps."""
        return self._steps.settle()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new: int,
        *,
        listener: Callable[[Tick], Any] | None = None,
        **options: Any,
    ) -> list[Generated]:
        """Runs `stream` to the end; ``listener`` sees every `FusedTick`, see `generated.collect`."""
        return collect(self.stream(prompts, max_new, **options), len(prompts), listener)

    def stream(
        self, prompts: Sequence[Sequence[int]], max_new: int, *, seed: int = 0, grid: Any = None
    ) -> Iterator[FusedTick]:
        """Yields each step as it is drawn, until all sequences have ended.

        Args:
          grid: weights for this call; the generator's where None.

        Raises:
          DyncompError: an empty prompt, an id outside the vocabulary, or more than a model takes.
        """
        for model in self.models.values():
            check_lengths(model, prompts, max_new)
            check_rows(model, len(prompts))
        limit = position_limit(*self.models.values())
        tokens, counts = pad_right(prompts, self.models["large"].vocab_size, limit)
        capacity = bucket(tokens.shape[1] + max_new)
        grid = jnp.asarray(self.grid if grid is None else grid, jnp.float32)
        key = jax.random.key(seed)
        costs = {name: model.cost((1, 1)) for name, model in self.models.items()}
        self._prompts, self._steps = Account(costs), Account(costs)
        together, told, events = self._start(self.variables, tokens, counts, grid, key, capacity)
        self._prompts.add(events)
        finished = np.zeros(len(prompts), bool)
        for turn in range(max_new):
            tick = FusedTick(**jax.device_get(told))
            yield tick
            finished = finished | tick.ended
            if turn == max_new - 1 or finished.all():
                return
            together, told, events = self._step(self.variables, together, grid, key)
            self._steps.add(events)

    def _started(self, variables, tokens, counts, grid, key, capacity: int) -> Any:
        """All models read the prompts."""
        b = tokens.shape[0]
        readings = {name: begin(model, b, capacity) for name, model in self.models.items()}
        blank = jnp.zeros((b,), jnp.int32)
        together = Together(readings, blank, jnp.zeros((b,), bool), jnp.int32(0))
        return self._advance(variables, together, tokens, counts, grid, key)

    def _stepped(self, variables, together: Together, grid, key) -> Any:
        """All models read the newest token."""
        counts = (~together.done).astype(jnp.int32)
        return self._advance(variables, together, together.token[:, None], counts, grid, key)

    def _advance(self, variables, together: Together, tokens, counts, grid, key) -> Any:
        """Reads, chooses, draws."""
        logits, readings, events = {}, {}, {}
        for name, model in self.models.items():
            net = Net(model, variables[name])
            x, readings[name], events[name] = read(net, together.readings[name], tokens, counts)
            logits[name] = net.classify(newest(x, counts))[:, 0]
        large, base, *experts = logits.values()
        parts = large, base, jnp.stack(experts)
        plan = choose_fusion(*parts, grid, terms=self.terms, allowed=self.allowed)
        fused = fuse(*parts, plan, allowed=self.allowed)
        token = self.sampler(jax.random.fold_in(key, together.step), fused)
        going = ~together.done
        ended = going & self._ends(token)
        after = Together(readings, token, together.done | ended, together.step + 1)
        told = {
            "tokens": token,
            "emitted": going & ~ended,
            "depths": jnp.zeros_like(token),
            "ended": ended,
            "stopped": jnp.zeros_like(ended),
            "expert": plan.expert,
            "alpha": plan.alpha,
            "mismatch": plan.mismatch,
        }
        return after, {**told, "logits": fused} if self.keep_logits else told, events

    def _ends(self, token: Int[Array, "b"]) -> Bool[Array, "b"]:
        ids = jnp.asarray(self.eos, jnp.int32)
        return jnp.any(token[:, None] == ids, axis=1)
