"""Makes the dummy parts importable by name, as a config needs them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import config_parts  # noqa: E402

BASE = """\
from __gin__ import dynamic_registration
import config_parts as parts

WIDTH = 16

parts.Model.width = %WIDTH
parts.Model.blocks = [@parts.Block, @wide/parts.Block]
parts.Block.ffn = @parts.FFN
parts.FFN.hidden = 32
wide/parts.FFN.hidden = 64
parts.Optimizer.rate = 0.5
"""

TOP = """\
# title: A dummy run
# family: tests
from __gin__ import dynamic_registration
import config_parts as parts

include 'base.gin'

parts.Root.model = @parts.Model()
parts.Root.optimizer = @parts.Optimizer()
parts.Root.data = @parts.Data()
parts.Root.weights = {'a': 1.0, 'b': 2}
parts.Data.name = 'digits'
WIDTH = 24
"""


@pytest.fixture
def parts():
    return config_parts


@pytest.fixture
def files(tmp_path):
    """A sound two-file config in a folder of its own: (path of the top file, function that appends to a file)."""
    (tmp_path / "base.gin").write_text(BASE)
    top = tmp_path / "top.gin"
    top.write_text(TOP)

    def append(text: str, name: str = "top.gin") -> int:
        path = tmp_path / name
        before = path.read_text()
        path.write_text(before + text)
        return before.count("\n") + 1

    return top, append
