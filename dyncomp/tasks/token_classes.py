"""Classes of Python source, byte by byte or token by token: for pictures of which tokens get which computation."""

import keyword
import re

import numpy as np

from dyncomp.tasks.tokens import BPETokenizer, ByteTokenizer, Tokens

CLASSES = ("identifier", "keyword", "whitespace", "digit", "operator", "comment", "string")
"""Names of the classes; a class is its place here."""

_PREFIX = rb"(?i:\b(?:[rbuf]|[bf]r|r[bf]))?"
_LEXER = re.compile(
    rb"(?P<comment>#[^\n]*)"
    rb"|(?P<string>" + _PREFIX + rb"(?:'''(?s:\\.|.)*?(?:'''|\Z)|\"\"\"(?s:\\.|.)*?(?:\"\"\"|\Z)"
    rb"|'(?:\\(?s:.)|[^'\\\n])*'?|\"(?:\\(?s:.)|[^\"\\\n])*\"?))"
    rb"|(?P<digit>\d[\w.]*|\.\d\w*)"
    rb"|(?P<identifier>[A-Za-z_\x80-\xff][\w\x80-\xff]*)"
    rb"|(?P<whitespace>\s+)"
    rb"|(?P<operator>.)"
)
_KEYWORDS = frozenset(word.encode() for word in keyword.kwlist)


def byte_classes(source: bytes) -> np.ndarray:
    """The class of every byte, uint8 [n], as an index into `CLASSES`.

    A lexer of regular expressions that never fails: a window of a file may start inside a string (which it cannot
    know) and end anywhere. Numbers are "digit"; text that is no Python comes out as identifiers and operators.
    """
    classes = np.full(len(source), CLASSES.index("operator"), np.uint8)
    for found in _LEXER.finditer(source):
        name = str(found.lastgroup)
        if name == "identifier" and found[0] in _KEYWORDS:
            name = "keyword"
        classes[found.start() : found.end()] = CLASSES.index(name)
    return classes


def token_classes(tokens: Tokens, tokenizer: ByteTokenizer | BPETokenizer) -> np.ndarray:
    """The class of every token, uint8 [n]: that of its first byte that is no whitespace, if it has one."""
    pieces = tokenizer.pieces(tokens)
    classes = byte_classes(b"".join(pieces))
    space = CLASSES.index("whitespace")
    out, start = np.full(len(pieces), space, np.uint8), 0
    for place, piece in enumerate(pieces):
        own = classes[start : start + len(piece)]
        visible = own[own != space]
        out[place] = visible[0] if len(visible) else space
        start += len(piece)
    return out
