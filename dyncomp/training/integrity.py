"""Digests that make a checkpoint trustworthy: one for every file, one for the elements of every array.

The digest of an array must not depend on how it is split over devices and processes, because what was saved from one
mesh is restored onto another, and no process need hold the whole. So it is a sum, modulo 2**64, of one term for each
element, mixed from its bits and its place: each process adds up its own shards, and the sums are added. The mixing is
invertible, so a single changed element always shows; several cancel out by chance once in 2**64.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dyncomp.core.workdir import MANIFEST

FORMAT = 2
READABLE = (1, 2)
"""Format 1 had digests of whole arrays, which a process of several cannot verify; those of its files are verified."""
CHUNK = 1 << 16
"""Elements that are mixed at a time: they stay in the cache."""

Sums = dict[str, int]
"""Path of an array -> its sum, or this process's part of it."""


class DamageError(Exception):
    """A stored step is not what was saved; the message names the file and what is wrong."""


def digest(data: bytes) -> str:
    """128-bit BLAKE2b of bytes, in hexadecimal."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def element_sum(values: np.ndarray, start: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """The part of an array's sum that its block ``values`` contributes.

    Args:
      values: the block.
      start: where it begins in the array, a number a dimension.
      shape: of the array.
    """
    if not values.size:
        return 0
    size = min(values.itemsize, 8)  # complex128 counts as two words
    words = np.ascontiguousarray(values).reshape(-1).view(f"u{size}")
    each, total = len(words) // values.size, 0
    for first in range(0, len(words), CHUNK):
        index = np.arange(first, min(first + CHUNK, len(words)), dtype=np.int64)
        places = _places(index // each, values.shape, start, shape) * each + index % each
        total += int(
            _mixed(words[first : first + CHUNK], places.astype(np.uint64)).sum(dtype=np.uint64)
        )
    return total % 2**64


def _places(
    index: np.ndarray, block: tuple[int, ...], start: tuple[int, ...], shape: tuple[int, ...]
) -> np.ndarray:
    """Flat places in the array of the elements with flat places ``index`` in the block."""
    if block[1:] == shape[1:]:  # whole rows: no division
        return index + (start[0] * math.prod(shape[1:]) if start else 0)
    places = np.zeros_like(index)
    for inside, offset, length in zip(np.unravel_index(index, block), start, shape, strict=True):
        places = places * length + (inside + offset)
    return places


def _mixed(words: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 over word and place: a bijection of the word for each place."""
    x = words.astype(np.uint64) ^ ((places + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def leaf_sum(leaf: Any) -> int:
    """This process's part of an array's sum: every block of a jax.Array is counted by one process, once."""
    shape = tuple(leaf.shape)
    if not isinstance(leaf, jax.Array):
        return element_sum(np.asarray(leaf), (0,) * len(shape), shape)
    blocks = (shard for shard in leaf.addressable_shards if shard.replica_id == 0)
    starts = lambda shard: tuple(part.start or 0 for part in shard.index)
    return sum(element_sum(np.asarray(b.data), starts(b), shape) for b in blocks) % 2**64


def sums(leaves: Mapping[str, Any]) -> Sums:
    """This process's part of every array's sum."""
    return {path: leaf_sum(leaf) for path, leaf in leaves.items()}


def leaf_records(leaves: Mapping[str, Any], whole: Sums) -> dict[str, Any]:
    """Shape, dtype and sum of every array, for the manifest."""
    record = lambda path, leaf: {
        "shape": list(leaf.shape),
        "dtype": str(leaf.dtype),
        "sum": f"{whole[path]:016x}",
    }
    return {path: record(path, leaf) for path, leaf in leaves.items()}


def file_digest(path: Path) -> str:
    """Digest of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def files_of(folder: Path) -> dict[str, Path]:
    """All files below a folder but the manifest, by relative path."""
    found = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {p.relative_to(folder).as_posix(): p for p in found if p.name != MANIFEST}


def write_manifest(folder: Path, leaves: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
    """Writes the manifest in one step; from then on the step counts as saved."""
    files = {name: file_digest(path) for name, path in files_of(folder).items()}
    body = {"format": FORMAT, **extra, "leaves": dict(leaves), "files": files}
    text = json.dumps(body, sort_keys=True)
    scratch = folder / f"{MANIFEST}.tmp"
    scratch.write_text(json.dumps({"digest": digest(text.encode()), "body": text}))
    scratch.rename(folder / MANIFEST)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, verified against its own digest.

    Raises:
      DamageError: it is not what was written.
    """
    try:
        outer = json.loads((folder / MANIFEST).read_text())
        text = outer["body"]
        if outer["digest"] == digest(text.encode()) and set(outer) == {"digest", "body"}:
            return json.loads(text)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise DamageError(f"{MANIFEST} is damaged")


def verify_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Checks every file before anything parses one.

    Raises:
      DamageError: a file is missing, extra or changed.
    """
    present = files_of(folder)
    for name, expected in manifest["files"].items():
        if name not in present:
            raise DamageError(f"{name} is missing")
        if file_digest(present[name]) != expected:
            raise DamageError(f"{name} is damaged")


def verify_leaves(
    leaves: Mapping[str, Any],
    manifest: Mapping[str, Any],
    everywhere: Callable[[Sums], Sums] = lambda own: own,
) -> None:
    """Checks restored arrays bit for bit.

    Args:
      leaves: arrays by path.
      manifest: of the folder they come from.
      everywhere: adds up the parts of all processes; default, this one alone holds all.

    Raises:
      DamageError: an array differs from what was saved.
    """
    if manifest["format"] == 1:
        return
    wanted = manifest["leaves"]
    found = {path: leaf for path, leaf in leaves.items() if path in wanted}
    now = leaf_records(found, everywhere(sums(found)))
    for path, record in wanted.items():
        if now.get(path) != record:
            raise DamageError(f"array {path} is damaged")
