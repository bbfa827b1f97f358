"""Segments on disk: a folder that runs without the model's source (`jax.export`)."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.runtime.flat import Flat, flatten
from dyncomp.runtime.graph import Graph
from dyncomp.runtime.segments import Segmented

MANIFEST, WEIGHTS, FORMAT = "segments.json", "weights.npz", 2


def save_segments(
    net: Segmented,
    example: Any,
    folder: str | Path,
    *,
    capacity: int,
    buckets: tuple[int, ...],
    platforms: tuple[str, ...] = ("cpu",),
) -> Path:
    """Writes every segment for every bucket, and the weights, into ``folder``, which must not exist or be empty.

    Args:
      net: the network.
      example: inputs; only shape and dtype of a row are read.
      folder: where to.
      capacity: slots of the buffer that the programs work on.
      buckets: ascending row counts.
      platforms: "cpu", "cuda", "tpu"; the programs run on these.

    Returns:
      The folder.

    Raises:
      DyncompError: the folder holds something.
    """
    folder, flat = Path(folder), flatten(net, example)
    if folder.exists() and any(folder.iterdir()):
        raise DyncompError(f"{folder} is not empty; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    arrays, lists = _distinct(flat.weights)
    np.savez(folder / WEIGHTS, *map(_bits, arrays))
    for index in range(flat.graph.end):
        for bucket in buckets:
            shapes = flat.arguments(index, bucket, capacity)
            made = export.export(flat.program(index, bucket), platforms=platforms)(*shapes)
            (folder / _file(index, bucket)).write_bytes(made.serialize())
    told = {
        "format": FORMAT,
        "graph": dataclasses.asdict(flat.graph),
        "prices": [dataclasses.asdict(price) for price in flat.prices],
        "thresholds": flat.thresholds.tolist(),
        "row": _told(flat.row),
        "carry": [_told(leaf) for leaf in flat.carry],
        "weights": lists,
        "dtypes": [str(array.dtype) for array in arrays],
        "moved": flat.moved,
        "capacity": capacity,
        "buckets": list(buckets),
        "sha256": {path.name: _digest(path) for path in sorted(folder.iterdir())},
    }
    (folder / MANIFEST).write_text(json.dumps(told, indent=1) + "\n")
    return folder


def load_segments(folder: str | Path) -> tuple[Flat, int, tuple[int, ...]]:
    """(network, capacity, buckets) of a folder that `save_segments` wrote, for the executors' ``load``.

    Raises:
      DyncompError: something is missing, or is not what was written.
    """
    folder = Path(folder)
    try:
        told = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise DyncompError(
            f"{folder / MANIFEST} can't be read ({error}); save the segments again"
        ) from error
    if told.get("format") != FORMAT:
        raise DyncompError(f"{folder}: format {told.get('format')!r}, this version reads {FORMAT}")
    for name, digest in told["sha256"].items():
        if not (folder / name).is_file() or _digest(folder / name) != digest:
            raise DyncompError(f"{folder / name} is missing or damaged; save the segments again")
    with np.load(folder / WEIGHTS, allow_pickle=False) as stored:
        arrays = [
            jnp.asarray(stored[f"arr_{n}"].view(jnp.dtype(dtype)))
            for n, dtype in enumerate(told["dtypes"])
        ]
    graph = told["graph"]
    targets = tuple(map(tuple, graph["targets"]))
    flat = Flat(
        Graph(tuple(graph["names"]), targets, tuple(graph["trips"])),
        tuple(Cost(**price) for price in told["prices"]),
        np.asarray(told["thresholds"], np.float32),
        _shape(told["row"]),
        [_shape(leaf) for leaf in told["carry"]],
        [[arrays[n] for n in own] for own in told["weights"]],
        [functools.partial(_stored, folder, index) for index in range(len(targets))],
        list(map(tuple, told["moved"])),
    )
    return flat, told["capacity"], tuple(told["buckets"])


def _stored(folder: Path, index: int, bucket: int) -> Callable[..., Any]:
    """A segment's function for one row count."""
    raw = (folder / _file(index, bucket)).read_bytes()
    return export.deserialize(bytearray(raw)).call


def _file(index: int, bucket: int) -> str:
    return f"segment_{index}_rows_{bucket}.bin"


def _distinct(weights: list[list[Any]]) -> tuple[list[Any], list[list[int]]]:
    """Every array once, and which of them each segment uses."""
    arrays: dict[int, Any] = {}
    for leaf in (leaf for own in weights for leaf in own):
        arrays.setdefault(id(leaf), leaf)
    number = {key: n for n, key in enumerate(arrays)}
    return list(arrays.values()), [[number[id(leaf)] for leaf in own] for own in weights]


def _bits(array: Any) -> np.ndarray:
    """As numpy knows it: bfloat16 as its bits."""
    found = np.asarray(array)
    return found if found.dtype.isbuiltin == 1 else found.view(f"u{found.dtype.itemsize}")


def _told(leaf: jax.ShapeDtypeStruct) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _shape(told: dict[str, Any]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(told["shape"]), jnp.dtype(told["dtype"]))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
