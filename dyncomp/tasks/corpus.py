"""Collections of text documents and their split by document, so that no split sees another's text."""

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from dyncomp.core.errors import DyncompError
from dyncomp.tasks.base import SPLITS, part

SHARES: Mapping[str, float] = {"train": 0.88, "validation": 0.04, "calibration": 0.04, "test": 0.04}
SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"}
"""Folders of the standard library left out: installed packages and the interpreter's own tests."""
LONG_LINE = 30
BLOCK = 1 << 14

Document = tuple[str, bytes]


def standard_library() -> list[Document]:
    """The Python standard library's source: (relative path, bytes), sorted by path, no two alike.

    ``_sysconfigdata*`` is left out: it describes the machine. The corpus is one for one Python version and packaging:
    some packagings leave ``idlelib`` out.
    """
    files = _walk(Path(sysconfig.get_paths()["stdlib"]), (".py",), SKIPPED)
    return list(distinct(file for file in files if not file[0].startswith("_sysconfigdata")))


def text_files(path: str, suffixes: Sequence[str]) -> list[Document]:
    """All files with one of ``suffixes`` below a folder; or one file, cut into documents of about 16 KiB.

    Raises:
      DyncompError: nothing is there.
    """
    root = Path(path).expanduser()
    found = blocks(root) if root.is_file() else _walk(root, tuple(suffixes), {"__pycache__"})
    documents = list(distinct(found))
    if not documents:
        raise DyncompError(
            f"no text under {path!r} (suffixes {', '.join(suffixes)}): check TextFiles.path"
        )
    return documents


def _walk(root: Path, suffixes: tuple[str, ...], skipped: set[str]) -> Iterator[Document]:
    """Files below ``root`` in the order of their relative paths."""
    found = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in skipped]
        found += [Path(folder, name) for name in names if name.endswith(suffixes)]
    relative = {path.relative_to(root).as_posix(): path for path in found if path.is_file()}
    for name in sorted(relative):
        yield name, relative[name].read_bytes()


def blocks(path: Path) -> Iterator[Document]:
    """One file as documents of whole lines, each just over `BLOCK` bytes (the last may be shorter)."""
    held: list[bytes] = []
    number = size = 0
    for line in path.read_bytes().splitlines(keepends=True):
        held.append(line)
        size += len(line)
        if size >= BLOCK:
            yield f"{path.name}#{number:06d}", b"".join(held)
            held, size, number = [], 0, number + 1
    yield f"{path.name}#{number:06d}", b"".join(held)


def distinct(documents: Iterable[Document]) -> Iterator[Document]:
    """Drops empty documents, repeats, and near-repeats of earlier documents.

    A near-repeat has more than half of its long lines (30 bytes or more) in documents kept before it: code pages
    such as ``encodings/cp1140.py`` would else show the training split nearly all of the test split's copy.
    """
    seen: set[bytes] = set()
    lines: set[bytes] = set()
    for name, content in documents:
        digest = hashlib.blake2b(content.strip()).digest()
        stripped = [line.strip() for line in content.splitlines()]
        long = [_short_hash(line) for line in stripped if len(line) >= LONG_LINE]
        known = sum(line in lines for line in long)
        if content.strip() and digest not in seen and 2 * known <= len(long):
            seen.add(digest)
            lines.update(long)
            yield name, content


def _short_hash(line: bytes) -> bytes:
    return hashlib.blake2b(line, digest_size=8).digest()


def limit_bytes(documents: Sequence[Document], max_bytes: int) -> list[Document]:
    """Whole documents, chosen by hash of their names, up to about ``max_bytes`` in all; 0 keeps everything."""
    if not max_bytes:
        return list(documents)
    kept, size = set(), 0
    for name, content in sorted(documents, key=lambda d: hashlib.blake2b(d[0].encode()).digest()):
        if size + len(content) <= max_bytes:
            kept.add(name)
            size += len(content)
    return [document for document in documents if document[0] in kept]


def split_documents(documents: Sequence[Document]) -> dict[str, list[Document]]:
    """Assigns whole documents to splits by a hash of their names (relative paths): editing a file moves nothing."""
    parts: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for name, content in documents:
        parts[part(name, SHARES)].append((name, content))
    return parts


def fingerprint(documents: Sequence[Document], *options: object) -> str:
    """Short digest of all content and of the options that shape the table."""
    digest = hashlib.blake2b(repr(options).encode(), digest_size=12)
    for name, content in documents:
        digest.update(name.encode() + b"\0" + hashlib.blake2b(content).digest())
    return digest.hexdigest()
