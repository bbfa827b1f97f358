"""The peer of `overhead`: a decoder language model and its training loop in plain jax.numpy, written by hand.

No Flax and nothing of this library, but for the grouped product of the mixture's experts, which both sides share (the
row is about the loop and the modules, not about the kernel). Parameters are nested dicts; those of the layers are
stacked, ``[l ...]``, and scanned or unrolled.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dyncomp_kernels.grouped_matmul.api import grouped_matmul


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the parameters' shapes do not say.

    Attributes:
      scan: `lax.scan` over the layers, else a Python loop.
      top_p: mass of the experts; 0 for a dense network.
      slots: most experts of a token.
      balance, entropy: weights of the router's losses, averaged over layers.
    """

    scan: bool = True
    top_p: float = 0.0
    slots: int = 1
    balance: float = 0.0
    entropy: float = 0.0


def rms(x: Any, scale: Any) -> Any:
    """Root-mean-square norm of [... d]."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def rope(x: Any) -> Any:
    """Rotates [b t h p] by position."""
    t, p = x.shape[1], x.shape[3]
    frequency = 10_000.0 ** -(jnp.arange(0, p, 2, dtype=jnp.float32) / p)
    angle = (jnp.arange(t, dtype=jnp.float32)[:, None] * frequency)[None, :, None]
    a, b = x[..., : p // 2], x[..., p // 2 :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention(w: Any, x: Any) -> Any:
    """Causal grouped-query attention of [b t d]."""
    q, k, v = (jnp.einsum("btd,dhp->bthp", x, w[name]) for name in "qkv")
    b, t, h, p = q.shape
    q, k = rope(q).reshape(b, t, k.shape[2], -1, p), rope(k)
    scores = jnp.einsum("btgrp,bsgp->bgrts", q, k) / p**0.5
    causal = jnp.tril(jnp.ones((t, t), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, jnp.finfo(jnp.float32).min), axis=-1)
    mixed = jnp.einsum("bgrts,bsgp->btgrp", weights, v).reshape(b, t, h, p)
    return jnp.einsum("bthp,hpd->btd", mixed, w["out"])


def dense(w: Any, x: Any) -> Any:
    """SwiGLU."""
    return (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]


def experts(shape: Shape, w: Any, x: Any) -> tuple[Any, Any, Any]:
    """Top-p mixture of [n d] without dropped tokens: (output, balance loss, entropy loss)."""
    n, e, k = x.shape[0], w["router"].shape[1], shape.slots
    log_p = jax.nn.log_softmax(x @ w["router"])
    p = jnp.exp(log_p)
    gate, chosen = jax.lax.top_k(p, k)
    keep = jnp.cumsum(gate, axis=1) - gate <= shape.top_p
    owner = jnp.where(keep, chosen, e).reshape(-1)
    order = jnp.argsort(owner)
    sizes = jnp.bincount(owner, length=e + 1)[:e].astype(jnp.int32)
    rows = x[order // k]
    hidden = jax.nn.silu(grouped_matmul(rows, w["gate"], sizes))
    hidden = hidden * grouped_matmul(rows, w["up"], sizes)
    out = grouped_matmul(hidden, w["down"], sizes)
    out = jnp.zeros_like(out).at[order].set(out, unique_indices=True).reshape(n, k, -1)
    y = jnp.sum(out * jnp.where(keep, gate, 0.0)[..., None], axis=1)
    share = jax.lax.stop_gradient(sizes.astype(jnp.float32) / n)
    balance = e * jnp.sum(share * jnp.mean(p, axis=0))
    return y, balance, -jnp.mean(jnp.sum(p * log_p, axis=-1))


def layer(shape: Shape, x: Any, w: Any) -> tuple[Any, Any]:
    """One block of [b t d], and its two router losses."""
    x = x + attention(w, rms(x, w["mixer_norm"]))
    y = rms(x, w["ffn_norm"])
    if not shape.top_p:
        return x + dense(w, y), jnp.zeros(2)
    flat, balance, entropy = experts(shape, w, y.reshape(-1, y.shape[-1]))
    return x + flat.reshape(x.shape), jnp.stack([balance, entropy])


def loss_fn(params: Any, batch: Any, shape: Shape) -> Any:
    """Mean next-token cross-entropy in nats and the router's losses."""
    x = params["embed"][batch["inputs"]]
    if shape.scan:
        x, losses = jax.lax.scan(lambda x, w: layer(shape, x, w), x, params["layers"])
    else:
        losses = []
        for index in range(params["layers"]["q"].shape[0]):
            x, own = layer(shape, x, jax.tree.map(lambda leaf: leaf[index], params["layers"]))  # noqa: B023
            losses.append(own)
        losses = jnp.stack(losses)
    logits = rms(x, params["norm"]) @ params["head"]
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    balance, entropy = jnp.mean(losses, axis=0)
    return jnp.mean(nll) + shape.balance * balance + shape.entropy * entropy


def make_step(tx: Any, shape: Shape) -> Any:
    """(params, opt_state, batch) -> (params, opt_state, loss), compiled, in the memory of its first two arguments."""

    def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, Any]:
        loss, grads = jax.value_and_grad(loss_fn)(params, batch, shape)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def from_library(params: Any) -> Any:
    """Copies of our `DecoderLM` parameters (one group of equal blocks), by the names used here."""
    block = params["group_0"]["layers"]["block_0"]
    ffn = {name: leaf for name, leaf in block["ffn"].items() if name != "router"}
    if "router" in block["ffn"]:
        ffn["router"] = block["ffn"]["router"]["kernel"]
    norms = {name: block[name]["scale"] for name in ("mixer_norm", "ffn_norm")}
    top = {"embed": params["embed"], "head": params["head"], "norm": params["final_norm"]["scale"]}
    return jax.tree.map(jnp.array, {**top, "layers": {**block["mixer"], **ffn, **norms}})
