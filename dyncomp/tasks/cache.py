"""Prepared data on disk: Arrow tables under the cache folder.

`datasets` takes as long to import as JAX, so only what touches a table imports it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dyncomp.core.cache import cache_root, cached_folder, intact

__all__ = ["cache_root", "cached_folder", "intact", "load_table", "rows", "save_table"]


def save_table(columns: Mapping[str, np.ndarray], folder: Path) -> None:
    """Writes columns [n k] as a table of fixed-size lists, through Arrow buffers (never row by row)."""
    import datasets
    import pyarrow as pa

    arrays = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
        for name, values in columns.items()
    }
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        datasets.Dataset(pa.table(arrays)).save_to_disk(str(folder))
    finally:
        if shown:
            datasets.enable_progress_bars()


def load_table(folder: Path) -> Any:
    """A memory-mapped `datasets.Dataset` whose selections are Arrow tables."""
    import datasets

    table = datasets.Dataset.load_from_disk(str(folder))
    return table.with_format("arrow")


def rows(table: Any, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Rows ``indices`` of a table of fixed-size lists: column -> [b k], one gather for the whole batch."""
    taken = table[indices]
    return {
        name: taken.column(name).combine_chunks().flatten().to_numpy().reshape(len(indices), -1)
        for name in taken.column_names
    }
