"""A backbone that may end early: exits between its blocks and a rule that picks one for each example."""

from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dyncomp.core.aux import Aux, Count
from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.typing import Array, Factory, Float, Int, check_factory
from dyncomp.exits.bank import ExitBank
from dyncomp.exits.rules import ExitRule, GateRule, confidence, decide

Fallback = Literal["last", "most_confident"]
PER_TOKEN = ("projections", "tokens", "rows")
"""Events of a dense block that happen once a position."""


class ExitingClassifier(nn.Module):
    """Classifier with an exit after every block but the last (the sandwich of JEI-DNN, arXiv 2310.09163).

    An exit of a transformer reads LN_final(h_l), pooled: the backbone's own final norm, shared. One of a `ConvNet`
    reads the block's map (`MapExits`). Parameters: ``net``, ``bank``. Controls: ``thresholds`` [y] of the rule,
    ``pos_weight`` [y] of the gates' loss.

    Attributes:
      backbone: factory of a network with ``features``, ``embed``, ``run_block``, ``pooled``, ``classify``, ``head``,
        ``depth``, ``classes``, ``layers`` and ``cost``, and either ``groups``, ``length`` and ``d_model``
        (`VisionTransformer`; blocks must be dense: equal cost for all) or, where blocks differ in width,
        ``block_prices``, ``exit_shapes`` and ``weights_of`` (`ConvNet`).
      exits: factory of the bank, called with ``exits``, ``classes`` and ``dtypes``; its ``cost`` takes the shape that
        an exit reads.
      rule: decides where each example leaves.
      fallback: what is emitted where no exit fires: the final classifier's logits, or those of the exit with the
        largest probability, the final classifier included (the released code of Shallow-Deep Networks). Every block
        has run either way.
    """

    backbone: Factory
    exits: Factory = ExitBank
    rule: ExitRule = GateRule()
    fallback: Fallback = "last"
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        check_factory(self.backbone, "ExitingClassifier.backbone")
        check_factory(self.exits, "ExitingClassifier.exits")
        if self.fallback not in ("last", "most_confident"):
            raise DyncompError(
                f"ExitingClassifier.fallback={self.fallback!r}: use 'last' or 'most_confident'"
            )
        super().__post_init__()

    def setup(self):  # noqa: D102
        self.net = self.backbone(dtypes=self.dtypes)
        if self.net.depth < 2:
            raise DyncompError(
                "ExitingClassifier: a backbone of one block has no place for an exit"
            )
        self.bank = self._bank()

    def _bank(self, **kwargs: Any) -> Any:
        net = self._template
        return self.exits(exits=net.depth - 1, classes=net.classes, dtypes=self.dtypes, **kwargs)

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
        """x: blocks, and exits with the final classifier."""
        return self._template.depth

    def _controls(self) -> dict[str, Array]:
        start = {"thresholds": self.rule.initial(), "pos_weight": 1.0}
        make = lambda value: jnp.full((self.depth - 1,), value, jnp.float32)
        return {
            name: jnp.asarray(self.variable("controls", name, make, value).value)
            for name, value in start.items()
        }

    @nn.compact  # the only method with controls: segments get their threshold as an argument
    def __call__(
        self,
        images: Float[Array | np.ndarray, "b h w c"],
        mask: Array | None = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
    ) -> tuple[dict[str, Array], Aux]:
        """Runs everything (masked execution) and decides.

        Returns:
          ``logits`` [x b c], the final classifier's last; ``gates`` [y b] logits; ``exit`` [b] int32; ``emitted``
          [b c], the logits each example leaves with, and ``final`` [b c], those of the final classifier (tasks take
          either); ``costs`` [x] and ``pos_weight`` [y] for objectives.
          Events per example [b]: needed where the example gets that far, executed everywhere.
        """
        features, inner = self.net.features(images, mask, train)
        early, gates = self.bank(features[:-1])
        logits = jnp.concatenate([early, self.net.head(features[-1])[None]])
        controls = self._controls()
        plan = decide(self.rule, early, gates, controls["thresholds"])
        emitted = jnp.take_along_axis(logits, self.spoken(logits, plan.exit)[None, :, None], 0)[0]
        output = {
            "logits": logits,
            "gates": gates,
            "exit": plan.exit,
            "emitted": emitted,
            "final": logits[-1],
            "costs": jnp.asarray(self.cumulative_costs(images.shape), jnp.float32),
            "pos_weight": controls["pos_weight"],
        }
        plans = {"exit": plan} if "plan" in capture else {}
        return output, Aux(inner.losses, segments_reached(plan.exit, self.depth, mask), plans)

    def spoken(self, logits: Float[Array, "x b c"], exits: Int[Array, "b"]) -> Int[Array, "b"]:
        """Whose logits each example is answered with: the exit where it leaves, see ``fallback``."""
        if self.fallback == "last":
            return exits
        surest = jnp.argmax(confidence(logits, "max_p"), axis=0).astype(exits.dtype)
        return jnp.where(exits == self.depth - 1, surest, exits)

    def begin(self, images: Float[Array | np.ndarray, "b h w c"]) -> dict[str, Any]:
        """What is carried from segment to segment: ``x``, the rule's ``state``, perhaps the surest answer so far.

        Where blocks differ in shape, segment i reads ``x_i`` and fills in the next one.
        """
        b, x = images.shape[0], self.net.embed(images)
        carry = {self._slot(0): x, "state": self.rule.start(b)}
        if hasattr(self.net, "exit_shapes"):
            for index, shape in enumerate(self.net.exit_shapes(images.shape)[:-1], 1):
                carry[self._slot(index)] = jnp.zeros((b, *shape), x.dtype)
        if self.fallback == "most_confident":
            carry["surest"] = (jnp.full((b,), -1.0), jnp.zeros((b, self.net.classes)))
        return carry

    def _slot(self, index: int) -> str:
        """The carry's entry that segment ``index`` reads."""
        return f"x_{index}" if hasattr(self.net, "exit_shapes") else "x"

    def segment(
        self, index: int, carry: dict[str, Any], threshold: Float[Array, ""]
    ) -> tuple[dict[str, Any], Array, Array, Array]:
        """Block ``index`` and the decision after it; needs ``layers="unroll"`` and unstacked variables.

        Returns:
          (carry, logits [b c], leave [b] bool, score [b]); all leave after the last block.
        """
        x, _ = self.net.run_block(index, carry[self._slot(index)])
        if index == self.depth - 1:
            logits = self.net.classify(x)
            b = logits.shape[0]
            said = self._surest(carry, logits)["surest"][1] if "surest" in carry else logits
            return carry, said, jnp.ones((b,), bool), jnp.full((b,), jnp.nan, jnp.float32)
        place = self.get_variable("controls", "exit", index)
        logits, gate = self.bank(self.net.pooled(x), place)
        state, leave, score = self.rule.step(carry["state"], logits, gate, threshold)
        after = self._surest(carry, logits) if "surest" in carry else {}
        carry = {**carry, self._slot(index + 1): x, "state": state, **after}
        return carry, logits, leave, score

    def _surest(self, carry: dict[str, Any], logits: Float[Array, "b c"]) -> dict[str, Any]:
        """The surest answer so far; of equals the earlier."""
        best, kept = carry["surest"]
        sure = confidence(logits, "max_p")
        kept = jnp.where((sure > best)[:, None], logits, kept)
        return {"surest": (jnp.maximum(sure, best), kept)}

    def weights_of(self, params: Any, index: int | None) -> Any:
        """The parameters, unstacked, that segment ``index`` uses; None: those of ``begin``."""
        net, bank = params["net"], params["bank"]
        if own := getattr(self._template, "weights_of", None):
            kept = own(net, index)
        else:
            kept = {"patches": net["patches"]} if index is None else only_block(net, index)
        if own := getattr(self._bank(parent=None), "weights_of", None):
            bank = own(bank, index)
        return {**params, "net": kept, "bank": bank}

    def controls_of(self, controls: Any, index: int | None) -> dict[str, Array]:
        """Which exit segment ``index`` has, as an array: equal blocks are then one program.

        Nothing for the last, which has none, and for banks that are not ``stacked``: they are told a number.
        """
        stacked = getattr(self._bank(parent=None), "stacked", False)
        return {"exit": jnp.int32(index)} if stacked and index in range(self.depth - 1) else {}

    def cost(self, inputs_shape: tuple[int, ...]) -> dict[str, Cost]:
        """Price of each segment for one example: ``segment_i`` is block i with its exit (the first also embeds)."""
        net = self._template
        table, bank = net.cost(inputs_shape), self._bank(parent=None)
        if hasattr(net, "block_prices"):
            blocks, seen = net.block_prices(inputs_shape), net.exit_shapes(inputs_shape)
        else:
            blocks = block_prices(table, net, net.length(inputs_shape))
            seen = [(net.d_model,)] * net.depth
        each_exit = [sum(bank.cost(*shape).values(), Cost(0)) for shape in seen[:-1]]
        prices = [block + leave for block, leave in zip(blocks[:-1], each_exit, strict=True)]
        prices.append(blocks[-1] + table["head"]["images"])
        prices[0] = prices[0] + table["embed"]["images"]
        return {f"segment_{index}": price for index, price in enumerate(prices)}

    def cumulative_costs(self, inputs_shape: tuple[int, ...]) -> list[float]:
        """c_l: FLOPs up to and including exit l, its head and gate counted, over those of the whole; the last is 1."""
        return cumulative_costs(self.cost(inputs_shape))


def segments_reached(
    exit_index: Int[Array, "*b"], depth: int, mask: Array | None
) -> dict[str, Count]:
    """Events of segments in masked execution: needed up to each exit where ``mask`` [*b] is set, executed for all."""
    real = jnp.ones(exit_index.shape, bool) if mask is None else mask.astype(bool)

    def reached(index: int) -> Count:
        needed = (exit_index >= index) & real
        return Count(needed.astype(jnp.int32), jnp.ones(exit_index.shape, jnp.int32))

    return {f"segment_{index}": reached(index) for index in range(depth)}


def cumulative_costs(prices: Mapping[str, Cost]) -> list[float]:
    """FLOPs up to and including each segment, in order, over those of all; the last is 1."""
    flops = [price.flops for price in prices.values()]
    return [sum(flops[: index + 1]) / sum(flops) for index in range(len(flops))]


def block_prices(
    table: dict[str, Any],
    net: Any,
    length: int,
    other: Mapping[str, int] | None = None,
    pairs: int | None = None,
) -> list[Cost]:
    """Price of every block on one example of ``length`` positions, in the order of execution.

    ``other``: how often further events happen in a block of one example, by the last part of their path.
    ``pairs`` of positions attend to each other: all, or what is told.

    Raises:
      DyncompError: a block has an event whose count depends on the input.
    """
    from dyncomp.attention.attention import PAIR_BLOCK
    from dyncomp.core.aux import flatten

    pairs = length * length if pairs is None else pairs
    counts = {"pair_blocks": pairs // PAIR_BLOCK, "pairs": pairs % PAIR_BLOCK}
    counts |= dict.fromkeys(PER_TOKEN, length) | dict(other or {})
    prices = []
    for number, group in enumerate(net.groups):
        period = []
        for block in range(len(group.blocks)):
            total = Cost(0)
            for path, cost in flatten(table[f"group_{number}"][f"block_{block}"]).items():
                event = path.rsplit("/", 1)[-1]
                if event not in counts:
                    raise DyncompError(
                        f"exits price dense blocks only; event {path!r} has no fixed count"
                    )
                total = total + cost * counts[event]
            period.append(total)
        prices.extend(period * group.repeat)
    return prices


def only_block(net: Any, index: int) -> Any:
    """A backbone's parameters, unstacked, without the blocks other than ``index``."""
    kept = {}
    for name, value in net.items():
        if not name.startswith("group_"):
            kept[name] = value
    for name in sorted(
        (n for n in net if n.startswith("group_")), key=lambda n: int(n.split("_")[1])
    ):
        layers = sorted(net[name], key=lambda n: int(n.rsplit("_", 1)[1]))
        period = max(1, len(net[name][layers[0]]))
        if 0 <= index < len(layers) * period:
            layer, block = divmod(index, period)
            kept[name] = {
                layers[layer]: {f"block_{block}": net[name][layers[layer]][f"block_{block}"]}
            }
        index -= len(layers) * period
    return kept
