"""Text of different domains that lies on every machine: documentation, code, and headers in another language."""

import dataclasses
import io
import sysconfig
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.tasks import corpus
from dyncomp.tasks.code_lm import TextTask

Domain = Literal["prose", "code", "headers"]
BREAKS = (tokenize.ENCODING, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
"""Tokens after which a string alone on its line is documentation."""


@dataclasses.dataclass(frozen=True)
class LibraryText(TextTask):
    """Parts of what comes with Python: a mixture of domains, or one of them.

    "prose" is the documentation strings and comments of the standard library (about 3 MB), "code" the same files
    without them (7 MB), "headers" C header files of Python and NumPy (up to 1.3 MB). Prose and code of one file fall
    into the same split.

    Attributes:
      domains: name -> share of its documents that is used, above 0 and at most 1.
    """

    domains: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"prose": 1.0})

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "domains", _Frozen(self.domains))
        known = get_args(Domain)
        if not self.domains or any(
            d not in known or not 0 < s <= 1 for d, s in self.domains.items()
        ):
            raise DyncompError(
                f"LibraryText.domains={dict(self.domains)}: give shares in (0, 1] of {', '.join(known)}"
            )

    def documents(self) -> list[corpus.Document]:
        """Documents of every domain, sorted by domain and path."""
        found = []
        for domain, share in sorted(self.domains.items()):
            whole = list(corpus.distinct(_documents(domain)))
            size = sum(len(content) for _, content in whole)
            found += corpus.limit_bytes(whole, 0 if share == 1 else max(int(share * size), 1))
        return found


class _Frozen(dict):
    """A dict that a frozen, hashed dataclass may hold."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items())))


def _documents(domain: str) -> Iterator[corpus.Document]:
    if domain == "headers":
        for root in (Path(sysconfig.get_paths()["include"]), Path(np.get_include())):
            if root.is_dir():
                yield from corpus.text_files(str(root), (".h",))
        return
    for name, content in corpus.standard_library():
        code, prose = separated(content)
        yield name, code if domain == "code" else prose


def separated(source: bytes) -> tuple[bytes, bytes]:
    """Python source as (code, prose): prose is comments and strings that stand alone, blank lines go."""
    try:
        tokens = list(tokenize.tokenize(io.BytesIO(source).readline))
    except (tokenize.TokenError, SyntaxError):
        return source, b""
    lines = source.decode(tokens[0].string).splitlines(keepends=True)
    prose, before = [], tokenize.ENCODING
    for token, after in zip(tokens, tokens[1:], strict=False):
        alone = before in BREAKS and after.type == tokenize.NEWLINE
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and alone):
            prose.append(_words(token.string))
            _blank(lines, token)
        if token.type not in (tokenize.NL, tokenize.COMMENT):
            before = token.type
    code = "\n".join(line.rstrip() for line in lines if line.strip())
    return code.encode(), "\n".join(prose).encode()


def _words(text: str) -> str:
    """A comment or a documentation string without its marks and its indentation."""
    bare = text.lstrip("rRbBuU").strip("\"'") if text[0] != "#" else text.lstrip("#!: ")
    return "\n".join(line.strip() for line in bare.strip().splitlines())


def _blank(lines: list[str], token: tokenize.TokenInfo) -> None:
    """Takes a token out of the lines that hold it."""
    (first, left), (last, right) = token.start, token.end
    head, tail = lines[first - 1][:left], lines[last - 1][right:]
    for row in range(first - 1, last):
        lines[row] = ""
    lines[first - 1] = head + tail
