"""What a train step needs on one device, by our own count: seconds of tracing in the place of a compile.

For a `DecoderLM` of dense attention and SwiGLU, MLP or mixture-of-experts units. Parameters, moments, gradients and
what the backward pass keeps (by the rematerialisation policy) are counted from traced shapes. What one layer needs
while it runs backward is a formula; which of its buffers live at once was read from XLA's lists of buffers for TPUs
(jax 0.10.2, scanned layers). ``docs/bench/pods/memory_model.json`` says how well it does.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dyncomp.attention import Attention
from dyncomp.core.typing import PyTree
from dyncomp.experts import MLP, MoE, SwiGLU
from dyncomp.models import DecoderLM
from dyncomp.parallel.mesh import batch_parts
from dyncomp.parallel.residuals import stacked
from dyncomp.parallel.rules import traced_for

STREAMS = 8
"""Arrays of a token's width that a layer's backward pass holds."""

HIDDEN = {"full": 6, "dots": 4, "none": 2}
"""Arrays of hidden width (gate, up, their product, gradients) that it holds, by what is recomputed."""


@dataclasses.dataclass(frozen=True)
class MemoryModel:
    """Bytes on one device.

    Attributes:
      state: parameters, moments, averages and the batch; there before the step and after it.
      gradients: of parameters that move, while layers run backward; accumulated ones too.
      copies: parameters of the layers in the compute dtype.
      kept: what the forward pass leaves for the backward pass.
      logits: with their gradient and the whole output projection.
      layer: what one layer needs while it runs backward, without what is kept.
    """

    state: int
    gradients: int
    copies: int
    kept: int
    logits: int
    layer: int

    @property
    def peak(self) -> int:
        """The larger of the two tight moments: at the loss, and within a layer's backward pass."""
        always = self.state + self.copies + self.kept
        return always + max(self.logits, self.gradients + self.layer)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Lengths on one device.

    Attributes:
      sequences, length: of the part of the batch that is differentiated at once.
      width, vocabulary, item: d, v, bytes of an activation.
      heads: query heads.
      hidden: f of a unit or an expert.
      rows: of the experts, all choices of all tokens; 0 for none.
      experts: held here.
      matrix: elements of the layer's largest matrix, whole but for the tensor axis.
      split: whether parameters are gathered for use.
    """

    sequences: int
    length: int
    width: int
    vocabulary: int
    item: int
    heads: int
    hidden: int
    rows: int
    experts: int
    matrix: int
    split: bool

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.sequences * self.length


def predict_memory(
    model: Any, program: Any, mesh: Mesh, rules: Mapping[str, Any], held: Mapping[str, int]
) -> MemoryModel | None:
    """The count, or None for models that it does not know.

    Args:
      model: a run's.
      program: its `aot.Program`.
      mesh, rules: where it runs.
      held: bytes on one device: ``state``, ``moving`` (parameters that are trained), ``layers`` (parameters of scanned
        layers), ``batch``.
    """
    sizes = sizes_of(model, program, mesh)
    if sizes is None:
        return None
    kept = kept_bytes(program, mesh, rules, model)
    backward = kept > 0
    wide = jnp.dtype(model.dtypes.param).itemsize
    copies = held["layers"] * sizes.item // wide if sizes.item < wide else 0
    accumulated = program.batch["inputs"].shape != program.part["inputs"].shape
    gradients = held["moving"] * (2 if accumulated else 1)
    n, v, d, item = sizes.tokens, sizes.vocabulary, sizes.width, sizes.item
    logits = n * v * (4 + (item if backward else 0)) + d * v * item * sizes.split
    return MemoryModel(
        state=held["state"] + held["batch"],
        gradients=gradients,
        copies=copies,
        kept=kept,
        logits=logits,
        layer=_layer(sizes, model.remat, backward),
    )


def _layer(sizes: Sizes, remat: str, backward: bool) -> int:
    """One layer's backward pass, or a forward pass that nothing is kept of."""
    n, item = sizes.tokens, sizes.item
    table = sizes.sequences * sizes.heads * sizes.length**2
    probabilities = table * (4 + item) * (remat != "none" or not backward)
    streams = STREAMS * n * sizes.width * item
    gathered = 2 * sizes.matrix * item * sizes.split
    if not backward:
        unit = 2 * n * sizes.hidden * item if not sizes.rows else _rows(sizes, False)
        return max(probabilities, unit) + streams // 2 + gathered
    unit = HIDDEN[remat] * n * sizes.hidden * item if not sizes.rows else _rows(sizes, True)
    scores = 4 * table  # the gradient of the scores
    both = scores + unit if not sizes.rows else max(scores, unit)
    return probabilities + both + streams + gathered


def _rows(sizes: Sizes, backward: bool) -> int:
    """Rows of experts, two arrays of float32 and three of the compute dtype, and weight gradients not yet summed."""
    wide = sizes.rows * sizes.hidden * ((8 if backward else 4) + 3 * sizes.item)
    narrow = 3 * sizes.rows * sizes.width * sizes.item
    weights = 3 * sizes.experts * sizes.width * sizes.hidden * 4
    return wide + narrow + weights * (backward and sizes.split)


def sizes_of(model: Any, program: Any, mesh: Mesh) -> Sizes | None:
    """Lengths, or None for another model than `predict_memory` knows."""
    known = isinstance(model, DecoderLM) and len(model.groups) == 1 and model.layers == "scan"
    if not known or mesh.shape.get("sequence", 1) > 1:
        return None
    (group,) = model.groups
    if len(group.blocks) != 1:
        return None
    block = group.blocks[0](parent=None, dtypes=model.dtypes)
    mixer, unit = (make(parent=None, dtypes=model.dtypes) for make in (block.mixer, block.ffn))
    dense = isinstance(mixer, Attention) and mixer.pattern is None and mixer.sampler is None
    if not dense or not isinstance(unit, SwiGLU | MLP | MoE):
        return None
    batch, length = program.part["inputs"].shape
    tensor, expert = mesh.shape["tensor"], mesh.shape["expert"]
    sequences = batch // batch_parts(mesh)
    routed = isinstance(unit, MoE)
    rows = _choices(unit) * sequences * length if routed else 0
    experts = unit.num_experts // expert if routed else 0
    d, hidden = model.d_model, unit.hidden // tensor
    return Sizes(
        sequences=sequences,
        length=length,
        width=d,
        vocabulary=model.vocab_size // tensor,
        item=model.dtypes.compute_itemsize,
        heads=mixer.heads // tensor,
        hidden=hidden,
        rows=rows // tensor,
        experts=experts,
        matrix=max(d * hidden * max(experts, 1), d * d // tensor),
        split=mesh.shape["fsdp"] > 1,
    )


def _choices(unit: MoE) -> int:
    """Slots a token's plan has."""
    rows = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    router = unit._router(parent=None)
    keys = {name: jax.random.key(0) for name in ("params", "router")}
    slots = lambda x: router.init_with_output(keys, x)[0][0].experts
    return jax.eval_shape(slots, rows).shape[-1]


def kept_bytes(program: Any, mesh: Mesh, rules: Mapping[str, Any], model: Any) -> int:
    """Bytes on one device that the forward pass leaves for the backward pass, parameters not counted."""

    def residuals(params: PyTree, controls: Any, part: Any, step: Any, keys: Any) -> list[Any]:
        _, pull = jax.vjp(lambda p: program.loss(p, controls, part, step, keys)[0], params)
        return [leaf for leaf in jax.tree.leaves(pull) if hasattr(leaf, "dtype")]

    key = jax.eval_shape(jax.random.key, 0)
    keys, state = {"router": key, "dropout": key}, program.state
    with traced_for(mesh, rules):
        traced = jax.make_jaxpr(residuals)(
            state.params, state.controls, dict(program.part), state.step, keys
        )
    share = lambda aval: _share(aval, program, mesh, model)
    return sum(max(map(share, same)) for same in stacked(traced.jaxpr))


def _share(aval: Any, program: Any, mesh: Mesh, model: Any) -> int:
    """Bytes of a device's part of what layers keep, [layers batch ...] or [layers tokens width]; 0 for all else."""
    batch, length = program.part["inputs"].shape
    if aval.ndim < 3 or aval.shape[1] not in (batch, batch * length):
        return 0
    (group,) = model.groups
    block = group.blocks[0](parent=None, dtypes=model.dtypes)
    mixer, unit = (make(parent=None, dtypes=model.dtypes) for make in (block.mixer, block.ffn))
    wide = {mixer.heads, mixer.kv_heads or mixer.heads, unit.hidden}
    tensor = mesh.shape["tensor"] if wide & set(aval.shape[2:]) else 1
    return math.prod(aval.shape) * aval.dtype.itemsize // batch_parts(mesh) // tensor
