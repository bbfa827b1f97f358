"""Fewer experts after training: merged by usage after their neurons are aligned, or pruned.

Pure functions of one layer's parameters on the host, in NumPy; `dyncomp.routers.reduced` routes over what is left. See
section E of the survey arXiv 2412.14219.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Float, Int
from dyncomp.experts.convert import NAMES, Weights

Numbers = Sequence[int | float] | np.ndarray
"""One number for each expert, [e]."""


def logit_similarity(logits: Float[np.ndarray, "n e"]) -> Float[np.ndarray, "e e"]:
    """Cosine of two experts' router logits over calibration rows (MC-SMoE, Li et al. 2024)."""
    return _cosine(np.asarray(logits, np.float64).T)


def weight_similarity(bank: Mapping[str, Any]) -> Float[np.ndarray, "e e"]:
    """Cosine of two experts' weights as they lie, all matrices in one vector; align neurons first where it matters."""
    flat = [np.asarray(bank[name], np.float64).reshape(len(bank[name]), -1) for name in NAMES]
    return _cosine(np.concatenate(flat, axis=1))


def _cosine(rows: np.ndarray) -> np.ndarray:
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    return unit @ unit.T


def group_experts(
    similarity: Float[np.ndarray, "e e"], usage: Numbers, groups: int
) -> Int[np.ndarray, "e"]:
    """Group of each expert: the ``groups`` most used experts lead one each, the others join the most similar leader.

    Groups are numbered by the index of their leader (MC-SMoE, alg. 1). Ties go to the lower index.

    Raises:
      DyncompError: more groups than experts, or none.
    """
    usage, experts = np.asarray(usage, np.float64), len(usage)
    if not 1 <= groups <= experts:
        raise DyncompError(f"{groups} groups of {experts} experts: use 1..{experts}")
    leaders = np.sort(np.argsort(-usage, kind="stable")[:groups])
    joined = np.argmax(np.asarray(similarity)[:, leaders], axis=1)
    joined[leaders] = np.arange(groups)
    return joined.astype(np.int32)


def align(reference: Mapping[str, Any], other: Mapping[str, Any]) -> Int[np.ndarray, "f"]:
    """The order of ``other``'s neurons that puts each beside its counterpart in ``reference``.

    One expert each: gate, up [d f], down [f d]. Maximises the summed inner products of matched neurons' gate and up
    columns and down rows (Hungarian), which minimises the squared distance of the two experts.
    """
    from scipy.optimize import linear_sum_assignment

    flat = [np.concatenate([w["gate"].T, w["up"].T, w["down"]], axis=1) for w in (reference, other)]
    gain = np.asarray(flat[0], np.float64) @ np.asarray(flat[1], np.float64).T
    return linear_sum_assignment(gain, maximize=True)[1]


def reordered(expert: Mapping[str, Any], order: Int[np.ndarray, "f"]) -> Weights:
    """The same function with its hidden neurons in another order."""
    gate, up, down = (np.asarray(expert[name]) for name in NAMES)
    return {"gate": gate[:, order], "up": up[:, order], "down": down[order]}


def merge_experts(
    bank: Mapping[str, Any],
    groups: Numbers,
    usage: Numbers,
    *,
    aligned: bool = True,
) -> Weights:
    """One expert a group: the usage-weighted mean of its members, aligned to the most used one.

    Route over the old columns and let gates of one group add up: `routers.Grouped` with ``groups`` as its table. Where
    all members of a group are the same function, that is exact.

    Args:
      bank: gate, up [e d f] and down [e f d].
      groups: numbers 0..g-1, each used.
      usage: how often each expert is chosen; a group that nobody uses is averaged evenly.
      aligned: match neurons first; without it only experts of a common origin average well.
    """
    groups, usage = np.asarray(groups), np.asarray(usage, np.float64)
    total = int(groups.max()) + 1
    if sorted(set(groups.tolist())) != list(range(total)):
        raise DyncompError(f"groups {sorted(set(groups.tolist()))}: number them 0..{total - 1}")
    merged = []
    for group in range(total):
        members = np.flatnonzero(groups == group)
        share = usage[members] if usage[members].sum() > 0 else np.ones(len(members))
        experts = [{n: np.asarray(bank[n])[m] for n in NAMES} for m in members]
        lead = experts[int(np.argmax(share))]
        if aligned:
            experts = [reordered(expert, align(lead, expert)) for expert in experts]
        mean = lambda name: sum(s * e[name] for s, e in zip(share, experts, strict=True))  # noqa: B023
        merged.append({name: mean(name) / share.sum() for name in NAMES})
    dtype = np.asarray(bank["gate"]).dtype
    return {name: np.stack([one[name] for one in merged]).astype(dtype) for name in NAMES}


def most_used(usage: Numbers, keep: int) -> Int[np.ndarray, "k"]:
    """Indices, in order, of the ``keep`` experts chosen most often (`RoutePlan.load` over calibration rows)."""
    if not 1 <= keep <= len(usage):
        raise DyncompError(f"keep {keep} of {len(usage)} experts: use 1..{len(usage)}")
    return np.sort(np.argsort(-np.asarray(usage), kind="stable")[:keep])


def prune_experts(layer: Mapping[str, Any], keep: Int[np.ndarray, "k"]) -> dict[str, Any]:
    """Parameters of a mixture with the experts ``keep`` only; router columns go with them.

    Gates then renormalise over the survivors. To keep the old denominator, leave the router whole and mask it:
    `routers.PrunedTopK`.

    Args:
      layer: gate, up [*l e d f], down [*l e f d] and ``router``, whose leaves end in e (a linear router's kernel).
      keep: indices.
    """
    keep = np.asarray(keep)
    out: dict[str, Any] = {name: np.asarray(layer[name])[..., keep, :, :] for name in NAMES}
    router = {name: np.asarray(leaf)[..., keep] for name, leaf in layer["router"].items()}
    return {**out, "router": router}
