"""Folders under one cache folder: made once, safe when several processes ask at once, checked before use."""

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from dyncomp.core.errors import DyncompError

MANIFEST = "manifest.json"


def cache_root() -> Path:
    """``$DYNCOMP_CACHE``, else ``dyncomp`` under the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DYNCOMP_CACHE") or Path(base) / "dyncomp")


def cached_folder(key: str, build: Callable[[Path], None], kind: str = "data") -> Path:
    """The folder of ``key``; built in a temporary folder and moved into place in one step, under a lock.

    A folder whose files do not match its manifest of checksums is damaged and is built again.

    Args:
      key: a file name.
      build: fills the folder it is given.
      kind: sub-folder of the cache.

    Raises:
      DyncompError: the cache folder cannot be written.
    """
    final = cache_root() / kind / key
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(final.parent / f".{key}.lock"):
            if not intact(final):
                _replace(final, build)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DyncompError(
            f"cannot prepare data in {final.parent}: {reason}; free space or set DYNCOMP_CACHE to another folder"
        ) from error
    return final


def _replace(final: Path, build: Callable[[Path], None]) -> None:
    scratch = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        build(scratch)
        (scratch / MANIFEST).write_text(json.dumps(_checksums(scratch)))
        shutil.rmtree(final, ignore_errors=True)
        os.rename(scratch, final)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def intact(folder: Path) -> bool:
    """Whether every file has the checksum that was written when the folder was made."""
    try:
        return json.loads((folder / MANIFEST).read_text()) == _checksums(folder)
    except (OSError, ValueError):  # no manifest, or one that is cut off
        return False


def _checksums(folder: Path) -> dict[str, int]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {p.relative_to(folder).as_posix(): _crc(p) for p in files}


def _crc(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value
