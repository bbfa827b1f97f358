"""Training prompt tokens to guess ahead: distillation from the frozen model's own greedy text (arXiv 2405.18628).

Real tokens never see prompt tokens, so a text is read once, without gradient, and chains hang on many of its positions
in one masked pass. Letters: ``c`` positions of a text that chains hang on, ``k`` prompt tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Bool, Float, Int
from dyncomp.decoding.branches import read_branches
from dyncomp.decoding.fusion import kl_divergence
from dyncomp.decoding.net import Net
from dyncomp.decoding.reading import Reading, begin, each_cache, read


def guessing_loss(
    guesses: Float[Array, "*n k v"], teacher: Float[Array, "*n k v"], decay: float = 0.8
) -> Float[Array, ""]:
    """(1 / k) sum_i decay^i KL(teacher_i || guess_i) of raw logits, nats, mean over the rest (the released code).

    The paper's formula has the divergence the other way round; its code is teacher first. No gradient to ``teacher``.
    """
    target = jax.nn.log_softmax(lax.stop_gradient(teacher).astype(jnp.float32), axis=-1)
    own = jax.nn.log_softmax(guesses.astype(jnp.float32), axis=-1)
    each = kl_divergence(target, own)
    k = guesses.shape[-2]
    weight = jnp.float32(decay) ** jnp.arange(k, dtype=jnp.float32) / k
    return jnp.mean(jnp.sum(each * jnp.expand_dims(weight, tuple(range(each.ndim - 1))), axis=-1))


def read_text(
    net: Net, tokens: Int[Array, "b t"], room: int
) -> tuple[Float[Array, "b t d"], Reading]:
    """Outputs of a text and its cache with ``room`` free slots; without gradient."""
    b, t = tokens.shape
    counts = jnp.full((b,), t, jnp.int32)
    x, reading, _ = read(net, begin(net.model, b, t + room), tokens, counts)
    return lax.stop_gradient((x, Reading(reading.cache, jnp.zeros_like(reading.read))))


def chain_logits(
    net: Net,
    reading: Reading,
    prompts: Float[Array, "k d"],
    cuts: Int[Array, "b c"],
    length: int,
) -> Float[Array, "b c k v"]:
    """What chains of prompt tokens say after positions ``cuts`` of a text of ``length`` tokens.

    Prompt i (from 0) after the token at position n stands at n + 1 + i and is to say what stands at n + 2 + i.

    Args:
      reading: of `read_text`, with room for c k slots.

    Raises:
      DyncompError: no room.
    """
    b, c = cuts.shape
    k = len(prompts)
    _check_room(reading, length + c * k)
    depth = (cuts[:, :, None] + 1 + jnp.arange(k, dtype=jnp.int32)).reshape(b, c * k)
    chain = jnp.arange(c * k, dtype=jnp.int32)
    own = (chain[:, None] // k == chain[None] // k) & (chain[:, None] >= chain[None])
    visible = _sees_prefix(jnp.repeat(cuts, k, axis=1), length, own)
    blank, mask = jnp.full((b, c * k), -1, jnp.int32), jnp.ones((b, c * k), bool)
    vectors = jnp.tile(prompts, (c, 1))[None]
    x, *_ = read_branches(net, reading, blank, depth, visible, mask, vectors)
    return net.classify(x).reshape(b, c, k, -1)


def greedy_labels(
    net: Net,
    reading: Reading,
    outputs: Float[Array, "b t d"],
    cuts: Int[Array, "b c"],
    k: int,
) -> tuple[Float[Array, "b c k v"], Int[Array, "b c k"]]:
    """The frozen model's own greedy continuation after each cut, in k passes of one token a cut.

    Returns:
      its logits for 2 .. k + 1 tokens ahead (those for 1 need no guess), and their argmax.

    Args:
      reading, outputs: of `read_text`, with room for c k slots.
    """
    b, c = cuts.shape
    length = outputs.shape[1]
    _check_room(reading, length + c * k)
    at = jnp.take_along_axis(outputs, cuts[:, :, None], axis=1)
    token = jnp.argmax(net.classify(at), axis=-1).astype(jnp.int32)
    same, found = jnp.eye(c, dtype=bool), []
    for step in range(k):
        visible = _sees_prefix(cuts, length, jnp.tile(same, (1, step + 1)))
        mask = jnp.ones((b, c), bool)
        x, reading, _ = read_branches(net, reading, token, cuts + 1 + step, visible, mask)
        logits = net.classify(x)
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        found.append((logits, token))
    logits, tokens = (jnp.stack(parts, axis=2) for parts in zip(*found, strict=True))
    return lax.stop_gradient(logits), tokens


def guess_accuracy(
    guesses: Float[np.ndarray, "n k v"], right: Int[np.ndarray, "n k"], ranks: int
) -> Float[np.ndarray, "k r"]:
    """acc[i, r], for `tree.candidate_tree`: how often the r-th best guess of prompt i is right. Host-side.

    Use texts that acceptance is not reported on.
    """
    order = np.argsort(-guesses, axis=-1, kind="stable")[:, :, :ranks]
    return (order == right[:, :, None]).mean(axis=0)


def _sees_prefix(
    cuts: Int[Array, "b m"], length: int, own: Bool[Array, "m w"]
) -> Bool[Array, "b m tw"]:
    """Each new slot sees the text up to its cut, and of what came after the text what ``own`` says."""
    text = jnp.arange(length, dtype=jnp.int32)[None, None] <= cuts[:, :, None]
    return jnp.concatenate([text, jnp.broadcast_to(own[None], (len(cuts), *own.shape))], axis=-1)


def _check_room(reading: Reading, needed: int) -> None:
    slots = min(jax.tree.leaves(each_cache(lambda one: one.positions.shape[1], reading.cache)))
    if needed > slots:
        raise DyncompError(f"{needed} slots needed, the text was read with {slots}; give more room")
