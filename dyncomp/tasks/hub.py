"""Data sets by name through `datasets`, with one-line errors where there is no network."""

from collections.abc import Mapping, Sequence
from typing import Any

from dyncomp.core.errors import DyncompError

DataFiles = Mapping[str, str] | Sequence[str] | None


def load_hub(name: str, config: str | None, data_files: DataFiles, split: str) -> Any:
    """One split of a hub data set, or of local files through a builder ("json", "parquet", "text", "imagefolder").

    Returns:
      A `datasets.Dataset`.

    Raises:
      DyncompError: offline, no such data set, no such split, or unreadable files.
    """
    import datasets

    if not name:
        raise DyncompError("no data set name: set name to a hub name, or to 'json' with data_files")
    files = dict(data_files) if isinstance(data_files, Mapping) else list(data_files or ())
    try:
        loaded = datasets.load_dataset(name, config, data_files=files or None, split=split)
    except Exception as error:  # the library raises a dozen kinds, most of them network errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise DyncompError(
            f"cannot load data set {name!r}: {reason}; with no network use name='json' (or 'parquet', 'text')"
            " and data_files, or an embedded task (tasks.CodeLM, tasks.Digits)"
        ) from error
    if not isinstance(loaded, datasets.Dataset):
        raise DyncompError(f"data set {name!r} has no random access to split {split!r}")
    return loaded
