"""Named loads of experts, and routers that are planted so that they give them."""

import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Float

LOADS = ("even", "dirichlet4", "one_hot", "trained")
TRAINED = (302, 420, 466, 756, 442, 517, 565, 628)
"""Rows of each of 8 experts in the middle layer of the trained top_2 of `dyncomp run harder_tasks_more_experts`."""


def shares(name: str, experts: int) -> np.ndarray:
    """Share of all choices that each expert gets, float64 [e].

    "even"; "dirichlet4", one fixed draw of a Dirichlet distribution of concentration 4; "one_hot", nearly all with the
    first (as far as a row's choices must be distinct); "trained", observed, for 8 experts only.

    Raises:
      DyncompError: there is no such load for so many experts.
    """
    if name == "even":
        return np.full(experts, 1 / experts)
    if name == "dirichlet4":
        return np.random.default_rng(0).dirichlet([4.0] * experts)
    if name == "one_hot":
        return np.where(np.arange(experts) == 0, 1.0, 1e-6) / (1 + 1e-6 * (experts - 1))
    if name == "trained" and experts == len(TRAINED):
        return np.asarray(TRAINED) / sum(TRAINED)
    raise DyncompError(f"no load {name!r} for {experts} experts; use {', '.join(LOADS)}")


def planted_biases(
    logits: Float[np.ndarray, "n e"], k: int, target: Float[np.ndarray, "e"], rounds: int = 300
) -> np.ndarray:
    """Biases [e] with which the k highest of logits + bias load the experts as ``target`` says, nearly.

    A multiplicative correction in the log domain; a share above 1/k cannot be reached, since choices are distinct.
    """
    bias = np.zeros(logits.shape[1])
    wanted = np.log(np.minimum(target, 1 / k) + 1e-9)
    for turn in range(rounds):
        chosen = np.argpartition(-(logits + bias), k - 1, axis=1)[:, :k]
        load = np.bincount(chosen.ravel(), minlength=logits.shape[1]) / chosen.size
        bias += (0.5 if turn < rounds // 2 else 0.1) * (wanted - np.log(load + 1e-9)).clip(-2, 2)
    return bias - bias.mean()
