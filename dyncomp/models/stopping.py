"""A language model with a head at every exit and a controller that says continue, exit or stop."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from dyncomp.core.aux import Aux, count
from dyncomp.core.dtypes import DTypes
from dyncomp.core.ledger import Cost
from dyncomp.core.plans import ExitPlan
from dyncomp.core.sharding import param
from dyncomp.core.typing import Array, Factory, Float, Int, check_factory
from dyncomp.depth import Walk, decision, exit_logits, walk
from dyncomp.models.decoder_lm import DecoderLM
from dyncomp.models.single_blocks import kv_cost, needed_until


class StoppingLM(nn.Module):
    """The Stop & Exit Controller of code completion (arXiv 2401.09964), read as in its code.

    After every exit of a `NestedLM`, the last block included, one linear map d -> 3 without bias reads the block's raw
    output: stop, exit or continue. Outside of training a token is emitted by the first exit that says so with more
    probability than the control ``tau_exit``, or by the last. One whose walk ends in "stop" (``tau_stop``) would end
    the completion: its logits are those of the exit that stopped it, and the plan tells. Both controls are 1 at first,
    which never happens: everyone goes through.

    Parameters: those of `nested`, and ``controller`` [d 3] ([x d 3] with ``per_exit``). Events then need the blocks up
    to the exit, its head, the controller at every exit on the way (``controller/rows``), and the keys and values that
    an exit leaves to the blocks above (``fill/rows``); all but the last are executed for all tokens.

    Attributes:
      nested: factory of a `NestedLM`; ``own_heads=True, norm_early=False`` is the paper's.
      per_exit: a controller for each exit instead of one for all (ablation).
    """

    nested: Factory
    per_exit: bool = False

    def __post_init__(self):
        check_factory(self.nested, "StoppingLM.nested")
        super().__post_init__()

    def setup(self):  # noqa: D102
        self.inner = self.nested()
        nn.share_scope(self, self.inner)
        d = self.template().d_model
        shape, axes = (d, 3), ("embed", None)
        if self.per_exit:
            shape, axes = (len(self.inner.depths), d, 3), ("exits", "embed", None)
        init = nn.initializers.normal(d**-0.5)
        self.controller = param(self, "controller", init, shape, axes, self.dtypes.param)
        never = lambda: jnp.float32(1.0)
        self.tau_exit = self.variable("controls", "tau_exit", never)
        self.tau_stop = self.variable("controls", "tau_stop", never)

    @property
    def dtypes(self) -> DTypes:
        """The backbone's."""
        return self.template().dtypes

    @property
    def layers(self) -> str:
        """How the backbone runs its blocks; `layout.apply` reads it."""
        return self.template().layers

    def template(self) -> DecoderLM:
        """The backbone without variables."""
        return self.nested(parent=None).template()

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
          ``states``, ``heads`` and ``final`` of `NestedLM`; ``decisions`` float32 [x b t 3]; ``emitted`` [b t v]. With
          ``capture=("plan",)`` plans hold the `ExitPlan` ``exit`` of all tokens (scores: the probability to exit) and
          ``stopped`` bool [b t].
        """
        output, raw, aux = self.inner.read(tokens, mask, positions, train, capture)
        inner = "xbtd,xdc->xbtc" if self.per_exit else "xbtd,dc->xbtc"
        said = jnp.einsum(
            inner, raw, self.controller.astype(raw.dtype), preferred_element_type=jnp.float32
        )
        output = {**output, "decisions": said}
        if train:
            return {**output, "emitted": output["final"]}, aux
        taken = self._walk(said)
        left = taken.exit.reshape(tokens.shape)
        emitted = output["final"]
        for index in range(len(self.inner.depths) - 1):
            emitted = jnp.where((left == index)[..., None], exit_logits(output, index), emitted)
        plans = aux.plans
        if "plan" in capture:
            scores = nn.softmax(said, axis=-1)[..., 1].reshape(said.shape[0], -1).T
            stopped = taken.stopped.reshape(tokens.shape)
            plans = {**plans, "exit": ExitPlan(taken.exit, scores), "stopped": stopped}
        events = self._events(aux.events, tokens, mask, left)
        return {**output, "emitted": emitted}, dataclasses.replace(aux, events=events, plans=plans)

    def _walk(self, said: Float[Array, "x b t c"]) -> Walk:
        """Every token's way through the exits."""
        flat = said.reshape(said.shape[0], -1, said.shape[-1])
        return walk(decision(flat, self.tau_exit.value, self.tau_stop.value))

    def _events(
        self, events: Any, tokens: Array, mask: Array | None, left: Int[Array, "b t"]
    ) -> dict[str, Any]:
        """What tokens that leave at ``left`` need."""
        real = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
        depths, size = self.inner.depths, tokens.size
        total = lambda value: jnp.sum(jnp.where(real, value, 0), dtype=jnp.int32)
        ran = jnp.asarray(depths, jnp.int32)[left]
        early = left < len(depths) - 1
        return {
            **needed_until(self.template().groups, events, ran, real),
            "exits": {"tokens": count(total(early), (len(depths) - 1) * size)},
            "head": {"tokens": count(total(~early), size)},
            "controller": {"rows": count(total(left + 1), len(depths) * size)},
            "fill": {"rows": count(total(depths[-1] - ran), 0)},
        }

    def cost(self, inputs_shape: tuple[int, ...]) -> dict[str, Any]:
        """The nested model's prices, the controller's, and that of keys and values made without running a block."""
        model = self.template()
        fill, rows = kv_cost(model), Cost(2 * 3 * model.d_model)
        prices = self.nested(parent=None).cost(inputs_shape)
        return {**prices, "controller": {"rows": rows}, "fill": {"rows": fill}}
