"""Digests that make a checkpoint trustworthy: one for every file, one for the bytes of every array."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1
MANIFEST = "dyncomp.json"


class DamageError(Exception):
    """A stored step is not what was saved; the message names the file and what is wrong."""


def digest(data: Any) -> str:
    """128-bit BLAKE2b of bytes or of an array's bytes, in hexadecimal."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def leaf_record(leaf: np.ndarray) -> dict[str, Any]:
    """Shape, dtype and digest of an array."""
    contiguous = np.ascontiguousarray(leaf)
    return {
        "shape": list(leaf.shape),
        "dtype": str(leaf.dtype),
        "digest": digest(contiguous.view(np.uint8).reshape(-1).data if leaf.size else b""),
    }


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


def verify_leaves(leaves: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """Checks restored arrays bit for bit.

    Raises:
      DamageError: an array differs from what was saved.
    """
    for path, record in manifest["leaves"].items():
        if path not in leaves or leaf_record(np.asarray(leaves[path])) != record:
            raise DamageError(f"array {path} is damaged")
