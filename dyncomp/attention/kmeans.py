"""Which cluster a token belongs to: online k-means, and the controls it has to beat (random, hashing).

An *assigner* is a Linen module with ``heads`` and ``clusters``; it scores every token for every cluster
([b h t c], float32, higher is nearer) and reports raw losses. Letters beside the legend's: ``c`` clusters.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.typing import Array, Bool, Float, Int, Key

SMOOTHING = 1e-5


def standardised(x: Float[Array, "*n p"], eps: float = 1e-6) -> Float[Array, "*n p"]:
    """Layer norm without scale and bias: mean 0, variance 1, so that |x|^2 = p; float32 inside, returns ``x.dtype``."""
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    inverse = lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + jnp.float32(eps))
    return (centred * inverse).astype(x.dtype)


def centroids(sums: Float[Array, "h c p"], counts: Float[Array, "h c"]) -> Float[Array, "h c p"]:
    """Sums over smoothed counts, (n + 1e-5) / (N + c 1e-5) N with N the total; the sums where nothing was counted."""
    total = jnp.sum(counts, axis=-1, keepdims=True)
    share = (counts + SMOOTHING) / (total + counts.shape[-1] * SMOOTHING)
    return sums / jnp.where(total > 0, share * total, 1.0)[..., None]


def cluster_sums(
    x: Float[Array, "b h t p"],
    nearest: Int[Array, "b h t"],
    clusters: int,
    real: Bool[Array, "b t"] | None,
) -> tuple[Float[Array, "h c p"], Float[Array, "h c"]]:
    """Sum and number of the tokens of each cluster in a batch, float32; padding counts nowhere."""
    hot = jax.nn.one_hot(nearest, clusters, dtype=jnp.float32)
    hot = hot if real is None else hot * real[:, None, :, None].astype(jnp.float32)
    return jnp.einsum("bhtc,bhtp->hcp", hot, x.astype(jnp.float32)), jnp.sum(hot, axis=(0, 2))


class KMeans(nn.Module):
    """Online k-means with moving averages (Roy et al. 2021, arXiv 2003.05997, sec. 4.1; released code).

    A score is the inner product with the centroid. The controls ``sums`` [h c p] and ``counts`` [h c] (float32) move
    once in a training pass, after they were read, and carry no gradient: standardised Gaussian vectors and zeros at
    first, so that early centroids lean to their initial place, as released. Both are linear in the batch, so averages
    over its parts or over devices are those of the whole batch.

    Loss ``commitment``: mean (x - mu)^2 to the nearest centroid over real tokens and elements, twice because queries
    and keys are the same. It moves x only.

    Attributes:
      heads, clusters: h and c; every head has centroids of its own.
      decay: of the moving averages; the paper's 0.999 suits 100,000 steps.
      balance: how far the control ``shift`` [h c], which is added to the scores, moves in a training pass: down for
        clusters with more tokens than the mean, up for those with fewer (as the bias of `routers.SigmoidTopK`). 0 for
        no such control, as published: there each cluster's fixed number of tokens balances the load. Where tokens
        choose, nothing else does.
    """

    heads: int
    clusters: int
    decay: float = 0.999
    balance: float = 0.0
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        if not 0 <= self.decay < 1 or self.balance < 0:
            raise DyncompError(
                f"KMeans: decay={self.decay}, balance={self.balance}; use [0, 1) and 0 or more"
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h t p"],
        place: Int[Array, "t"],
        real: Bool[Array, "b t"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "b h t c"], dict[str, Array]]:
        """Scores and the commitment loss."""
        del place
        shape = (self.heads, self.clusters, x.shape[-1])
        draw = lambda: standardised(jax.random.normal(self.make_rng("params"), shape))
        sums = self.variable("controls", "sums", draw)
        counts = self.variable("controls", "counts", jnp.zeros, shape[:2], jnp.float32)
        mu = lax.stop_gradient(centroids(sums.value, counts.value))
        wide = x.astype(jnp.float32)
        scores = jnp.einsum("bhtp,hcp->bhtc", lax.stop_gradient(wide), mu)
        shift = None
        if self.balance:
            shift = self.variable("controls", "shift", jnp.zeros, shape[:2], jnp.float32)
            scores = scores + shift.value[None, :, None]
        nearest = jnp.argmax(scores, axis=-1).astype(jnp.int32)
        gap = wide - mu[jnp.arange(self.heads)[None, :, None], nearest]
        losses = {"commitment": 2.0 * _mean(jnp.mean(gap * gap, axis=-1), real)}
        if train and self.is_mutable_collection("controls") and not self.is_initializing():
            fresh, load = cluster_sums(lax.stop_gradient(x), nearest, self.clusters, real)
            mix = lambda old, new: self.decay * old + (1 - self.decay) * new
            sums.value, counts.value = mix(sums.value, fresh), mix(counts.value, load)
            if shift is not None:
                over = jnp.sign(load - jnp.mean(load, axis=-1, keepdims=True))
                shift.value = shift.value - self.balance * over
        return scores, losses

    def cost(self, head_dim: int) -> Cost:
        """Price of scoring one token for all heads; training adds h p additions and as many for the loss."""
        h, c = self.heads, self.clusters
        return Cost(2 * h * c * head_dim, 4 * h * (c + head_dim))


class RandomClusters(nn.Module):
    """A fresh random score for every token, head and cluster: what k-means has to beat.

    Drawn from the stream ``router`` while training; otherwise from a fixed key and a token's place, so that evaluation
    is reproducible and decoding agrees with a whole pass (all layers and sequences then draw alike).

    Attributes:
      heads, clusters: h and c.
    """

    heads: int
    clusters: int
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h t p"],
        place: Int[Array, "t"],
        real: Bool[Array, "b t"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "b h t c"], dict[str, Array]]:
        """Uniform scores; no losses."""
        del real
        b, h, t, _ = x.shape
        if train:
            return jax.random.uniform(self.make_rng("router"), (b, h, t, self.clusters)), {}
        key = jax.random.key(0)
        draw = lambda i: jax.random.uniform(jax.random.fold_in(key, i), (h, self.clusters))
        scores = jnp.moveaxis(jax.vmap(draw)(place), 0, 1)
        return jnp.broadcast_to(scores[None], (b, h, t, self.clusters)), {}

    def cost(self, head_dim: int) -> Cost:
        """Drawing costs no product."""
        del head_dim
        return Cost(0, 4 * self.heads * self.clusters)


class AngularHash(nn.Module):
    """Random projections r and -r in the place of centroids (angular hashing, Andoni et al. 2015).

    The projections come from the stream ``router`` in every training pass and from a fixed key otherwise. The paper's
    code has a switch from centroids to random projections; that they are drawn afresh is ours.

    Attributes:
      heads, clusters: h and c, an even number.
    """

    heads: int
    clusters: int
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        if self.clusters % 2:
            raise DyncompError(
                f"AngularHash.clusters={self.clusters}: use an even number, a projection and its opposite each"
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h t p"],
        place: Int[Array, "t"],
        real: Bool[Array, "b t"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "b h t c"], dict[str, Array]]:
        """Products with the projections and their opposites; no losses."""
        del place, real
        key = self.make_rng("router") if train else jax.random.key(0)
        scores = jnp.einsum(
            "bhtp,hpr->bhtr",
            lax.stop_gradient(x.astype(jnp.float32)),
            _directions(key, self.heads, x.shape[-1], self.clusters // 2),
        )
        return jnp.concatenate([scores, -scores], axis=-1), {}

    def cost(self, head_dim: int) -> Cost:
        """Price of hashing one token for all heads."""
        h, c = self.heads, self.clusters
        return Cost(h * c * head_dim, 4 * h * (c + head_dim))


def _directions(key: Key[Array, ""], h: int, p: int, r: int) -> Float[Array, "h p r"]:
    return jax.random.normal(key, (h, p, r))


def _mean(values: Float[Array, "b h t"], real: Bool[Array, "b t"] | None) -> Float[Array, ""]:
    if real is None:
        return jnp.mean(values)
    kept = jnp.broadcast_to(real[:, None], values.shape)
    return jnp.sum(jnp.where(kept, values, 0.0)) / jnp.maximum(
        jnp.sum(kept, dtype=jnp.int32).astype(jnp.float32), 1.0
    )
