"""Attacks that weigh a Euclidean distance: on the answer (Carlini and Wagner 2017), and on early exits alone.

Both move w with Adam, where tanh keeps pixels (tanh(w) + 1) / 2 within 0..1. Conventions as in `attacks`.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import lax

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Bool, Float, Int, Key
from dyncomp.exits.attacks import LogitsFn, Victim, lengths

Start = Literal["random", "image"]
ROOM = 0.999
"""Of -1..1, how far pixels are taken when w is solved for: at the border w would be infinite."""
MOST_C = 1e9


@struct.dataclass
class Moved:
    """What became of a batch.

    Attributes:
      images: float [b h w c]; of the failures, the last iterate.
      hit: bool [b].
      when: int32 [b], steps taken until the kept iterate.
      distance: float [b], Euclidean, to the clean image; pixels in 0..1.
    """

    images: Any  # unchecked: jax also builds trees of shapes and of numpy arrays
    hit: Any
    when: Any
    distance: Any


def _kept(old: Moved, now: Array, hit: Array, images: Array, when: Array, distance: Array) -> Moved:
    """With other images where ``now``."""
    return Moved(
        jnp.where(now[:, None, None, None], images, old.images),
        hit,
        jnp.where(now, when, old.when),
        jnp.where(now, distance, old.distance),
    )


def pixels_of(w: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """(tanh(w) + 1) / 2."""
    return (jnp.tanh(w) + 1.0) / 2.0


def solved_for(images: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """w of images; pixels at the border are taken a little inwards."""
    return jnp.arctanh(jnp.clip(2.0 * images - 1.0, -ROOM, ROOM))


def lead(logits: Float[Array, "*n c"], labels: Int[Array, "*n"]) -> Float[Array, "*n"]:
    """By how much the label's logit is above the largest other one."""
    own = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    other = jnp.max(jnp.where(own, -jnp.inf, logits), axis=-1)
    return jnp.sum(jnp.where(own, logits, 0.0), axis=-1) - other


def cw_l2(
    victim: Victim,
    images: Float[Array | np.ndarray, "b h w c"],
    labels: Int[Array | np.ndarray, "b"],
    *,
    steps: int,
    rounds: int = 4,
    rate: float = 0.01,
    c: float = 1.0,
    kappa: float = 0.0,
) -> Moved:
    """The nearest image found with another answer: |x' - x|^2 + c aimed(max(lead, -kappa)), c searched for each image.

    Args:
      victim: its ``aim`` chooses the exits whose lead is lowered.
      images: in 0..1.
      labels: what it should say.
      steps: of Adam in a round, from the image.
      rounds: a success lowers c towards the largest that failed, a failure raises it (tenfold until one succeeded).
      rate: Adam's.
      c: of the first round.
      kappa: confidence of the wrong answer that is aimed at.
    """
    adam, b = optax.adam(rate), images.shape[0]
    images, labels = jnp.asarray(images), jnp.asarray(labels)

    def loss(w: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
        x = pixels_of(w)
        logits = victim.logits(x)
        tiled = jnp.broadcast_to(labels, logits.shape[:2])
        wanted = victim.aimed(jnp.maximum(lead(logits, tiled), -kappa), logits)
        near = jnp.sum((x - images) ** 2, axis=(1, 2, 3))
        return jnp.sum(near + weight * wanted), (x, victim.answer(logits) != labels)

    def one(state: Any, index: Array) -> tuple[Any, None]:
        w, moments, weight, found, best = state
        gradient, (x, wrong) = jax.grad(loss, has_aux=True)(w, weight)
        far = lengths(x - images)
        better = wrong & (far < best.distance)
        kept = _kept(best, better, best.hit | wrong, x, index, far)
        update, moments = adam.update(gradient, moments)
        return (optax.apply_updates(w, update), moments, weight, found | wrong, kept), None

    def around(state: Any, number: Array) -> tuple[Any, None]:
        weight, low, high, best = state
        w, never = solved_for(images), jnp.zeros((b,), bool)
        index = number * steps + jnp.arange(steps, dtype=jnp.int32)
        state, _ = lax.scan(one, (w, adam.init(w), weight, never, best), index)
        _, _, _, found, best = state
        high, low = jnp.where(found, weight, high), jnp.where(found, low, weight)
        weight = jnp.where(high < MOST_C, (low + high) / 2.0, weight * 10.0)
        return (weight, low, high, best), None

    fill = lambda value: jnp.full((b,), value, jnp.float32)
    best = Moved(images, jnp.zeros((b,), bool), jnp.zeros((b,), jnp.int32), fill(jnp.inf))
    first = (fill(c), fill(0.0), fill(MOST_C), best)
    (_, _, _, best), _ = lax.scan(around, first, jnp.arange(rounds, dtype=jnp.int32))
    return best


def early_terms(
    logits: Float[Array, "x b c"], said: Int[Array, "b"]
) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
    """(E, A): what early exits give to ``said``, sum over k < K of p^k_y; and sum over j != y of relu(p^K_y - p^K_j).

    A is 0 exactly where no class is below y at the final exit; A > 0 does not mean that y comes first.
    """
    p = jax.nn.softmax(logits, axis=-1)
    own = jnp.take_along_axis(p, jnp.broadcast_to(said, p.shape[:2])[..., None], axis=-1)
    # The term j = y is relu(0) = 0, so nothing has to be left out.
    above = jnp.sum(jax.nn.relu(own[-1] - p[-1]), axis=-1)
    return jnp.sum(own[:-1, :, 0], axis=0), above


def only_early_wrong(logits: Float[Array, "x b c"], said: Int[Array, "b"]) -> Bool[Array, "b"]:
    """Whether every early exit says something else and the final one still says ``said``."""
    answers = jnp.argmax(logits, axis=-1)
    return jnp.all(answers[:-1] != said[None], axis=0) & (answers[-1] == said)


def early_attack(
    logits: LogitsFn,
    images: Float[Array | np.ndarray, "b h w c"],
    keys: Key[Array, "b"],
    *,
    alpha: Any,
    std: Any,
    c: Any = 50.0,
    rate: float = 0.01,
    most: int = 1000,
    least: int = 200,
    start: Start = "random",
) -> Moved:
    """Wrong at every early exit while the final answer stays: the static network sees nothing (arXiv 2308.08709).

    Minimises c (E - alpha A) + |x - x'|^2 with E and A of `early_terms`; the label y is the clean final answer. An
    image is done at the first iterate from number ``least`` on that succeeds, and fails after ``most``.

    Args:
      logits: of the network, not of how it leaves.
      images: in 0..1.
      keys: one an image; draw the start.
      alpha: weight of the final answer; a run-time value.
      std: the network's own normalisation, one or one a channel, in units of a pixel's range. The released code takes
        the distance after normalisation, so c means something else for every ``std``.
      c: weight of the predictions.
      rate: Adam's.
      most: iterates that are looked at.
      least: iterates before a success counts.
      start: w uniform in 0..1 as in the released code (far from the image), or w of the image.

    Raises:
      DyncompError: unknown ``start``, or ``least`` beyond ``most``.
    """
    if start not in ("random", "image"):
        raise DyncompError(f"start={start!r}: use 'random' or 'image'")
    if not 0 <= least < most:
        raise DyncompError(f"least={least}, most={most}: use 0 <= least < most")
    images = jnp.asarray(images)
    said = jnp.argmax(logits(images)[-1], axis=-1).astype(jnp.int32)
    draw = lambda key: jax.random.uniform(key, images.shape[1:], images.dtype)
    w = jax.vmap(draw)(keys) if start == "random" else solved_for(images)
    scale = 1.0 / jnp.asarray(std, images.dtype)

    def loss(w: Array) -> tuple[Array, tuple[Array, Array]]:
        x = pixels_of(w)
        found = logits(x)
        early, above = early_terms(found, said)
        near = jnp.sum(((x - images) * scale) ** 2, axis=(1, 2, 3))
        return jnp.sum(c * (early - alpha * above) + near), (x, only_early_wrong(found, said))

    return _until_hit(loss, w, images, optax.adam(rate), most, least)


def _until_hit(loss: Any, w: Array, images: Array, adam: Any, most: int, least: int) -> Moved:
    """Descends ``w -> loss, (images, hit)`` until every image was hit at iterate ``least`` or later, or ``most``."""

    def going(state: Any) -> Array:
        return (state[0] < most) & ~jnp.all(state[3].hit)

    def body(state: Any) -> Any:
        index, w, moments, kept = state
        gradient, (x, right) = jax.grad(loss, has_aux=True)(w)
        hit = kept.hit | (right & (index >= least))
        kept = _kept(kept, ~kept.hit, hit, x, index, lengths(x - images))
        update, moments = adam.update(gradient, moments)
        return index + 1, optax.apply_updates(w, update), moments, kept

    b = images.shape[0]
    none = Moved(images, jnp.zeros((b,), bool), jnp.zeros((b,), jnp.int32), jnp.zeros((b,)))
    return lax.while_loop(going, body, (jnp.int32(0), w, adam.init(w), none))[3]
