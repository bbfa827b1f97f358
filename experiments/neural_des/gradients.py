"""Gradients of fixed points in float64: implicit against a converged unroll, and one step against the exact one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp.recurrent import FixedPoint, TanhCell, adjoint

RHOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def tanh_step(given: Any, z: Any) -> Any:
    """The map of a `TanhCell` from its normalised weight and the weights of its injection."""
    injected = given["x"] @ given["inject"] + given["bias"]
    return TanhCell.step({"weight": given["weight"], "injected": injected}, z)


def linear_step(given: Any, z: Any) -> Any:
    """z -> J z."""
    return z @ given.T


def gradients(params: Any, x: Any, quick: bool) -> dict[str, dict[str, float]]:
    """A trained cell's parameter gradients three ways.

    Args:
      params: of the cell.
      x: [b d], what it reads.
      quick: fewer examples.
    """
    with jax.enable_x64(True):
        weight = np.asarray(params["weight"], np.float64)
        weight = weight / max(1.0, np.linalg.norm(weight, 2) / 0.9)
        given = {
            "weight": weight,
            "x": np.asarray(x, np.float64)[: 4 if quick else 32],
            "inject": np.asarray(params["inject"], np.float64),
            "bias": np.asarray(params["bias"], np.float64),
        }
        target = np.random.default_rng(0).normal(size=(len(given["x"]), len(weight)))
        found = {}
        for name in ("implicit", "one_step", "unroll"):
            how = FixedPoint(gradient=name, max_steps=400, backward_steps=400)
            loss = lambda given, how=how: jnp.sum(
                how(tanh_step, given, jnp.zeros(target.shape), 1e-10)[0] * target
            )
            grads = jax.jit(jax.grad(loss))(given)
            named = [grads[key].reshape(-1) for key in ("weight", "inject", "bias")]
            found[name] = np.concatenate(jax.device_get(named))
    exact, unroll, once = found["implicit"], found["unroll"], found["one_step"]
    difference = np.linalg.norm(exact - unroll) / np.linalg.norm(unroll)
    cosine = exact @ once / (np.linalg.norm(exact) * np.linalg.norm(once))
    return {
        "implicit": {"difference": float(difference)},
        "one_step": {"parameter_cosine": float(cosine)},
    }


def cosines(seed: int) -> dict[str, dict[str, float]]:
    """Cosine between g and (1 - J)^-T g for J of norm rho: random orthogonal matrices, and a Gaussian one."""
    rng, n, draws = np.random.default_rng([seed, 6]), 64, 64
    with jax.enable_x64(True):
        turn = np.linalg.qr(rng.normal(size=(n, n)))[0]
        gauss = rng.normal(size=(n, n))
        g = rng.normal(size=(draws, n))
        matrices = {f"rho_{rho}": rho * turn for rho in RHOS}
        matrices["gaussian_0.9"] = 0.9 * gauss / np.linalg.norm(gauss, 2)
        how, found = FixedPoint(backward_steps=400), {}
        solve = jax.jit(lambda J: adjoint(linear_step, J, jnp.zeros(g.shape), g, 1e-12, how)[0])
        for name, matrix in matrices.items():
            v, rho = np.asarray(solve(matrix)), np.linalg.norm(matrix, 2)
            each = (v * g).sum(1) / np.linalg.norm(v, axis=1) / np.linalg.norm(g, axis=1)
            bound = np.sqrt(1 - rho**2)
            found[name] = {"cosine": float(each.mean()), "above_bound": float(each.min() - bound)}
    return found
