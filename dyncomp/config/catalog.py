"""The shipped configs: where they are, what their head comments say."""

import difflib
import re
from pathlib import Path

import dyncomp
from dyncomp.core.errors import DyncompError

_HEADER = re.compile(r"#\s*([a-z][a-z_ ]*):\s*(.*)")


def shipped() -> Path:
    """The folder of shipped configs: inside an installed wheel, else the repository's ``configs/``."""
    package = Path(dyncomp.__file__).parent
    inside = package / "_configs"
    return inside if inside.is_dir() else package.parent / "configs"


def slugs() -> list[str]:
    """Names of the runs: the files directly in the configs folder, the paper-scale twins included."""
    return sorted(path.stem for path in shipped().glob("*.gin"))


def find(name: str | Path) -> Path:
    """The config file of a shipped name or of a path.

    Args:
      name: a slug such as ``quickstart``, or a path to a ``.gin`` file.

    Returns:
      An absolute path of a file that exists.

    Raises:
      DyncompError: no such config; the message lists near matches.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gin" and path.is_file():
        return path.resolve()
    candidate = shipped() / f"{str(name).removesuffix('.gin')}.gin"
    if candidate.is_file():
        return candidate.resolve()
    close = difflib.get_close_matches(str(name), slugs(), n=3)
    hint = (
        f"did you mean {' or '.join(close)}?" if close else "`dyncomp list` names the shipped ones"
    )
    raise DyncompError(f"no config {str(name)!r}: {hint}")


def header(path: Path) -> dict[str, str]:
    """The ``# key: value`` lines at the head of a config (title, family, paper, command, machine, minutes, expect)."""
    found: dict[str, str] = {}
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        match = _HEADER.fullmatch(line.strip())
        if match:
            found.setdefault(match[1].strip(), match[2].strip())
    return found
