"""A language model of which every prefix of the blocks is a model too, read through one norm and head."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from dyncomp.core.aux import Aux, count
from dyncomp.core.dtypes import DTypes
from dyncomp.core.plans import ExitPlan
from dyncomp.core.sharding import param
from dyncomp.core.typing import Array, Factory, Float, Int, check_factory
from dyncomp.depth import check_depths, exit_logits, first_confident, max_probability
from dyncomp.models.decoder_lm import DecoderLM
from dyncomp.models.single_blocks import block_outputs, needed_until


class NestedLM(nn.Module):
    """Sub-models f_n = embedding, first n blocks, final norm, head (sorted fine-tuning, arXiv 2309.08968).

    One pass serves all. Logits of all exits together would be x times the model's: the output holds the normed states
    and the head instead, and `tasks.NestedObjective` makes the logits of one exit after another.

    Outside of training every token leaves at the first exit whose largest probability reaches its threshold (control
    ``thresholds`` [y], 2 at first: nobody leaves), as if the blocks above it had run for the caches' sake all the same
    (`decoding.ExitAndCatchUp` makes exactly these caches). Events then *need* the blocks up to the exit and the heads
    that were asked; all are executed.

    Parameters are the backbone's own, at the same paths; ``exit_heads`` only with ``own_heads``. Events: its own too,
    and ``exits/tokens``, the heads of early exits. Blocks must be dense.

    Attributes:
      backbone: factory of a `DecoderLM`, scanned or not.
      depths: blocks run at each exit, increasing; the last is all of them.
      own_heads: every early exit reads its state with the head plus a change of its own, zero at first ("SFT + ICT" of
        the paper: (x - 1) d v more parameters).
      norm_early: False leaves the final norm out at early exits (the paper's authors hold it to be important).
    """

    backbone: Factory
    depths: Sequence[int]
    own_heads: bool = False
    norm_early: bool = True

    def __post_init__(self):
        check_factory(self.backbone, "NestedLM.backbone")
        self.depths = tuple(self.depths)
        super().__post_init__()

    def setup(self):  # noqa: D102
        self.net = self.backbone()
        nn.share_scope(self, self.net)
        check_depths(self.depths, self.net.depth)
        if self.own_heads:
            shape = (len(self.depths) - 1, self.net.d_model, self.net.vocab_size)
            zeros, axes = nn.initializers.zeros_init(), ("exits", "embed", "vocab")
            self.exit_heads = param(self, "exit_heads", zeros, shape, axes, self.dtypes.param)
        nobody = lambda: jnp.full((len(self.depths) - 1,), 2.0, jnp.float32)
        self.thresholds = self.variable("controls", "thresholds", nobody)

    @property
    def dtypes(self) -> DTypes:
        """The backbone's."""
        return self.template().dtypes

    @property
    def layers(self) -> str:
        """How the backbone runs its blocks; `layout.apply` reads it."""
        return self.template().layers

    def template(self) -> DecoderLM:
        """The backbone without variables: what `decoding.Generator` runs, and its static properties."""
        return self.backbone(parent=None)

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        mask: Array | None = None,
        positions: Int[Array, "#b t"] | None = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
    ) -> tuple[dict[str, Array], Aux]:
        """Runs all blocks once.

        Returns:
          ``states`` [x b t d], what each exit's head reads; ``heads`` [d v], or [x d v] with ``own_heads``; float32
          logits ``emitted`` [b t v], of the exit where each token leaves, and ``final``, of the whole model. With
          ``capture=("plan",)`` plans hold the `ExitPlan` of all tokens ``exit``.
        """
        output, _, aux = self.read(tokens, mask, positions, train, capture)
        plans = aux.plans
        if train:
            events = self._events(aux.events, tokens, mask, None)
            return {**output, "emitted": output["final"]}, dataclasses.replace(
                aux, events=events, plans=plans
            )
        emitted, plan = self._decide(output)
        events = self._events(aux.events, tokens, mask, plan.exit.reshape(tokens.shape))
        plans = {**plans, "exit": plan} if "plan" in capture else plans
        return {**output, "emitted": emitted}, dataclasses.replace(aux, events=events, plans=plans)

    def read(
        self,
        tokens: Int[Array, "b t"],
        mask: Array | None = None,
        positions: Int[Array, "#b t"] | None = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
    ) -> tuple[dict[str, Array], Float[Array, "x b t d"], Aux]:
        """``states``, ``heads`` and ``final`` of all exits, their blocks' outputs as they are, and side results."""
        args = tokens, mask, positions, None, train, (*capture, "hidden")
        x, aux = self.net.hidden(*args)
        outputs = block_outputs(self.net.groups, aux.plans)
        raw = [*(outputs[depth - 1] for depth in self.depths[:-1]), x]
        early = [self.net.final_norm(y) for y in raw[:-1]] if self.norm_early else raw[:-1]
        states = jnp.stack([*early, self.net.final_norm(x)])
        output = {"states": states, "heads": self._heads(), "final": self.net.classify(x)}
        plans = aux.plans if "hidden" in capture else _without_states(aux.plans)
        return output, jnp.stack(raw), dataclasses.replace(aux, plans=plans)

    def _decide(self, output: dict[str, Array]) -> tuple[Float[Array, "b t v"], ExitPlan]:
        """Where each token leaves, and with which logits."""
        early = [exit_logits(output, index) for index in range(len(self.depths) - 1)]
        read = [*early, output["final"]]
        confidence = jnp.stack([max_probability(logits).reshape(-1) for logits in read])
        plan = first_confident(confidence, self.thresholds.value)
        left, emitted = plan.exit.reshape(read[0].shape[:2]), read[-1]
        for index, logits in enumerate(early):
            emitted = jnp.where((left == index)[..., None], logits, emitted)
        return emitted, plan

    def _events(
        self, events: Any, tokens: Array, mask: Array | None, left: Int[Array, "b t"] | None
    ) -> dict[str, Any]:
        """What tokens that leave at ``left`` need; None in training, where all exits are read."""
        real = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
        exits = len(self.depths) - 1
        if left is None:
            asked = exits * jnp.sum(real, dtype=jnp.int32)
            return {**events, "exits": {"tokens": count(asked, exits * tokens.size)}}
        asked = jnp.sum(jnp.where(real, jnp.minimum(left + 1, exits), 0), dtype=jnp.int32)
        head = jnp.sum(real & (left == exits), dtype=jnp.int32)
        ran = jnp.asarray(self.depths, jnp.int32)[left]
        return {
            **needed_until(self.net.groups, events, ran, real),
            "exits": {"tokens": count(asked, exits * tokens.size)},
            "head": {"tokens": count(head, tokens.size)},
        }

    def _heads(self) -> Float[Array, "*x d v"]:
        """What turns states into logits."""
        head = self.net.embedding.T if self.net.tie_embeddings else self.net.head
        if not self.own_heads:
            return head
        return head[None] + jnp.pad(self.exit_heads, ((0, 1), (0, 0), (0, 0)))

    def cost(self, inputs_shape: tuple[int, ...]) -> dict[str, Any]:
        """The backbone's prices, and an early exit's head."""
        prices = self.template().cost(inputs_shape)
        return {**prices, "exits": {"tokens": prices["head"]["tokens"]}}


def _without_states(plans: Any) -> Any:
    """Plans without the blocks' outputs; empty entries are left out."""
    kept = {
        name: _without_states(value) if isinstance(value, dict) else value
        for name, value in plans.items()
        if name != "hidden"
    }
    return {name: value for name, value in kept.items() if not isinstance(value, dict) or value}
