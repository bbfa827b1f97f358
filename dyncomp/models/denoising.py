"""A diffusion network whose every denoising step may end early: probes after its blocks, one head for all of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dyncomp.core.aux import Aux
from dyncomp.core.dtypes import DTypes
from dyncomp.core.ledger import Cost
from dyncomp.core.typing import Array, Factory, Float, Key, check_factory
from dyncomp.diffusion.certainty import CertaintyProbes, CertaintyRule
from dyncomp.diffusion.schedules import NoiseSchedule, time_embedding
from dyncomp.exits.rules import ExitRule, decide
from dyncomp.models.exiting import (
    block_prices,
    cumulative_costs,
    only_block,
    segments_reached,
)
from dyncomp.models.uvit import unpatched

FIXED_KEY = 0
"""Seed of the noise where no random stream is given (evaluation)."""


class ExitingDenoiser(nn.Module):
    """A U-ViT with an exit after every block (DeeDiff / AdaDiff, arXiv 2309.17074).

    A step of denoising stops after the first block whose probe is certain enough, and the network's own head reads
    the noise there. A stop before the middle of the network drops the long skips. Parameters: ``net``, ``probes``.
    Controls: ``thresholds`` [y] of the rule (the last exit decides nothing).

    Called on clean images it draws times and noise: from the stream "dropout" where there is one (training: times
    uniform in [0, 1)), else fixed ones, times spread evenly over the batch (evaluation). `denoise` and the segments
    (`begin`, `segment`; inputs as `packed` makes them) take x_t and its time instead.

    Attributes:
      backbone: factory of a network with ``embed``, ``hidden``, ``run_block``, ``skip_of``, ``predict``, ``blocks``,
        ``half``, ``length``, ``groups`` and ``cost`` (`UViT`).
      probes: factory, called with ``exits``, ``outputs`` and ``dtypes``.
      rule: decides where each example stops; its ``gate`` is the mean of the probe's map.
      schedule: of the noise.
    """

    backbone: Factory
    probes: Factory = CertaintyProbes
    rule: ExitRule = CertaintyRule()
    schedule: NoiseSchedule = NoiseSchedule()
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        check_factory(self.backbone, "ExitingDenoiser.backbone")
        check_factory(self.probes, "ExitingDenoiser.probes")
        super().__post_init__()

    def setup(self):  # noqa: D102
        self.net = self.backbone(dtypes=self.dtypes)
        self.probe = self._probes(name="probes")

    def _probes(self, **kwargs: Any) -> CertaintyProbes:
        net = self._template
        outputs = net.patch**2 * net.channels
        return self.probes(exits=net.blocks, outputs=outputs, dtypes=self.dtypes, **kwargs)

    @property
    def _template(self) -> Any:
        """The backbone without variables, for its static properties."""
        return self.backbone(dtypes=self.dtypes, parent=None)

    @property
    def layers(self) -> str:
        """How the backbone runs its layers; `layout.apply` reads it."""
        return self._template.layers

    @property
    def depth(self) -> int:
        """x: blocks, each with an exit."""
        return self._template.blocks

    @nn.compact  # the only method with controls: segments get their threshold as an argument
    def __call__(
        self,
        images: Float[Array | np.ndarray, "b h w c"],
        mask: Array | None = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
    ) -> tuple[dict[str, Array], Aux]:
        """Adds noise to clean images, runs everything (masked execution) and decides.

        Returns:
          ``inner`` [x b h w c], the noise as the head reads it after every block; ``certainty``, alike; ``noise``
          [b h w c] and ``times`` [b], as drawn; ``exit`` [b] int32; ``emitted`` [b h w c], what each example stops
          with, and ``final``, what the whole network says. Events per example [b]: needed where it gets that far,
          executed everywhere.
        """
        times, noise = self.draw(images.shape)
        noised = self.schedule.noised(jnp.asarray(images), noise, times)
        inner, certainty = self.denoise(noised, times, train)
        start = lambda: jnp.full((self.depth - 1,), self.rule.initial(), jnp.float32)
        thresholds = jnp.asarray(self.variable("controls", "thresholds", start).value)
        rows, means = exit_inputs(certainty[:-1])
        plan = decide(self.rule, rows, means, thresholds)
        output = {
            "inner": inner,
            "certainty": certainty,
            "noise": noise,
            "times": times,
            "exit": plan.exit,
            "emitted": emitted_at(inner, plan.exit),
            "final": inner[-1],
        }
        plans = {"exit": plan} if "plan" in capture else {}
        return output, Aux(events=segments_reached(plan.exit, self.depth, mask), plans=plans)

    def draw(self, shape: tuple[int, ...]) -> tuple[Float[Array, "b"], Array]:
        """Times [b] and noise of a shape [b h w c]."""
        b = shape[0]
        if not self.has_rng("dropout"):
            even = (jnp.arange(b, dtype=jnp.float32) + 0.5) / b
            return even, jax.random.normal(jax.random.key(FIXED_KEY), shape)
        return draw_times_and_noise(self.make_rng("dropout"), shape)

    def denoise(
        self,
        noised: Float[Array | np.ndarray, "b h w c"],
        times: Float[Array, "b"],
        train: bool = False,
    ) -> tuple[Float[Array, "x b h w c"], Float[Array, "x b h w c"]]:
        """The noise in x_t after every block, and the certainty of it."""
        hidden = self.net.hidden(noised, times, train)
        maps = self.probe(hidden[:, :, 1:], self._time(times))
        return self.net.predict(hidden), unpatched(maps, self._template.patch)

    def _time(self, times: Float[Array, "b"]) -> Float[Array, "b d"]:
        return time_embedding(times, self._template.d_model)

    def begin(self, inputs: Float[Array | np.ndarray, "b h w m"]) -> dict[str, Any]:
        """What is carried from segment to segment: tokens ``x``, ``skips``, ``times`` and the rule's ``state``."""
        noised, times = unpacked(jnp.asarray(inputs))
        x = self.net.embed(noised, times)
        skips = tuple(jnp.zeros_like(x) for _ in range(self._template.half))
        return {"x": x, "skips": skips, "times": times, "state": self.rule.start(len(inputs))}

    def segment(
        self, index: int, carry: dict[str, Any], threshold: Float[Array, ""]
    ) -> tuple[dict[str, Any], Array, Array, Array]:
        """Block ``index``, its probe and the decision; needs ``layers="unroll"`` and unstacked variables.

        Returns:
          (carry, noise [b h w c], leave [b] bool, certainty [b]); all leave after the last block, whose certainty is
          told and decides nothing.
        """
        template, skips = self._template, carry["skips"]
        source = template.skip_of(index)
        x, _ = self.net.run_block(index, carry["x"], None if source is None else skips[source])
        if index < template.half:
            skips = (*skips[:index], x, *skips[index + 1 :])
        maps = self.probe(x[:, 1:], self._time(carry["times"]), index)
        rows, means = exit_inputs(unpatched(maps, template.patch)[None])
        state, leave, score = self.rule.step(carry["state"], rows[0], means[0], threshold)
        if index == self.depth - 1:
            leave = jnp.ones_like(leave)
        return {**carry, "x": x, "skips": skips, "state": state}, self.net.predict(x), leave, score

    @staticmethod
    def weights_of(params: Any, index: int | None) -> Any:
        """The parameters, unstacked, that segment ``index`` uses; None: those of ``begin``."""
        net = params["net"]
        if index is None:
            return {"net": {name: net[name] for name in ("kernel", "bias", "place")}}
        return {**params, "net": only_block(net, index)}

    def cost(self, inputs_shape: tuple[int, ...]) -> dict[str, Cost]:
        """Price of each segment for one image: ``segment_i`` is block i with its long skip, its probe and the head.

        The first also embeds. The head is charged at every exit, as the segments run it; only the one that an image
        stops at is needed.
        """
        net = self._template
        table = net.cost(inputs_shape)
        probe = self._probes(parent=None).cost(net.d_model) * (net.length - 1)
        prices = [
            block + probe + table["head"]["images"]
            for block in block_prices(table, net, net.length)
        ]
        prices[0] = prices[0] + table["embed"]["images"]
        return {f"segment_{index}": price for index, price in enumerate(prices)}

    def cumulative_costs(self, inputs_shape: tuple[int, ...]) -> list[float]:
        """FLOPs up to and including exit i over those of the whole; the last is 1."""
        return cumulative_costs(self.cost(inputs_shape))


def draw_times_and_noise(
    key: Key[Array, ""], shape: tuple[int, ...]
) -> tuple[Float[Array, "b"], Array]:
    """Times uniform in [0, 1) and normal noise, for a batch of a shape [b h w c]."""
    first, second = jax.random.split(key)
    return jax.random.uniform(first, shape[:1]), jax.random.normal(second, shape)


def exit_inputs(certainty: Float[Array, "x b h w c"]) -> tuple[Array, Array]:
    """What a rule reads of maps: them as rows [x b m], and their means [x b]."""
    rows = certainty.reshape(*certainty.shape[:2], -1)
    return rows, jnp.mean(rows, axis=-1)


def emitted_at(inner: Float[Array, "x b h w c"], exits: Array) -> Float[Array, "b h w c"]:
    """Of every example the prediction at its exit [b]."""
    return jnp.take_along_axis(inner, exits[None, :, None, None, None], axis=0)[0]


def packed(
    noised: Float[Array | np.ndarray, "b h w c"], times: Float[Array | np.ndarray, "b"]
) -> np.ndarray:
    """x_t with its time as one more channel: the inputs of segments, float32 [b h w c+1], on the host."""
    noised, times = np.asarray(noised), np.asarray(times, np.float32)
    plane = np.broadcast_to(times[:, None, None, None], (*noised.shape[:3], 1))
    return np.concatenate([noised, plane], axis=-1)


def unpacked(inputs: Float[Array, "b h w m"]) -> tuple[Array, Float[Array, "b"]]:
    """(x_t, times) of what `packed` made."""
    return inputs[..., :-1], inputs[:, 0, 0, -1]
