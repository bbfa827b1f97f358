"""Training every prefix of the layers as a model of its own, through one norm and head.

Sorted fine-tuning (arXiv 2309.08968, eq. 1) and SortedNet (arXiv 2309.00255). Exits are counted in blocks run, so exit
n comes after block index n - 1; the last one is the whole model. Letters: ``x`` exits, the whole model included.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Float, Int, Key

SortedMode = Literal["sum", "sample"]


def check_depths(depths: Sequence[int], n_layers: int) -> tuple[int, ...]:
    """Depths of the sub-models, as a tuple.

    Raises:
      DyncompError: not strictly increasing from 1 or more up to ``n_layers``, which must be among them.
    """
    depths = tuple(int(depth) for depth in depths)
    ordered = all(a < b for a, b in zip(depths[:-1], depths[1:], strict=True))
    if not depths or not ordered or depths[0] < 1 or depths[-1] != n_layers:
        raise DyncompError(
            f"depths={depths}: give increasing numbers of blocks from 1 on; the last is all {n_layers}"
        )
    return depths


def sub_model_weights(
    exits: int, mode: SortedMode = "sum", key: Key[Array, ""] | None = None
) -> Float[Array, "x"]:
    """Weight of each sub-model's loss in one step, float32, sum 1.

    ``sum`` (SoFT): 1 / x each, so that the effective learning rate of what all exits share stays. ``sample``
    (SortedNet): 1 for one of them, drawn uniformly with ``key``; the same in expectation.

    Raises:
      DyncompError: unknown mode, no exit, or ``sample`` without a key.
    """
    if exits < 1 or mode not in ("sum", "sample"):
        raise DyncompError(
            f"sub_model_weights: exits={exits}, mode={mode!r}; use 'sum' or 'sample'"
        )
    if mode == "sum":
        return jnp.full((exits,), 1.0 / exits, jnp.float32)
    if key is None:
        raise DyncompError("mode='sample' draws one sub-model a step: give a random key")
    return jax.nn.one_hot(jax.random.randint(key, (), 0, exits), exits, dtype=jnp.float32)


def sorted_loss(
    ce: Float[Array, "x *b"],
    weights: Float[Array, "x"],
    mask: Float[Array, "*b"] | None = None,
) -> Float[Array, ""]:
    """sum over sub-models of weight x mean cross-entropy (arXiv 2309.08968, eq. 1).

    Args:
      ce: nats, of every exit at every target.
      weights: see `sub_model_weights`.
      mask: 1 where a target counts (instruction tuning masks the prompt); the mean is over those, 0 if there are none.
    """
    flat = ce.reshape(ce.shape[0], -1)
    counted = jnp.ones(flat.shape[1:], jnp.float32) if mask is None else mask.reshape(-1)
    means = jnp.sum(flat * counted[None], axis=1) / jnp.maximum(jnp.sum(counted), 1.0)
    return jnp.sum(weights * means)


def exit_logits(output: Mapping[str, Any], exit: Int[Array, ""] | int) -> Float[Array, "b t v"]:
    """Logits of one exit, float32, from the ``states`` [x b t d] and ``heads`` [d v] or [x d v] of `models.NestedLM`.

    Raises:
      DyncompError: the output is of another model.
    """
    if not isinstance(output, Mapping) or not {"states", "heads"} <= set(output):
        raise DyncompError("exits are read from the output of models.NestedLM: make it the model")
    state, heads = output["states"][exit], output["heads"]
    head = heads if heads.ndim == 2 else heads[exit]
    return jnp.einsum(
        "btd,dv->btv", state, head.astype(state.dtype), preferred_element_type=jnp.float32
    )
