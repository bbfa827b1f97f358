"""Every test gets its own cache folder and a small corpus of local files."""

import numpy as np
import pytest

WORDS = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi".split()
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("DYNCOMP_CACHE", str(folder))
    return folder


@pytest.fixture
def texts(tmp_path):
    """120 files of random words, 400 to 900 bytes each."""
    folder = tmp_path / "texts"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(120):
        words = rng.choice(WORDS, size=rng.integers(80, 150))
        (folder / f"{number:03d}.txt").write_text(f"{number} " + " ".join(words) + "\n")
    return folder
