"""Collections of text documents and their split by document, so that no split sees another's text."""

import hashlib
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dyncomp.core.errors import DyncompError
from dyncomp.tasks.base import SPLITS, part

SHARES: Mapping[str, float] = {"train": 0.88, "validation": 0.04, "calibration": 0.04, "test": 0.04}
SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"}
"""Folders of the standard library left out: installed packages and the interpreter's own tests."""

Document = tuple[str, bytes]


def standard_library() -> list[Document]:
    """The Python standard library's source: (relative path, bytes), sorted by path, no two alike."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.rglob("*.py") if not SKIPPED & set(p.relative_to(root).parts))
    return list(distinct((p.relative_to(root).as_posix(), p.read_bytes()) for p in files))


def text_files(path: str, suffixes: Sequence[str]) -> list[Document]:
    """A file, or all files with one of ``suffixes`` below a folder.

    Raises:
      DyncompError: nothing is there.
    """
    root = Path(path).expanduser()
    if root.is_file():
        return [(root.name, root.read_bytes())]
    found = sorted(p for p in root.rglob("*") if p.is_file() and p.suffix in suffixes)
    if not found:
        raise DyncompError(
            f"no text under {path!r} (suffixes {', '.join(suffixes)}): check TextFiles.path"
        )
    return list(distinct((p.relative_to(root).as_posix(), p.read_bytes()) for p in found))


def distinct(documents: Iterator[Document]) -> Iterator[Document]:
    """Drops empty documents and repeats of the same content."""
    seen: set[bytes] = set()
    for name, content in documents:
        digest = hashlib.blake2b(content.strip()).digest()
        if content.strip() and digest not in seen:
            seen.add(digest)
            yield name, content


def split_documents(documents: Sequence[Document]) -> dict[str, list[Document]]:
    """Assigns whole documents to splits by a hash of their content, so that renaming moves nothing."""
    parts: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for name, content in documents:
        digest = hashlib.blake2b(content.strip()).hexdigest()
        parts[part(digest, SHARES)].append((name, content))
    return parts


def fingerprint(documents: Sequence[Document], *options: object) -> str:
    """Short digest of all content and of the options that shape the table."""
    digest = hashlib.blake2b(repr(options).encode(), digest_size=12)
    for name, content in documents:
        digest.update(name.encode() + b"\0" + hashlib.blake2b(content).digest())
    return digest.hexdigest()
