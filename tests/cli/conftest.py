"""What a newcomer has: a config of their own, some text, and the command line."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

# Tests are imported by path (--import-mode=importlib), so the helper they share is made known here.
sys.path.insert(0, str(Path(__file__).parent))

from terminal import CONFIG, LAYER, Result, cli  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def surroundings(tmp_path_factory):
    """Caches of their own, and a narrow terminal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYNCOMP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("DYNCOMP_LOCK", str(tmp_path_factory.mktemp("lock") / "lock"))
        patch.setenv("COLUMNS", "80")
        yield


@pytest.fixture(scope="session")
def config(tmp_path_factory) -> Path:
    """A config outside the repository, on text of random words."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "corpus").mkdir()
    rng = np.random.default_rng(0)
    for number in range(120):
        words = rng.choice(["alpha", "beta", "gamma", "naïve", "delta", "pi"], size=60)
        (folder / "corpus" / f"{number}.txt").write_text(f"{number} {' '.join(words)}\n")
    (folder / "layer.gin").write_text(LAYER)
    path = folder / "tiny.gin"
    path.write_text(CONFIG.format(corpus=folder / "corpus"))
    return path


@pytest.fixture(scope="session")
def trained(config, tmp_path_factory) -> tuple[Path, Result]:
    """A finished suite: its work directory and what the command printed."""
    workdir = tmp_path_factory.mktemp("runs") / "first"
    return workdir, cli("run", config, "--workdir", workdir, "--no-progress")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    assert not os.listdir(tmp_path)
    return tmp_path
