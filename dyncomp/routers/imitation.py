"""Which slices of a network come nearest to the whole, and losses that teach a router to say so.

FactorLLM (arXiv 2408.11855), in the form of its code: the prior-approximate label and loss, and the balance term. Pure
functions in float32; ``k`` may be a run-time argument. Labels carry no gradient.
"""

import functools
import itertools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dyncomp.core import choose
from dyncomp.core.typing import Array, Float, Int
from dyncomp.routers.losses import mean_rows

Direction = Literal["router", "label"]
CLIP = 1e-7
"""Both distributions are held in [CLIP, 1 - CLIP] inside the logarithm, as the code does."""


@struct.dataclass
class Outputs:
    """What every slice puts out, and what they should come near to together.

    Attributes:
      slices: [e n d].
      target: [n d], the dense network's output.
    """

    slices: Float[Array, "e n d"]
    target: Float[Array, "n d"]

    def float32(self) -> "Outputs":
        """The same, float32, without gradient."""
        return jax.tree.map(lambda v: jax.lax.stop_gradient(v.astype(jnp.float32)), self)


def slice_errors(outputs: Outputs, k: Int[Array, ""] | int) -> Float[Array, "n e"]:
    """mean_d (E_j(x) - t k / e)^2: how far each slice alone is from its share of the target."""
    seen = outputs.float32()
    share = jnp.float32(k) / jnp.float32(seen.slices.shape[0])
    return jnp.mean(jnp.square(seen.slices - share * seen.target[None]), axis=-1).T


def nearest_label(errors: Float[Array, "n e"], k: Int[Array, ""] | int) -> Float[Array, "n e"]:
    """1 for the k smallest errors of each row, else 0; each slice by itself, not the best set of k."""
    order = choose.ranked(-errors)[1]
    ones = jnp.where(jnp.arange(errors.shape[-1])[None] < k, 1.0, 0.0)
    rows = jnp.arange(errors.shape[0])[:, None]
    label = jnp.zeros(errors.shape, jnp.float32)
    return label.at[rows, order].set(jnp.broadcast_to(ones, errors.shape))


def divergence(r: Float[Array, "n e"], q: Float[Array, "n e"]) -> Float[Array, "n"]:
    """KL(r || q) of each row in nats, both held in [CLIP, 1 - CLIP]."""
    r, q = jnp.clip(r, CLIP, 1 - CLIP), jnp.clip(q, CLIP, 1 - CLIP)
    return jnp.sum(r * (jnp.log(r) - jnp.log(q)), axis=-1)


def imitation_loss(
    logits: Float[Array, "n e"],
    label: Float[Array, "n e"],
    mask: Float[Array, "n"] | None = None,
    *,
    direction: Direction = "router",
) -> Float[Array, ""]:
    """Mean over real rows of KL(softmax(logits) || softmax(label)): the prior-approximate loss.

    The label of ones and zeros goes through a softmax too, so its target is never sharper than e : 1.

    Args:
      logits: of the router.
      label: of `nearest_label`.
      mask: [n], 0 for padding.
      direction: "router" puts the router first, as the code does; "label" is KL(softmax(label) || softmax(logits)).
    """
    r, q = jax.nn.softmax(logits, axis=-1), jax.nn.softmax(label, axis=-1)
    return mean_rows(divergence(r, q) if direction == "router" else divergence(q, r), mask)


def winners_loss(
    logits: Float[Array, "n e"], k: Int[Array, ""] | int, mask: Float[Array, "n"] | None = None
) -> Float[Array, ""]:
    """Mean over real rows and experts of the k highest probabilities (0 for the others).

    The code calls it a balance loss. It flattens each row's winners; it does not even out experts over rows.
    """
    p = jax.nn.softmax(logits, axis=-1)
    chosen = nearest_label(-jax.lax.stop_gradient(p), k)
    return mean_rows(jnp.mean(p * chosen, axis=-1), mask)


def best_subset(
    outputs: Outputs, k: Int[Array, ""] | int, *, rescale: bool = True
) -> Float[Array, "n e"]:
    """1 for the members of the set of k slices whose sum (times e / k) is nearest to the target, else 0.

    Tries all sets of all sizes, so that ``k`` may be a run-time argument: 2^e - 1 of them. Where the target is the sum
    of all slices and k = e / 2, a set and its complement are equally far when rescaled: either may be taken.
    """
    seen, e = outputs.float32(), outputs.slices.shape[0]
    sets = np.asarray([s for s in itertools.product((0, 1), repeat=e) if any(s)], np.float32)
    scale = jnp.float32(e) / jnp.float32(k) if rescale else jnp.float32(1)
    # |scale sum_S E - t|^2 from inner products: [n e e] and [n e] numbers in the place of all sums [sets n d].
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    inner = product("end,fnd->nef", seen.slices, seen.slices)
    along = product("end,nd->ne", seen.slices, seen.target)
    square = product("nef,sef->ns", inner, jnp.asarray(sets[:, :, None] * sets[:, None, :]))
    errors = jnp.square(scale) * square - 2 * scale * product("ne,se->ns", along, jnp.asarray(sets))
    fits = jnp.asarray(sets.sum(axis=-1)) == jnp.float32(k)
    return jnp.asarray(sets)[jnp.argmin(jnp.where(fits[None], errors, jnp.inf), axis=-1)]
