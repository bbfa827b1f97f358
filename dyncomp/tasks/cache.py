"""Prepared data on disk: Arrow tables under a cache folder, made once, safe when several processes ask at once."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import datasets


def cache_root() -> Path:
    """``$DYNCOMP_CACHE``, else ``dyncomp`` under the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DYNCOMP_CACHE") or Path(base) / "dyncomp")


def cached_folder(key: str, build: Callable[[Path], None]) -> Path:
    """The folder of ``key``, built in a temporary folder and moved into place in one step.

    A folder without its ``done`` mark is damaged (an interrupted copy) and is built again.
    """
    final = cache_root() / "data" / key
    if (final / "done").exists():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=final.parent))
    try:
        build(scratch)
        (scratch / "done").write_text("")
        shutil.rmtree(final, ignore_errors=True)
        os.rename(scratch, final)
    except OSError:
        if not (final / "done").exists():  # another process may have been first
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return final


def load_table(folder: Path) -> datasets.Dataset:
    """A memory-mapped table with numpy rows."""
    return datasets.load_from_disk(str(folder)).with_format("numpy")


def save_table(table: datasets.Dataset, folder: Path) -> None:
    """Writes a table without progress bars."""
    datasets.disable_progress_bars()
    try:
        table.save_to_disk(str(folder))
    finally:
        datasets.enable_progress_bars()
