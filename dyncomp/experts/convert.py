"""A trained dense feed-forward network as experts: cut into slices of its neurons, or copied (sparse upcycling).

Pure functions of parameters on the host, in NumPy; leaves may lead with stacked layer axes (``*l``). The two
dataclasses at the end apply them to a whole checkpoint: `dyncomp.training.InitFrom.convert` takes either.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Float, Int

Assignment = Literal["contiguous", "random", "clustered"]
Weights = dict[str, np.ndarray]
"""``gate``, ``up`` [*l d f] and ``down`` [*l f d] of a SwiGLU, or the same with an expert axis e after the layers."""
NAMES = ("gate", "up", "down")


def assign_neurons(
    gate: Float[np.ndarray, "*l d f"], slices: int, how: Assignment = "contiguous", seed: int = 0
) -> Int[np.ndarray, "*l e s"]:
    """Which s = f / e hidden neurons go into each of e slices, layer by layer; a permutation of all f.

    Args:
      gate: its columns are what "clustered" groups; the other ways only read its shape.
      slices: e.
      how: "contiguous" cuts in order (the released code of FactorLLM), "random" shuffles first, "clustered" puts
        neurons with similar gates together (`balanced_clusters`).
      seed: of the shuffle and of k-means.

    Raises:
      DyncompError: e does not divide f, or an unknown way.
    """
    hidden = gate.shape[-1]
    if slices < 1 or hidden % slices:
        raise DyncompError(f"{slices} slices of {hidden} neurons: use a divisor of {hidden}")
    if how not in ("contiguous", "random", "clustered"):
        raise DyncompError(f"how={how!r}: use 'contiguous', 'random' or 'clustered'")
    layers = gate.reshape(-1, *gate.shape[-2:])
    found = []
    for index, layer in enumerate(layers):
        rng = np.random.default_rng([seed, index])
        if how == "clustered":
            found.append(balanced_clusters(layer.T, slices, seed + index))
        else:
            order = rng.permutation(hidden) if how == "random" else np.arange(hidden)
            found.append(order.reshape(slices, -1))
    return np.stack(found).reshape(*gate.shape[:-2], slices, hidden // slices)


def balanced_clusters(
    points: Float[np.ndarray, "n d"], groups: int, seed: int = 0, rounds: int = 5
) -> Int[np.ndarray, "e s"]:
    """Indices of n points in ``groups`` groups of equal size: k-means with an exact balanced assignment.

    Centres come from scikit-learn's k-means; then points and centres are matched (Hungarian, every centre s times) and
    centres moved, ``rounds`` times. The matching takes n^3 steps at worst: minutes for n of several thousand.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.cluster import KMeans

    points = np.asarray(points, np.float64)
    size = len(points) // groups
    if size * groups != len(points):
        raise DyncompError(f"{len(points)} points in {groups} equal groups: use a divisor")
    centres = KMeans(groups, n_init=4, random_state=seed).fit(points).cluster_centers_
    owner = np.zeros(len(points), int)
    for _ in range(rounds):
        far = np.square(points).sum(1)[:, None] - 2 * points @ centres.T + np.square(centres).sum(1)
        _, slot = linear_sum_assignment(np.repeat(far, size, axis=1))
        moved = slot // size
        centres = np.stack([points[moved == group].mean(0) for group in range(groups)])
        if (moved == owner).all():
            break
        owner = moved
    return np.argsort(owner, kind="stable").reshape(groups, size)


def cut(dense: Mapping[str, Any], neurons: Int[np.ndarray, "*l e s"]) -> Weights:
    """Slices of a SwiGLU: gate, up [*l e d s] and down [*l e s d]; summed over e they are the whole network.

    The columns of gate and up and the rows of down are taken by the same indices.
    """
    gate, up, down = (np.asarray(dense[name]) for name in NAMES)
    columns = lambda w: np.moveaxis(
        np.take_along_axis(w, _flat(neurons)[..., None, :], axis=-1).reshape(
            *w.shape[:-1], *neurons.shape[-2:]
        ),
        -2,
        -3,
    )
    rows = np.take_along_axis(down, _flat(neurons)[..., None], axis=-2)
    rows = rows.reshape(*neurons.shape, down.shape[-1])
    return {"gate": columns(gate), "up": columns(up), "down": rows}


def _flat(neurons: np.ndarray) -> np.ndarray:
    return neurons.reshape(*neurons.shape[:-2], -1)


def joined(slices: Mapping[str, Any]) -> Weights:
    """The dense SwiGLU whose slices these are, neurons in slice order: the inverse of a contiguous `cut`."""
    gate, up, down = (np.asarray(slices[name]) for name in NAMES)
    columns = lambda w: np.moveaxis(w, -3, -2).reshape(*w.shape[:-3], w.shape[-2], -1)
    rows = down.reshape(*down.shape[:-3], -1, down.shape[-1])
    return {"gate": columns(gate), "up": columns(up), "down": rows}


def upcycled(dense: Mapping[str, Any], experts: int, noise: float = 0.0, seed: int = 0) -> Weights:
    """``experts`` copies of a SwiGLU (sparse upcycling, Komatsuzaki et al. 2022).

    Without noise a mixture of them equals the dense network exactly where the gates of a row add up to 1
    (`routers.TopK` with ``renormalize``), whichever experts are chosen.

    Args:
      dense: gate, up [*l d f], down [*l f d].
      experts: e.
      noise: standard deviation of what is added to each copy, as a share of that of the leaf.
      seed: of the noise.
    """
    if experts < 1 or noise < 0:
        raise DyncompError(f"upcycled: experts={experts}, noise={noise}: use at least 1 and 0")
    rng, out = np.random.default_rng(seed), {}
    for name in NAMES:
        leaf = np.asarray(dense[name])
        copies = np.repeat(np.expand_dims(leaf, -3), experts, axis=-3)
        if noise:
            drawn = rng.standard_normal(copies.shape) * (noise * leaf.std())
            copies = (copies + drawn).astype(leaf.dtype)
        out[name] = copies
    return out


def _dense_units(found: Mapping[str, Any], seam: str) -> dict[str, Weights]:
    """Path of each SwiGLU called ``seam`` -> its weights, out of a flat tree ``path -> array``."""
    ends = tuple(f"{seam}/{name}" for name in NAMES)
    units: dict[str, Weights] = {}
    for path, leaf in found.items():
        if path.endswith(ends) and f"/{path}".endswith(tuple(f"/{end}" for end in ends)):
            place, name = path.rsplit("/", 1)
            units.setdefault(place, {})[name] = np.asarray(leaf)
    whole = {place: unit for place, unit in units.items() if len(unit) == len(NAMES)}
    if not whole:
        raise DyncompError(f"no SwiGLU named {seam!r} there: its paths end in {', '.join(ends)}")
    return whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class SliceDense:
    """Checkpoint of a dense network -> that of one with `SlicedFFN` in the place of every SwiGLU.

    Attributes:
      slices, how, seed: see `assign_neurons`.
      seam: name of the units to cut.
    """

    slices: int
    how: Assignment = "contiguous"
    seed: int = 0
    seam: str = "ffn"

    def __call__(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """Flat parameters ``path -> array``; each cut unit also leaves its copy under ``teacher``."""
        out = dict(found)
        for place, unit in _dense_units(found, self.seam).items():
            neurons = assign_neurons(unit["gate"], self.slices, self.how, self.seed)
            out |= {f"{place}/{name}": leaf for name, leaf in cut(unit, neurons).items()}
            out |= {f"{place}/teacher/{name}": leaf for name, leaf in unit.items()}
        return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpcycleDense:
    """Checkpoint of a dense network -> that of one with a mixture of copies in the place of every SwiGLU.

    Attributes:
      experts, noise, seed: see `upcycled`.
      seam: name of the units to copy.
    """

    experts: int
    noise: float = 0.0
    seed: int = 0
    seam: str = "ffn"

    def __call__(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """Flat parameters ``path -> array``."""
        out = dict(found)
        for number, (place, unit) in enumerate(_dense_units(found, self.seam).items()):
            copies = upcycled(unit, self.experts, self.noise, self.seed + number)
            out |= {f"{place}/{name}": leaf for name, leaf in copies.items()}
        return out
