"""Jobs of every shape, and what is written for them."""

import sys
from pathlib import Path

import pytest
import yaml

from dyncomp.launch import Job, Machine, Storage, check, engine

# Tests are imported by path (--import-mode=importlib), so the helper they share is made known here.
sys.path.insert(0, str(Path(__file__).parent))

from jobs import GIVEN, POINTS  # noqa: E402


@pytest.fixture
def make():
    """``make(engine, machine, points, **options)``: a job that the engine accepts."""

    def made(name: str, machine: str = "cpu", points=tuple(POINTS), **options) -> Job:
        given = {**GIVEN[name], **options}
        if "storage" in given:
            given["storage"] = Storage.parse(given["storage"])
        where = Machine.parse(machine)
        fields = check(name, where, given)
        return Job(name="test", points=points, workdir=Path("/data/w"), machine=where, **fields)

    return made


@pytest.fixture
def written(make):
    """Like ``make``: the only file's text, or all texts in order."""

    def texts(name: str, *args, **options):
        found = list(engine(name).write(make(name, *args, **options)).files.values())
        return found[0] if len(found) == 1 else found

    return texts


@pytest.fixture
def documents(written):
    """Like ``make``: every YAML document."""

    def read(*args, **options):
        texts = written(*args, **options)
        texts = [texts] if isinstance(texts, str) else texts
        return [found for text in texts for found in yaml.safe_load_all(text)]

    return read
