"""Attacks on networks with exits, within a box around each image: on the answer, and on the compute.

Pure functions of ``logits(images) -> [x b c]``, all exits of all images, the final classifier last. Pixels lie in 0..1:
`on_pixels` puts a network's own normalisation in between. Examples do not influence each other, so an attack on a batch
is the attack on each image. Dropout and running statistics must be off in ``logits``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Float, Int, Key
from dyncomp.exits.gates import entropy
from dyncomp.exits.oracle import cross_entropy
from dyncomp.exits.rules import ExitRule, decide

LogitsFn = Callable[[Any], Any]
ExitFn = Callable[[Any], Any]
Aim = Literal["last", "mean", "taken"]
Slow = Literal["uniform", "entropy"]


def last_exit(logits: Float[Array, "x b c"]) -> Int[Array, "b"]:
    """Every example at the final classifier: the static network of the same weights."""
    return jnp.full((logits.shape[1],), logits.shape[0] - 1, jnp.int32)


def leaving(rule: ExitRule, thresholds: Float[Array | np.ndarray, "y"]) -> ExitFn:
    """``logits [x b c] -> exit [b]`` under a rule that reads no gates.

    To shut exits off, use thresholds that no score can reach: a softmax may be exactly 1.0 in float32, so 1 is none.
    """
    bars = jnp.asarray(thresholds, jnp.float32)

    def exit_of(logits: Float[Array, "x b c"]) -> Int[Array, "b"]:
        early = logits[:-1]
        return decide(rule, early, jnp.zeros(early.shape[:2], jnp.float32), bars).exit

    return exit_of


def on_pixels(logits: LogitsFn, mean: Any, std: Any) -> LogitsFn:
    """The network of images with pixels in 0..1; ``mean`` and ``std`` in the same unit, one or one a channel."""
    return lambda pixels: logits((pixels - jnp.asarray(mean)) / jnp.asarray(std))


@dataclasses.dataclass(frozen=True)
class Victim:
    """What is attacked, how it answers, and where the attacker's loss looks.

    Whoever decides by a threshold has no gradient, so a loss is made of the logits of chosen exits.

    Attributes:
      logits: images [b h w c] in 0..1 -> [x b c].
      exit_of: logits -> int [b], at whose logits each example is answered.
      aim: the loss is that of the final classifier, its mean over all exits, or that of the exit which the image takes
        as it is now (held constant in the gradient).
    """

    logits: LogitsFn
    exit_of: ExitFn = last_exit
    aim: Aim = "last"

    def __post_init__(self):
        if self.aim not in ("last", "mean", "taken"):
            raise DyncompError(f"Victim.aim={self.aim!r}: use 'last', 'mean' or 'taken'")

    def answer(self, logits: Float[Array, "x b c"]) -> Int[Array, "b"]:
        """The class said of every image."""
        chosen = jnp.take_along_axis(logits, self.exit_of(logits)[None, :, None], axis=0)[0]
        return jnp.argmax(chosen, axis=-1).astype(jnp.int32)

    def aimed(
        self, per_exit: Float[Array, "x b"], logits: Float[Array, "x b c"]
    ) -> Float[Array, "b"]:
        """One loss an image from one an exit."""
        if self.aim == "last":
            return per_exit[-1]
        if self.aim == "mean":
            return jnp.mean(per_exit, axis=0)
        exits = self.exit_of(lax.stop_gradient(logits))
        return jnp.take_along_axis(per_exit, exits[None], axis=0)[0]


@struct.dataclass
class Attacked:
    """What became of a batch.

    Attributes:
      images: float [b h w c], after the last step.
      first: float [b h w c], the first iterate that succeeded, and ``images`` where none did.
      when: int32 [b], which iterate that was (0: the start), and steps + 1 where none did.
      hit: bool [b], whether any iterate succeeded.
    """

    images: Any  # unchecked: jax also builds trees of shapes and of numpy arrays
    first: Any
    when: Any
    hit: Any


def ascend(
    logits: LogitsFn,
    value: Callable[[Any], Any],
    succeeded: Callable[[Any], Any],
    images: Float[Array | np.ndarray, "b h w c"],
    *,
    eps: Any,
    step: Any,
    steps: int,
    start: Float[Array, "b h w c"] | None = None,
) -> Attacked:
    """Signed gradient ascent, projected on the eps-box around the images and on 0..1 (PGD, Madry et al. 2018).

    Args:
      logits: of the network.
      value: logits -> [b], what shall rise.
      succeeded: logits -> bool [b].
      images: in 0..1.
      eps, step: in units of a pixel's range; run-time values.
      steps: static; ``steps`` + 1 iterates are looked at.
      start: first iterate, projected; default the images themselves.
    """
    images = jnp.asarray(images)
    low, high = jnp.maximum(images - eps, 0.0), jnp.minimum(images + eps, 1.0)
    x = images if start is None else jnp.clip(start, low, high)

    def raised(x: Array) -> tuple[Array, Array]:
        found = logits(x)
        return jnp.sum(value(found)), found

    def body(state: tuple[Array, Array, Array], index: Array) -> tuple[Any, None]:
        x, first, when = state
        gradient, found = jax.grad(raised, has_aux=True)(x)
        new = succeeded(found) & (when > steps)
        first = jnp.where(new[:, None, None, None], x, first)
        when = jnp.where(new, index, when)
        moved = jnp.clip(x + step * jnp.sign(gradient), low, high)
        return (jnp.where(index < steps, moved, x), first, when), None

    never = jnp.full((images.shape[0],), steps + 1, jnp.int32)
    (x, first, when), _ = lax.scan(body, (x, x, never), jnp.arange(steps + 1, dtype=jnp.int32))
    hit = when <= steps
    return Attacked(x, jnp.where(hit[:, None, None, None], first, x), when, hit)


def pgd(
    victim: Victim,
    images: Float[Array | np.ndarray, "b h w c"],
    labels: Int[Array | np.ndarray, "b"],
    *,
    eps: Any,
    step: Any,
    steps: int,
    key: Key[Array, ""] | None = None,
) -> Attacked:
    """Raises the aimed cross-entropy; succeeds where the answer is not the label. A key draws a start in the box."""
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    start = None if key is None else images + eps * _uniform(key, images)

    def value(logits: Array) -> Array:
        return victim.aimed(cross_entropy(logits, labels), logits)

    wrong = lambda logits: victim.answer(logits) != labels
    return ascend(victim.logits, value, wrong, images, eps=eps, step=step, steps=steps, start=start)


def fgsm(
    victim: Victim,
    images: Float[Array | np.ndarray, "b h w c"],
    labels: Int[Array | np.ndarray, "b"],
    *,
    eps: Any,
) -> Attacked:
    """One step to the border of the box (Goodfellow et al. 2015)."""
    return pgd(victim, images, labels, eps=eps, step=eps, steps=1)


def _uniform(key: Array, images: Array) -> Array:
    return jax.random.uniform(key, images.shape, images.dtype, -1.0, 1.0)


def sign_noise(
    key: Key[Array, ""], images: Float[Array | np.ndarray, "b h w c"], eps: Any
) -> Float[Array, "b h w c"]:
    """As far from every pixel as an attack may go, in random directions: the control of `pgd` and `slow_down`."""
    images = jnp.asarray(images)
    return jnp.clip(images + eps * jnp.sign(_uniform(key, images)), 0.0, 1.0)


def gaussian_noise(
    key: Key[Array, ""],
    images: Float[Array | np.ndarray, "b h w c"],
    distance: Float[Array | np.ndarray, "b"],
) -> Float[Array, "b h w c"]:
    """Gaussian noise scaled to a Euclidean length of each image, then clipped to 0..1 (and so a little shorter)."""
    images = jnp.asarray(images)
    noise = jax.random.normal(key, images.shape, images.dtype)
    scale = distance / jnp.maximum(lengths(noise), 1e-12)
    return jnp.clip(images + noise * scale[:, None, None, None], 0.0, 1.0)


def lengths(difference: Float[Array, "b h w c"]) -> Float[Array, "b"]:
    """Euclidean length of every image of a batch."""
    return jnp.sqrt(jnp.sum(difference * difference, axis=(1, 2, 3)))


def uniform_kl(logits: Float[Array, "*n c"]) -> Float[Array, "*n"]:
    """KL(uniform || softmax) = -log c - mean log p >= 0, and 0 for equal logits alone."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.log(jnp.float32(logits.shape[-1])) - jnp.mean(log_p, axis=-1)


def slow_down(
    victim: Victim,
    images: Float[Array | np.ndarray, "b h w c"],
    *,
    eps: Any,
    step: Any,
    steps: int,
    objective: Slow = "uniform",
    keep: Any = 1.0,
) -> Attacked:
    """Makes early exits unsure, so that images go deep (Hong et al. 2021); succeeds where the final one answers.

    Lowers the sum of KL(uniform || p_k) over the early exits, or raises their entropies, and takes off ``keep`` times
    the final classifier's cross-entropy to what the victim says of the clean image.

    Raises:
      DyncompError: unknown ``objective``.
    """
    if objective not in ("uniform", "entropy"):
        raise DyncompError(f"objective={objective!r}: use 'uniform' or 'entropy'")
    images = jnp.asarray(images)
    said = victim.answer(victim.logits(images))

    def value(logits: Array) -> Array:
        each = -uniform_kl(logits[:-1]) if objective == "uniform" else entropy(logits[:-1])
        return jnp.sum(each, axis=0) - keep * cross_entropy(logits[-1:], said)[0]

    deep = lambda logits: victim.exit_of(logits) == logits.shape[0] - 1
    return ascend(victim.logits, value, deep, images, eps=eps, step=step, steps=steps)


def efficacy(exits: Int[np.ndarray, "b"], costs: Float[np.ndarray, "x"]) -> float:
    """Area under the share of examples that have left by each cost, as costs go from 0 to 1 (Hong et al. 2021).

    1: all left at no cost; 0: all paid for the whole network. A step curve, so it is 1 - the mean cost.

    Args:
      exits: where each example left.
      costs: of leaving at each exit, cumulative; the last is 1.
    """
    return float(1.0 - np.asarray(costs, np.float64)[exits].mean())
