"""Maps with a fixed point: what an equilibrium block iterates."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.sharding import param
from dyncomp.core.typing import Array, Float

Norm = Literal["svd", "power"]


def power_norm(
    w: Float[Array, "d o"], right: Float[Array, "o"], steps: int
) -> tuple[Float[Array, ""], Float[Array, "o"]]:
    """Largest singular value of w by power iteration from ``right``, and the vector it ended at.

    A lower bound that converges; differentiable in w (vectors are constants, Miyato et al. 2018).
    """
    fixed = jax.lax.stop_gradient(w)
    unit = lambda v: v / (jnp.sqrt(jnp.sum(v * v)) + jnp.asarray(1e-12, v.dtype))
    for _ in range(steps):
        right = unit(fixed.T @ (fixed @ right))
    left = unit(fixed @ right)
    return left @ (w @ right), right


class TanhCell(nn.Module):
    """z -> tanh(W z + U x + b) with |W| <= bound in the spectral norm: a contraction, as tanh is 1-Lipschitz.

    ``prepared = cell(x)`` does once what does not depend on z; ``TanhCell.step(prepared, z)`` is the map.
    Control with ``norm="power"``: ``right`` [d], the vector of the power iteration, moved in training.

    Attributes:
      width: d of the state.
      bound: of W's largest singular value: W is divided by max(1, sigma / bound).
      norm: "svd" computes sigma exactly; "power" runs ``power_steps`` of the power iteration in training and ten times
        as many outside, from where the last one ended: cheap for wide states, a little above the bound until it has
        converged.
    """

    width: int
    bound: float = 0.9
    norm: Norm = "svd"
    power_steps: int = 3
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        if self.norm not in ("svd", "power"):
            raise DyncompError(f"TanhCell.norm={self.norm!r}: use 'svd' or 'power'")
        if not 0 < self.bound < 1 or self.power_steps < 1:
            raise DyncompError(f"TanhCell.bound={self.bound}: a contraction needs 0 < bound < 1")
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Float[Array | np.ndarray, "b d"], train: bool = False
    ) -> dict[str, Array]:
        """``weight`` [width width], normalised, and ``injected`` [b width] = U x + b."""
        x, shape, dtype = jnp.asarray(x), (self.width, self.width), self.dtypes.param
        orthogonal, lecun = nn.initializers.orthogonal(), nn.initializers.lecun_normal()
        weight = param(self, "weight", orthogonal, shape, ("embed", None), dtype)
        inject = param(self, "inject", lecun, (x.shape[-1], self.width), ("embed", None), dtype)
        bias = param(self, "bias", nn.initializers.zeros_init(), shape[:1], (None,), dtype)
        sigma = self._sigma(weight, train)
        weight = weight / jnp.maximum(1.0, sigma / self.bound).astype(weight.dtype)
        injected = x @ inject.astype(x.dtype) + bias.astype(x.dtype)[None]
        return {"weight": weight.astype(x.dtype), "injected": injected}

    def _sigma(self, weight: Array, train: bool) -> Array:
        if self.norm == "svd":
            return jnp.linalg.norm(weight, 2)
        start = lambda: jnp.full((self.width,), self.width**-0.5, weight.dtype)
        right = self.variable("controls", "right", start)
        steps = self.power_steps if train else 10 * self.power_steps
        sigma, moved = power_norm(weight, right.value, steps)
        if train and self.is_mutable_collection("controls") and not self.is_initializing():
            right.value = jax.lax.stop_gradient(moved)
        return sigma

    @staticmethod
    def step(prepared: Any, z: Float[Array, "b d"]) -> Float[Array, "b d"]:
        """The map."""
        return jnp.tanh(z @ prepared["weight"] + prepared["injected"])

    def cost(self, d_in: int) -> dict[str, Cost]:
        """One evaluation of the map, and one preparation, for an example (the norm is the batch's and not counted)."""
        d, item = self.width, self.dtypes.compute_itemsize
        return {
            "evaluations": Cost(2 * d * d + 2 * d, 3 * d * item),
            "prepare": Cost(2 * d_in * d + d, (d_in + d) * item),
        }
