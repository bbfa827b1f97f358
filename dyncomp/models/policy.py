"""A robot policy that decides at every control step how much of itself to run (DeeR-VLA, arXiv 2411.02359)."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dyncomp.core.aux import Aux
from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.plans import ExitPlan
from dyncomp.core.typing import Array, Factory, Float, Int, check_factory
from dyncomp.exits.action import ActionHead
from dyncomp.exits.consistency import ConsistencyRule
from dyncomp.exits.rules import decide
from dyncomp.exits.sampling import every_step, taken, two_runs
from dyncomp.models.control import (
    ControlState,
    averaged,
    blocks_of,
    check_policy,
    pooled,
    segment_weights,
)
from dyncomp.models.exiting import block_prices, segments_reached
from dyncomp.models.group import Execution, Group, GroupStack, Remat, check_execution
from dyncomp.models.seeing import ImageTokens, WordTokens, looked

Drawing = Literal["both", "every_step", "two_runs", "last"]
Compare = Literal["block", "input"]


class MultiExitPolicy(nn.Module):
    """Pictures and a sentence to actions, with exits between the blocks and one action head for all of them.

    One row of ``inputs`` is one control step: the pixels of all cameras one after another, then token numbers,
    negative for padding. What an exit sees is the maximum over real tokens of its block's output. While it trains, the
    shared head sees sequences of features from drawn exits, and every exit has an auxiliary head besides. While it
    acts, it leaves at the first exit whose action is within a bound of the action of the exit before, computed by the
    same head from the same memory; asking never moves the memory, only the exit that is taken does.

    Parameters: ``word_tokens``, ``see_i`` (an encoder for each size of picture), ``resample`` if there is one,
    ``group_i``, ``act`` and ``auxiliary``. Control: ``thresholds`` [x - 1], minus eta.

    Attributes:
      vocab, words: size of the vocabulary, and places for the sentence.
      d_model: d.
      groups: blocks, `models.SeeingBlock`.
      cameras: height and width of each picture.
      exits: block numbers, ascending; the last one is the deepest block that is kept.
      eyes: factory of the encoder of pictures.
      resampler: factory of what makes a few tokens of an encoder's many; None for all of them.
      head: factory of the action head.
      rule: what "the same action" means.
      compare: the first exit's action is compared with that of the first block's output (released code) or of the
        language model's input (paper).
      drawing: "both" ways of `exits.sampling`, one of them, or always the "last" exit (ablation).
      auxiliary_heads: whether there are any.
      reuse: control steps for which a decision stands.
      average: act with the mean pose of the two exits that agreed.
    """

    vocab: int
    words: int
    d_model: int
    groups: Sequence[Group]
    cameras: Sequence[tuple[int, int]]
    exits: Sequence[int]
    eyes: Factory = ImageTokens
    resampler: Factory | None = None
    head: Factory = ActionHead
    embed: Factory = WordTokens
    rule: ConsistencyRule = ConsistencyRule()
    compare: Compare = "block"
    drawing: Drawing = "both"
    auxiliary_heads: bool = True
    reuse: int = 1
    average: bool = False
    layers: Execution = "scan"
    remat: Remat = "none"
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        check_execution(self.layers, self.remat)
        for name in ("eyes", "head", "embed"):
            check_factory(getattr(self, name), f"MultiExitPolicy.{name}")
        self.groups, self.exits = tuple(self.groups), tuple(self.exits)
        self.cameras = tuple(tuple(size) for size in self.cameras)
        check_policy(self)
        super().__post_init__()

    def setup(self):  # noqa: D102
        own = {"dtypes": self.dtypes}
        self.word_tokens = self.embed(vocab=self.vocab, d_model=self.d_model, **own)
        self.see = [self.eyes(**own) for _ in self._sizes]
        if self.resampler is not None:
            self.resample = self.resampler(**own)
        self.group = self._stacks()
        self.act = self.head(**own)
        if self.auxiliary_heads:
            self.auxiliary = self.head(**own)

    def _stacks(self, **kwargs: Any) -> list[GroupStack]:
        return [
            GroupStack(group, self.layers, self.remat, self.dtypes, **kwargs)
            for group in self.groups
        ]

    @property
    def _sizes(self) -> list[tuple[int, int]]:
        """The cameras' different sizes, in order."""
        return list(dict.fromkeys(self.cameras))

    @property
    def depth(self) -> int:
        """x: exits, and segments."""
        return len(self.exits)

    @property
    def blocks(self) -> list[int]:
        """Blocks that have run at each exit."""
        return [block + 1 for block in self.exits]

    @property
    def observation(self) -> int:
        """m, numbers of a row of inputs."""
        return sum(3 * height * width for height, width in self.cameras) + self.words

    @property
    def state_size(self) -> int:
        """s, numbers of the head's memory."""
        return self.head(parent=None, dtypes=self.dtypes).state_size

    def start(self, batch: int) -> ControlState:
        """At the beginning of an episode."""
        zeros = jnp.zeros((batch,), jnp.int32)
        return ControlState(jnp.zeros((batch, self.state_size), jnp.float32), zeros, zeros)

    @nn.compact  # the only method with controls: what acts gets thresholds as an argument
    def __call__(
        self,
        inputs: Float[Array | np.ndarray, "b t m"],
        mask: Array | None = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
    ) -> tuple[dict[str, Array], Aux]:
        """All heads on windows of t control steps that begin with an empty memory.

        Draws come from the random stream "router", without one (evaluation) from a fixed key.

        Returns:
          ``auxiliary`` [x b t a] (x = 0 without those heads) and ``drawn`` [k b t a], what the shared head says on each
          drawn sequence. Not while training: ``emitted`` [b t a] and ``exit`` [b t], acting with the thresholds, and
          ``deltas`` [b t x - 1], the scores of all exits behind a history of drawn exits; ``costs`` [x], the share of
          the blocks that each exit takes.
          Events are per control step [b t].
        """
        b, t, _ = inputs.shape
        seen = self.features(jnp.asarray(inputs).reshape(b * t, -1), train)
        seen = seen.reshape(-1, b, t, self.d_model)
        key = self.make_rng("router") if self.has_rng("router") else jax.random.key(0)
        output = self._heads(seen[1:], key, train)
        start = lambda: jnp.full((self.depth - 1,), self.rule.initial(), jnp.float32)
        thresholds = self.variable("controls", "thresholds", start).value
        left = jnp.full((b, t), self.depth - 1, jnp.int32)
        plans: dict[str, Any] = {}
        if not train and not self.is_initializing():
            emitted, plan = self.walk(seen, jnp.asarray(thresholds))
            left = plan.exit
            output |= {"emitted": emitted, "exit": left, "deltas": self.deltas(seen, key)}
            # Of the language model alone, as published budgets count.
            output["costs"] = jnp.asarray(self.blocks, jnp.float32) / self.blocks[-1]
            plans = {"exit": plan} if "plan" in capture else {}
        if mask is not None:
            mask = jnp.broadcast_to(mask.reshape(b, -1), (b, t))
        return output, Aux(events=segments_reached(left, self.depth, mask), plans=plans)

    def _heads(
        self, seen: Float[Array, "x b t d"], key: Array, train: bool
    ) -> dict[str, Float[Array, "..."]]:
        """What is trained: auxiliary heads on their own exits, the shared head on drawn ones."""
        (x, b, t, _), zeros = seen.shape, jnp.zeros((seen.shape[1], self.state_size), jnp.float32)
        drawn = jnp.stack([taken(seen, index) for index in self._draw(key, b, t)])
        k = drawn.shape[0]
        said, _ = self.act(drawn.reshape(k * b, t, -1), jnp.tile(zeros, (k, 1)), train)
        output = {"drawn": said.reshape(k, b, t, -1)}
        if not self.auxiliary_heads:
            return {**output, "auxiliary": output["drawn"][:0]}
        run = nn.vmap(
            lambda head, features: head(features, zeros, train)[0],
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            axis_size=x,
            metadata_params={nn.PARTITION_NAME: "exits"},
        )
        return {**output, "auxiliary": run(self.auxiliary, seen)}

    def _draw(self, key: Array, b: int, t: int) -> list[Int[Array, "b t"]]:
        """Exits [b t] of each sequence that the shared head sees."""
        if self.drawing == "last":
            return [jnp.full((b, t), self.depth - 1, jnp.int32)]
        ways = {"every_step": every_step, "two_runs": two_runs}
        if self.drawing != "both":
            ways = {self.drawing: ways[self.drawing]}
        keys = jax.random.split(key, len(ways))
        return [way(key, b, t, self.depth) for way, key in zip(ways.values(), keys, strict=True)]

    # ---- features

    def features(
        self, rows: Float[Array | np.ndarray, "n m"], train: bool = False
    ) -> Float[Array, "p n d"]:
        """What is compared with the first exit, then what each exit sees: p = x + 1 rows of features."""
        x, media, real = self.begin_tokens(rows)
        first, kept = x, []
        below = {"media": media}
        for stack in self.group:
            x, aux = stack(x, None, real, None, train, ("hidden",), below)
            blocks = [aux.plans[f"block_{j}"]["hidden"] for j in range(len(stack.group.blocks))]
            order = jnp.stack(blocks, axis=1)  # [repeat, period, n, l, d]
            kept.append(order.reshape(-1, *order.shape[2:]))
        hidden = jnp.concatenate(kept)
        before = hidden[0] if self.compare == "block" else first
        chosen = jnp.concatenate([before[None], hidden[jnp.asarray(self.exits)]])
        return pooled(chosen, jnp.broadcast_to(real[None], chosen.shape[:-1]))

    def begin_tokens(self, rows: Float[Array | np.ndarray, "n m"]) -> tuple[Array, Array, Array]:
        """(word tokens [n l d], media [n s m], which words are real [n l]) of rows of inputs.

        Raises:
          DyncompError: rows of another length.
        """
        if rows.shape[-1] != self.observation:
            raise DyncompError(
                f"MultiExitPolicy: rows of {rows.shape[-1]} numbers; cameras {self.cameras} and words={self.words}"
                f" make {self.observation}"
            )
        rows = jnp.asarray(rows)
        words = jnp.round(rows[:, -self.words :]).astype(jnp.int32)
        media, at = [], 0
        for height, width in self.cameras:
            picture = rows[:, at : at + 3 * height * width].reshape(-1, height, width, 3)
            at += 3 * height * width
            tokens = self.see[self._sizes.index((height, width))](picture)
            media.append(tokens if self.resampler is None else self.resample(tokens))
        return self.word_tokens(words), jnp.concatenate(media, axis=1), words >= 0

    # ---- acting

    def asked(
        self, seen: Float[Array, "p b d"], state: Float[Array, "b s"]
    ) -> tuple[Float[Array, "p b a"], Float[Array, "p b s"]]:
        """The shared head on every row of features, all from one memory: actions, and what the memory would become."""
        p, b, d = seen.shape
        said, after = self.act(seen.reshape(p * b, 1, d), jnp.tile(state, (p, 1)))
        return said.reshape(p, b, -1), after.reshape(p, b, -1)

    def decided(
        self, seen: Float[Array, "p b d"], state: ControlState, thresholds: Float[Array, "y"]
    ) -> tuple[Float[Array, "b a"], ControlState, ExitPlan]:
        """One control step from its features: the action, what is remembered, and the plan."""
        said, after = self.asked(seen, state.head)
        plan = decide(self.rule, said[1:-1], None, thresholds, said[0])
        left = jnp.where(state.age % self.reuse == 0, plan.exit, state.exit)
        pick = lambda leaf: jnp.take_along_axis(leaf, left[None, :, None] + 1, axis=0)[0]
        action = pick(said)
        if self.average:
            before = jnp.take_along_axis(said, left[None, :, None], axis=0)[0]
            action = averaged(before, action)
        plan = ExitPlan(left, plan.scores)
        return action, ControlState(pick(after), left, state.age + 1), plan

    def control(
        self,
        rows: Float[Array | np.ndarray, "b m"],
        state: ControlState,
        thresholds: Float[Array, "y"],
    ) -> tuple[Float[Array, "b a"], ControlState, ExitPlan]:
        """One control step; everything is computed (masked execution)."""
        return self.decided(self.features(rows), state, thresholds)

    def walk(
        self, seen: Float[Array, "p b t d"], thresholds: Float[Array, "y"]
    ) -> tuple[Float[Array, "b t a"], ExitPlan]:
        """A window, step by step; the plan is of control steps: exit [b t], scores [b t x]."""

        def step(policy: Any, state: ControlState, now: Array) -> tuple[ControlState, Any]:
            action, state, plan = policy.decided(now, state, thresholds)
            return state, (action, plan)

        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False}, in_axes=2)
        _, (actions, plan) = scan(self, self.start(seen.shape[1]), seen)
        return actions.swapaxes(0, 1), jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), plan)

    def deltas(self, seen: Float[Array, "p b t d"], key: Array) -> Float[Array, "b t y"]:
        """Scores (minus distances) of all exits but the last, behind histories of exits drawn at every step."""
        _, b, t, _ = seen.shape
        drawn = every_step(key, b, t, self.depth).T

        def step(policy: Any, state: Array, now: Any) -> tuple[Array, Array]:
            features, index = now
            said, after = policy.asked(features, state)
            scores = policy.rule.score(said[:-2], said[1:-1])
            return jnp.take_along_axis(after, index[None, :, None] + 1, axis=0)[0], scores

        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        start = jnp.zeros((b, self.state_size), jnp.float32)
        _, scores = scan(self, start, (jnp.moveaxis(seen, 2, 0), drawn))
        return jnp.transpose(scores, (2, 0, 1))

    # ---- segments, for the runtime

    def begin(self, rows: Float[Array | np.ndarray, "b z"]) -> dict[str, Array]:
        """What segments carry; a row is an observation with the head's memory behind it, z = m + s."""
        rows = jnp.asarray(rows)
        x, media, real = self.begin_tokens(rows[:, : self.observation])
        action = jnp.zeros((rows.shape[0], self.head(parent=None).pose + 1), jnp.float32)
        state = rows[:, self.observation :]
        return {"x": x, "media": media, "real": real, "action": action, "state": state}

    def segment(
        self, index: int, carry: dict[str, Array], threshold: Float[Array, ""]
    ) -> tuple[dict[str, Array], Array, Array, Array]:
        """Blocks up to exit ``index`` and the decision there; needs ``layers="unroll"`` and unstacked variables.

        Returns:
          (carry, output [b a + s], leave [b] bool, score [b]). The output is the action and the memory after it.
        """
        x, before = carry["x"], carry["action"]
        ask = lambda x: self.asked(pooled(x, carry["real"])[None], carry["state"])
        if index == 0 and self.compare == "input":
            before = ask(x)[0][0]
        for block in blocks_of(self.exits, index):
            x = self._block(block, x, carry["real"], carry["media"])
            if block == 0 and index == 0 and self.compare == "block":
                before = ask(x)[0][0]
        action, state = (rows[0] for rows in ask(x))
        _, leave, score = self.rule.step(before, action, None, threshold)
        if index == self.depth - 1:
            leave, score = jnp.ones_like(leave), jnp.full_like(score, jnp.nan)
        told = averaged(before, action) if self.average else action
        carry = {**carry, "x": x, "action": action}
        return carry, jnp.concatenate([told, state], axis=1), leave, score

    def _block(self, index: int, x: Array, real: Array, media: Array) -> Array:
        for stack in self.group:
            if index < stack.depth:
                return stack.run(index, x, None, real, below={"media": media})[0]
            index -= stack.depth
        raise AssertionError("unreachable: exits are checked")

    def weights_of(self, params: Any, index: int | None) -> Any:
        """The parameters, unstacked, that segment ``index`` uses; None: those of `begin`."""
        return segment_weights(params, self.exits, index)

    # ---- account

    def cost(self, inputs_shape: tuple[int, ...]) -> dict[str, Cost]:
        """Price of each segment for one control step, at full sentence length; the shape is not looked at.

        Segment 0 also encodes the pictures and asks the head twice, for the comparison and for its own exit. The
        published figures leave the vision encoder and the head out; here they are in.
        """
        head = self.head(parent=None, dtypes=self.dtypes).cost(self.d_model)
        tokens = 0
        first = head
        for size in self.cameras:
            eyes = self.eyes(parent=None, dtypes=self.dtypes)
            first, many = first + eyes.cost(size), eyes.length(size)
            if self.resampler is not None:
                resample = self.resampler(parent=None, dtypes=self.dtypes)
                first, many = first + resample.cost(eyes.d_model, many), resample.latents
            tokens += many
        table = {
            f"group_{index}": stack.cost(self.d_model, self.words)
            for index, stack in enumerate(self._stacks(parent=None))
        }
        blocks = block_prices(table, self, self.words, looked(self.words, tokens))
        prices, done = [], 0
        for block in self.exits:
            prices.append(sum(blocks[done : block + 1], head))
            done = block + 1
        prices[0] = prices[0] + first
        return {f"segment_{index}": price for index, price in enumerate(prices)}
