"""An image classifier of spiking neurons that runs step by step and stops when it is sure (arXiv 2303.10276).

The same parameters are two networks: one of activations with few bits, run once, and one of spikes, run over steps
of time. Either is trained: the first and then converted, or the second through time.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from dyncomp.core.aux import Aux, Count
from dyncomp.core.choose import first_exit
from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.plans import ExitPlan
from dyncomp.core.sharding import param
from dyncomp.core.typing import Array, Float, Int
from dyncomp.exits.rules import ExitRule, RunningSumRule
from dyncomp.models.normed_conv import NormedConv
from dyncomp.models.spiking_units import Unit, current, neurons_of, prices, read, units_of
from dyncomp.recurrent.quantise import learned_step, top_level
from dyncomp.recurrent.spiking import Neuron

Training = Literal["quantised", "spiking"]
Weights = Mapping[str, Any]
"""What `SpikingClassifier.folded` gives: of each unit ``kernel``, ``bias``, ``theta`` (and ``side``), and ``head``."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steps:
    """What every step of time gave.

    Attributes:
      sums: float32 [x b c], the logits of all steps so far.
      scores: float32 [x b], what the rule looked at.
      leave: bool [x b], what it said.
      spikes: int32 [x b l], so far, of each unit.
    """

    sums: Any
    scores: Any
    leave: Any
    spikes: Any

    @property
    def answers(self) -> Float[Array, "x b c"]:
        """The mean of the logits so far: the answer after each step."""
        return self.sums / jnp.arange(1.0, len(self.sums) + 1.0)[:, None, None]


class SpikingClassifier(nn.Module):
    """Convolutions, batch norms, neurons; the image is a constant current, logits read the mean of the last spikes.

    Parameters: ``conv_i``, ``side_i``, ``scale_i`` (the quantiser's step s; theta = s (2^bits - 1)) and ``head``, which
    has no bias. Controls: the rule's ``threshold``, and running statistics. All layers move within one step.

    Attributes:
      classes: c.
      channels: of the images.
      widths: channels of each level; every level but the first begins with stride 2.
      convs: convolutions of each level.
      residual: a stem comes first, and every two convolutions are a residual block: its input is added, spikes to
        spikes, to the current of its second neurons (ResNet-18 of CIFAR: four levels of four).
      bits: of the source network's activations.
      training: which network ``train=True`` runs: ``quantised``, the source of a conversion, or ``spiking``.
      steps: T_max, how many steps one image runs at most.
      neuron: see `Neuron`; a conversion is faithful without leak, with soft reset and start 1/2.
      rule: decides after each step; default `RunningSumRule`.
      scale_init: s at the start; currents are normalised, so one number suits all layers. Ours, not the paper's.
    """

    classes: int
    channels: int = 1
    widths: Sequence[int] = (16, 32, 64)
    convs: Sequence[int] = (1, 2, 2)
    residual: bool = False
    bits: int = 2
    training: Training = "quantised"
    steps: int = 24
    neuron: Neuron = Neuron()
    rule: ExitRule | None = None
    scale_init: float = 0.75
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        if self.training not in ("quantised", "spiking"):
            raise DyncompError(f"training={self.training!r}: use 'quantised' or 'spiking'")
        if self.steps < 1:
            raise DyncompError(f"SpikingClassifier.steps={self.steps}: use 1 or more")
        top_level(self.bits), self.units  # noqa: B018 - both refuse what does not fit
        if (seen := getattr(self.stop, "classes", self.classes)) != self.classes:
            raise DyncompError(
                f"SpikingClassifier has {self.classes} classes, its rule {seen}; make them equal"
            )
        super().__post_init__()

    @property
    def stop(self) -> ExitRule:
        """The rule in use."""
        return RunningSumRule(classes=self.classes) if self.rule is None else self.rule

    @property
    def units(self) -> tuple[Unit, ...]:
        """In order."""
        return units_of(self.channels, self.widths, self.convs, self.residual)

    def setup(self):  # noqa: D102
        make = lambda *args: NormedConv(*args, dtypes=self.dtypes)
        self.conv = [make(unit.inner, unit.width, 3, unit.stride) for unit in self.units]
        self.side: list[Any] = [
            make(unit.side[0], unit.width, 1, unit.side[1])
            if unit.side and unit.projected
            else None
            for unit in self.units
        ]
        start = nn.initializers.constant(self.scale_init)
        self.scale = [param(self, f"scale_{i}", start, (), ()) for i in range(len(self.units))]
        lecun = nn.initializers.lecun_normal()
        shape = (self.widths[-1], self.classes)
        self.head = param(self, "head", lecun, shape, ("embed", None), self.dtypes.param)
        begin = lambda: jnp.asarray(self.stop.initial(), jnp.float32)
        self.threshold = self.variable("controls", "threshold", begin)

    def __call__(
        self,
        images: Float[Array | np.ndarray, "b h w _"],
        mask: Array | None = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
    ) -> tuple[dict[str, Array], Aux]:
        """Runs all steps (masked execution) and decides; with ``train``, the network that is trained.

        Returns:
          ``logits`` [x b c], the answer after each step (the mean of its logits so far; of a quantised network once),
          ``final`` [b c], the last of them, and ``emitted`` [b c], that of the step where an image stops. Without
          ``train`` also ``scores`` [x b], ``exit`` int32 [b] and ``costs`` [x], cumulative, the last is 1.
          Events per image: ``step`` and ``spikes`` are needed until it stops, and executed for all steps.
        """
        x = jnp.asarray(images).astype(self.dtypes.compute)
        if train or self.is_initializing():
            return self._trained(x, mask)
        found = self.simulate(self.folded(), x, self.threshold.value)
        plan = first_exit(found.leave[:-1].T, found.scores[:-1].T)
        answers = found.answers
        output = {
            "logits": answers,
            "scores": found.scores,
            "exit": plan.exit,
            "emitted": jnp.take_along_axis(answers, plan.exit[None, :, None], axis=0)[0],
            "final": answers[-1],
            "costs": jnp.asarray(self.cumulative_costs(images.shape), jnp.float32),
        }
        plans: dict[str, ExitPlan] = {"stop": plan} if "plan" in capture else {}
        return output, Aux({}, self._events(plan.exit, found.spikes, mask), plans)

    # ---- training

    def _trained(self, x: Array, mask: Array | None) -> tuple[dict[str, Array], Aux]:
        quantised = self.training == "quantised"
        many = 1 if quantised else self.steps
        logits = self._source(x, mask) if quantised else self._through_time(x, mask)
        answers = jnp.cumsum(logits, axis=0) / jnp.arange(1.0, many + 1.0)[:, None, None]
        real = _real(mask, x.shape[0])
        once = Count(real, jnp.ones_like(real))
        always = Count(many * real, many * jnp.ones_like(real))
        events = {"quantised": once} if quantised else {"first": once, "step": always}
        return {"logits": answers, "emitted": answers[-1], "final": answers[-1]}, Aux({}, events)

    def _source(self, x: Array, mask: Array | None) -> Float[Array, "1 b c"]:
        outs = [x]
        for i, unit in enumerate(self.units):
            y = self.conv[i](outs[-1], mask) + self._beside(i, unit, outs, mask)
            outs.append(learned_step(y, self.scale[i].astype(y.dtype), self.bits))
        return read(outs[-1], self.head)[None]

    def _through_time(self, x: Array, mask: Array | None) -> Float[Array, "x b c"]:
        """Layer by layer over all steps, so that a batch norm sees all of them."""
        t, b = self.steps, x.shape[0]
        flat = lambda y: y.reshape(t * b, *y.shape[2:])
        over = None if mask is None else jnp.tile(mask, t)
        outs = [x]
        for i, unit in enumerate(self.units):
            # The image is the same at every step: its convolution runs once.
            y = self.conv[i](outs[-1], over if i else mask) + self._beside(i, unit, outs, over)
            y = y.astype(jnp.float32)
            currents = y.reshape(t, b, *y.shape[1:]) if i else jnp.broadcast_to(y, (t, *y.shape))
            fired = self.neuron.run(currents, self._theta(i))
            outs.append(flat(fired).astype(x.dtype))
        return read(outs[-1], self.head).reshape(t, b, self.classes)

    def _beside(self, index: int, unit: Unit, outs: list[Array], mask: Array | None) -> Any:
        if unit.side is None:
            return 0.0
        return self.side[index](outs[-2], mask) if unit.projected else outs[-2]

    def _theta(self, index: int) -> Float[Array, ""]:
        return self.scale[index] * top_level(self.bits)

    # ---- running: pure functions of folded weights

    def folded(self) -> Weights:
        """The weights of the spiking network: norms folded, thresholds from the quantisers' steps (the conversion)."""
        units = []
        for i, unit in enumerate(self.units):
            kernel, bias = self.conv[i].folded()
            found = {"kernel": kernel, "bias": bias, "theta": self._theta(i)}
            if unit.projected:
                found["side"], more = self.side[i].folded()
                found["bias"] = bias + more
            units.append(found)
        return {"units": units, "head": self.head}

    def quantised(
        self, weights: Weights, images: Float[Array | np.ndarray, "b h w _"]
    ) -> Float[Array, "b c"]:
        """Logits of the source network."""
        outs = [jnp.asarray(images).astype(self.dtypes.compute)]
        for unit, own in zip(self.units, weights["units"], strict=True):
            y = current(unit, own, outs)
            step = own["theta"] / top_level(self.bits)
            outs.append(learned_step(y, step, self.bits).astype(outs[0].dtype))
        return read(outs[-1], weights["head"])

    def begin(
        self, weights: Weights, images: Float[Array | np.ndarray, "b h w _"]
    ) -> dict[str, Any]:
        """What an image carries from step to step.

        The current into the first neurons, which does not change, all membranes, each unit's spikes so far, the sum
        of logits and the number of steps, and the rule's state.
        """
        x = jnp.asarray(images).astype(self.dtypes.compute)
        b = x.shape[0]
        fed = current(self.units[0], weights["units"][0], [x])
        v, grid = [], x.shape[1:3]
        for unit, own in zip(self.units, weights["units"], strict=True):
            grid = unit.grid(*grid)
            v.append(self.neuron.begin((b, *grid, unit.width), own["theta"]))
        return {
            "current": fed,
            "v": v,
            "spikes": jnp.zeros((b, len(v)), jnp.int32),
            "sum": jnp.zeros((b, self.classes), jnp.float32),
            "count": jnp.zeros((b,), jnp.float32),
            "rule": self.stop.start(b),
        }

    def step(
        self, weights: Weights, carry: dict[str, Any], threshold: Float[Array, ""]
    ) -> tuple[dict[str, Any], Array, Array, Array]:
        """One step of time and the decision after it.

        Returns:
          (carry, answer [b c], leave [b] bool, score [b]).
        """
        outs, v, spikes = [], [], []
        for i, (unit, own) in enumerate(zip(self.units, weights["units"], strict=True)):
            y = current(unit, own, outs) if i else carry["current"]
            membrane, fired = self.neuron.step(carry["v"][i], y, own["theta"])
            v.append(membrane)
            spikes.append(jnp.sum(fired > 0, axis=(1, 2, 3), dtype=jnp.int32))
            outs.append(fired.astype(self.dtypes.compute))
        logits = read(outs[-1], weights["head"])
        no_gate = jnp.zeros(logits.shape[:1], jnp.float32)
        rule, leave, score = self.stop.step(carry["rule"], logits, no_gate, threshold)
        carry = {
            "current": carry["current"],
            "v": v,
            "spikes": carry["spikes"] + jnp.stack(spikes, axis=1),
            "sum": carry["sum"] + logits,
            "count": carry["count"] + 1.0,
            "rule": rule,
        }
        return carry, carry["sum"] / carry["count"][:, None], leave, score

    def simulate(
        self,
        weights: Weights,
        images: Float[Array | np.ndarray, "b h w _"],
        threshold: Float[Array, ""],
    ) -> Steps:
        """All steps for all images; nobody leaves, but what the rule says is noted."""

        def step(carry: dict[str, Any], _: None) -> tuple[dict[str, Any], Steps]:
            carry, _answer, leave, score = self.step(weights, carry, threshold)
            return carry, Steps(carry["sum"], score, leave, carry["spikes"])

        return lax.scan(step, self.begin(weights, images), None, length=self.steps)[1]

    # ---- accounts

    def _events(self, stop: Int[Array, "b"], spikes: Int[Array, "x b l"], mask: Array | None):
        """Steps and spikes until each image stops, and of all steps that were run."""
        real, everyone = _real(mask, stop.shape[0]), jnp.ones(stop.shape, jnp.int32)
        fired = jnp.take_along_axis(spikes, stop[None, :, None], axis=0)[0]
        return {
            "first": Count(real, everyone),
            "step": Count((stop + 1) * real, self.steps * everyone),
            "spikes": {
                f"unit_{i}": Count(fired[:, i] * real, spikes[-1, :, i])
                for i in range(len(self.units))
            },
        }

    @property
    def max_steps(self) -> int:
        """How often `step` runs at most."""
        return self.steps

    def neurons(self, inputs_shape: tuple[int, ...]) -> tuple[int, ...]:
        """How many each unit has, for images [b h w c]."""
        return neurons_of(self.units, inputs_shape[1], inputs_shape[2])

    def cost(self, inputs_shape: tuple[int, ...]) -> dict[str, Any]:
        """See `spiking_units.prices`."""
        item, (rows, columns) = self.dtypes.compute_itemsize, inputs_shape[1:3]
        return prices(self.units, rows, columns, self.classes, self.neuron.flops, item)

    def cumulative_costs(self, inputs_shape: tuple[int, ...]) -> list[float]:
        """FLOPs of stopping after each step, over those of all steps; the last is 1."""
        table = self.cost(inputs_shape)
        flops = [table["first"].flops + n * table["step"].flops for n in range(1, self.steps + 1)]
        return [value / flops[-1] for value in flops]


def _real(mask: Array | None, b: int) -> Int[Array, "b"]:
    """int32, 1 for every image that is no padding."""
    return jnp.ones((b,), jnp.int32) if mask is None else mask.astype(bool).astype(jnp.int32)
