"""Other forms of a layer of experts in JAX: `jax.lax.ragged_dot`, and capacities by index tables or one-hot masks."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from dyncomp.experts import SwiGLUBank
from dyncomp.experts.capacity import slots_per_expert

FORMS = ("ragged_dot", "capacity", "one_hot")
SLOW = ("ragged_dot", "one_hot")
CAPACITY = 1.25
"""Of the forms that drop: what is above it is not computed, so they do less than is needed on an uneven load."""


@struct.dataclass
class RaggedDotBank(SwiGLUBank):
    """Experts whose products are `jax.lax.ragged_dot` on every platform."""

    matmul: ClassVar = "ragged"


def options(form: str) -> dict[str, Any]:
    """What `MoE` is given for a form; "dropless" is its default, "one_hot" needs `one_hot` for its outputs."""
    if form == "dropless":
        return {}
    if form == "ragged_dot":
        return {"bank": RaggedDotBank}
    return {"dispatch": "capacity", "capacity_factor": CAPACITY}


def one_hot(k: int, variables: Any, x: Any) -> Any:
    """The layer as GShard writes it (arXiv 2006.16668, algorithm 1), with top-k gates: masks [n e c] and einsums."""
    params, rows = variables["params"], x.reshape(-1, x.shape[-1])
    experts = params["router"]["kernel"].shape[1]
    slots = slots_per_expert(rows.shape[0], experts, k, CAPACITY)
    gates, chosen = jax.lax.top_k(jax.nn.softmax(rows @ params["router"]["kernel"]), k)
    gates = gates / gates.sum(-1, keepdims=True)
    mine = jax.nn.one_hot(chosen, experts)  # [n k e]
    before = jnp.cumsum(mine.reshape(-1, experts), axis=0).reshape(mine.shape) - mine
    place = jnp.sum(before * mine, axis=-1).astype(
        jnp.int32
    )  # [n k]; past the last slot: no column
    combine = jnp.einsum("nk,nke,nkc->nec", gates, mine, jax.nn.one_hot(place, slots))
    sent = jnp.einsum("nec,nd->ecd", (combine > 0).astype(rows.dtype), rows)
    gate, up = (jnp.einsum("ecd,edf->ecf", sent, params[name]) for name in ("gate", "up"))
    out = jnp.einsum("ecf,efd->ecd", jax.nn.silu(gate) * up, params["down"])
    return jnp.einsum("nec,ecd->nd", combine, out).reshape(x.shape)
