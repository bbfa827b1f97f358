"""Domains of the text that comes with Python."""

import ast

import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.tasks import LibraryText
from dyncomp.tasks.library_text import separated

SOURCE = b'''#!/usr/bin/env python
"""What it does.

    More of it.
"""
import os  # for paths


def f(x):
    r"""Doubles."""
    # twice
    return "not # prose" + """nor
this"""
'''


def test_code_and_prose_of_a_file():
    code, prose = separated(SOURCE)
    assert prose.decode().splitlines() == [
        *(
            "/usr/bin/env python",
            "What it does.",
            "",
            "More of it.",
            "for paths",
            "Doubles.",
            "twice",
        )
    ]
    assert code.decode().splitlines() == [
        *("import os", "def f(x):", '    return "not # prose" + """nor', 'this"""')
    ]
    assert separated(b"x = (\n") == (b"x = (\n", b"")


def test_code_without_prose_still_parses():
    code, _ = separated(b"# c\nx = 1\ny = [\n    1,  # one\n]\n")
    assert ast.dump(ast.parse(code)) == ast.dump(ast.parse("x = 1\ny = [1]"))


def test_domains_are_mixed_by_share():
    prose = LibraryText(domains={"prose": 1.0}, max_bytes=200_000)
    headers = LibraryText(domains={"headers": 1.0})
    few = LibraryText(domains={"headers": 0.1})
    sizes = [sum(len(c) for _, c in task.documents()) for task in (headers, few)]
    assert 0.02 < sizes[1] / sizes[0] <= 0.1
    assert hash(prose) == hash(LibraryText(domains={"prose": 1.0}, max_bytes=200_000))
    batch = few.replace(context=32) if hasattr(few, "replace") else few
    assert len(batch.source("train")) > 10


@pytest.mark.parametrize("domains", [{}, {"poetry": 1.0}, {"code": 0.0}, {"code": 1.5}])
def test_bad_domains(domains):
    with pytest.raises(DyncompError, match="LibraryText.domains"):
        LibraryText(domains=domains)
