"""Classes of Python source against the interpreter's own tokenizer and by hand."""

import io
import keyword
import tokenize

import numpy as np

from dyncomp.tasks import CLASSES, byte_classes, corpus, token_classes
from dyncomp.tasks.tokens import BPETokenizer, ByteTokenizer

LETTER = dict(zip(CLASSES, "ikwdocs", strict=True))


def shown(source):
    return "".join(LETTER[CLASSES[c]] for c in byte_classes(source))


def test_by_hand():
    assert shown(b"if x1 == 3.5: # no\n") == "kkwiiwoowdddowccccw"
    assert shown(b"a = rb'#\\'if' + 1") == "iwow" + "s" * 9 + "wowd"
    assert shown(b'"""a\n# b""" or') == "s" * 11 + "wkk"


def test_any_window_is_classified():
    source = b'x = """open # string\n  y = 3\n'
    for start in range(len(source)):
        for stop in range(start, len(source) + 1):
            assert len(byte_classes(source[start:stop])) == stop - start
    assert shown(b"\xff\x00 'open") == "iowsssss"


def test_agrees_with_the_interpreter():
    """Byte by byte on whole library files (ASCII ones, so that columns are bytes)."""
    files = [(n, c) for n, c in corpus.standard_library() if c.isascii() and b"\f" not in c][:40]
    right = total = 0
    for _, content in files:
        content = content.replace(b"\r\n", b"\n")
        expected = classes_by_tokenize(content)
        right += int((byte_classes(content) == expected).sum())
        total += len(content)
    assert right / total > 0.999


def classes_by_tokenize(content):
    starts = np.cumsum([0] + [len(line) for line in content.splitlines(keepends=True)])
    names = {tokenize.STRING: "string", tokenize.NUMBER: "digit", tokenize.COMMENT: "comment"}
    names[tokenize.OP] = "operator"
    out = np.full(len(content), CLASSES.index("whitespace"), np.uint8)
    place = lambda at: starts[at[0] - 1] + at[1]
    opened = []  # where f-strings begin: from Python 3.12 on they are several tokens
    for token in tokenize.tokenize(io.BytesIO(content).readline):
        name, begin, end = names.get(token.type), place(token.start), place(token.end)
        kind = tokenize.tok_name[token.type]
        if kind == "FSTRING_START":
            opened.append(begin)
        elif kind == "FSTRING_END":
            name, begin = "string", opened.pop()
        if token.type == tokenize.NAME:
            name = "keyword" if keyword.iskeyword(token.string) else "identifier"
        if name:
            out[begin:end] = CLASSES.index(name)
    # A backslash that joins two lines is no token of the interpreter's; our lexer calls it an operator.
    joins = np.frombuffer(content, np.uint8) == ord("\\")
    out[joins & (out == CLASSES.index("whitespace"))] = CLASSES.index("operator")
    return out


def test_tokens_of_both_tokenizers():
    source = b"return value + 1  # done"
    tokens = ByteTokenizer().encode(source)[0]
    np.testing.assert_array_equal(token_classes(tokens, ByteTokenizer()), byte_classes(source))
    bpe = BPETokenizer.train([source] * 20, 290)
    tokens, _ = bpe.encode(source)
    found = [CLASSES[c] for c in token_classes(tokens, bpe)]
    pieces = bpe.pieces(tokens)
    assert len(pieces) < len(source)
    by_piece = dict(zip(pieces, found, strict=True))
    assert by_piece[b" value"] == "identifier" and by_piece[b"return"] == "keyword"
