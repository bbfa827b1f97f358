"""Safetensors files: a header that is checked before use, tensors as memory-mapped views, and a writer.

The format: 8 bytes of length, a JSON header (name -> dtype, shape, offsets), then all tensors' bytes without gaps.
Nothing else is ever opened: no pickle.
"""

import json
import math
import mmap
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import ml_dtypes
import numpy as np

from dyncomp.core.errors import DyncompError

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SIZES = {
    **{name: np.dtype(dtype).itemsize for name, dtype in FLOATS.items() if name != "BF16"},
    **{"BF16": 2, "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1},
    **{"I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8},
}
MAX_HEADER = 100_000_000
"""Bytes; the limit of the format's own reader."""


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype of "float32", "bfloat16", ..."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


class Tensor(NamedTuple):
    """Where a tensor lies: bytes ``start`` to ``stop`` of ``file``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one file by name, every number checked against the file.

    Raises:
      DyncompError: not a safetensors file, truncated, or a header that contradicts itself.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
            raise _bad(path, f"a header of {length} bytes in a file of {size}")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _bad(path, "its header is not JSON with unique names") from error
    if not isinstance(header, dict):
        raise _bad(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    found = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for tensor in sorted(found.values(), key=lambda t: (t.start, t.stop)):
        if tensor.start != end:
            raise _bad(path, "its tensors overlap or leave gaps")
        end = tensor.stop
    if end != size:
        raise _bad(path, f"{size} bytes where its header describes {end}")
    return found


def _bad(path: Path, reason: str) -> DyncompError:
    return DyncompError(f"{path.name} is damaged or no safetensors file: {reason}; fetch it again")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name twice")
    return found


def _tensor(path: Path, name: str, entry: Any, base: int) -> Tensor:
    """One entry of the header; ``base`` is where data starts."""
    whole = lambda values: (
        isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 60 for v in values)
    )
    entry = entry if isinstance(entry, dict) else {}
    keys = ("dtype", "shape", "data_offsets")
    dtype, shape, offsets = cast(tuple[Any, Any, Any], tuple(entry.get(key) for key in keys))
    if not (isinstance(dtype, str) and dtype in _SIZES and whole(shape) and whole(offsets)):
        raise _bad(path, f"its entry {name[:80]!r} is malformed")
    if len(offsets) != 2 or len(shape) > 8:
        raise _bad(path, f"its entry {name[:80]!r} is malformed")
    start, stop = offsets
    if stop - start != math.prod(shape) * _SIZES[dtype]:
        raise _bad(path, f"{name[:80]!r} has {stop - start} bytes for shape {shape} of {dtype}")
    return Tensor(path, dtype, tuple(shape), base + start, base + stop)


class Weights:
    """All tensors of a folder, one file or sharded.

    Attributes:
      tensors: name -> where it lies.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors: dict[str, Tensor] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        for path in _files(folder):
            for name, tensor in read_header(path).items():
                if name in self.tensors:
                    raise DyncompError(
                        f"{folder.name}: tensor {name!r} is in {path.name} and {self.tensors[name].file.name};"
                        " remove one of the files"
                    )
                self.tensors[name] = tensor

    def view(self, name: str) -> np.ndarray:
        """A read-only view of a tensor in the file's own memory map."""
        file, dtype, shape, start, _ = self.tensors[name]
        if dtype not in FLOATS:
            raise DyncompError(
                f"{file.name}: {name!r} is {dtype}; weights must be {', '.join(FLOATS)}"
            )
        if file not in self._maps:
            with file.open("rb") as opened:
                self._maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        count = math.prod(shape)
        flat = np.frombuffer(self._maps[file], numpy_dtype(FLOATS[dtype]), count, start)
        return flat.reshape(shape)

    def release(self, name: str) -> None:
        """Drops a tensor's pages from this process's memory; a later view reads them again."""
        file, _, _, start, stop = self.tensors[name]
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        if file in self._maps and hasattr(mmap, "MADV_DONTNEED"):
            self._maps[file].madvise(mmap.MADV_DONTNEED, first, stop - first)


def _files(folder: Path) -> list[Path]:
    """The weight files of a folder.

    Raises:
      DyncompError: none, or an index that is damaged, incomplete or points elsewhere.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        found = sorted(folder.glob("*.safetensors"))
        if len(found) == 1:
            return found
        raise DyncompError(
            f"{folder}: {len(found)} .safetensors files and no model.safetensors.index.json; give a folder with one"
            " file, or an index (pickled .bin files are not opened: convert them)"
        )
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DyncompError(f"{index} is no index of weights; fetch it again") from error
    for name in names:
        # A name with a folder in it could point anywhere on the machine.
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise DyncompError(f"{index} names {name!r}, no plain file; fetch it again")
        if not (folder / name).is_file():
            raise DyncompError(f"{folder}: {name} is missing; fetch it again")
    return [folder / name for name in names]


def write(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    arrays: Iterable[np.ndarray],
) -> None:
    """Writes a safetensors file, one array at a time.

    Args:
      path: the file.
      tensors: name -> (dtype such as "float32", shape), in the order of ``arrays``.
      arrays: of exactly these shapes and dtypes.
    """
    codes = {dtype: code for code, dtype in FLOATS.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * _SIZES[codes[dtype]]
        header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for (name, (dtype, shape)), array in zip(tensors.items(), arrays, strict=True):
            if (str(array.dtype), array.shape) != (dtype, shape):
                raise DyncompError(
                    f"{name}: {array.dtype} {array.shape}, announced as {dtype} {shape}"
                )
            file.write(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
