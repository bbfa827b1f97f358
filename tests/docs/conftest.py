"""What the documents' tests share: fenced blocks, and a shell in which our commands are found."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```$", re.S | re.M)


def blocks(text: str) -> list[tuple[str, str, str]]:
    """(language, file or "", body) of every fenced block in order."""
    return FENCE.findall(text)


@pytest.fixture(scope="session")
def document():
    """Reads a document below the repository's root as (text, blocks)."""

    def read(name: str) -> tuple[str, list[tuple[str, str, str]]]:
        text = (ROOT / name).read_text()
        return text, blocks(text)

    return read


@pytest.fixture
def shell(tmp_path):
    """Runs a script with ``bash -e`` in an empty folder; returns its standard output."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # One device, as a reader has: the tests' own process simulates four.
    flags = {"PATH": path, "XLA_FLAGS": "", "COLUMNS": "160"}

    def run(script: str) -> str:
        command = ["bash", "-e", "-o", "pipefail", "-c", script]
        env = {**os.environ, **flags}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run
