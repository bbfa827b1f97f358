import subprocess
import textwrap

import pytest

CLAIMS = """
[[claim]]
id = "better"
text = "a is better than b"
paper = "not reported"
metric = "loss"
arm = "a"
against = "b"
relation = "<"
margin = 0.0
kind = "compute"
"""

EXPERIMENT = """
import json, os
from pathlib import Path
TITLE, ARMS, SEEDS, COMPUTE = "A fake", ["a", "b"], (0, 1, 2), "cost"
TRIALS = {"a": 2, "b": 2}
METRICS = {"loss": {"text": "a | loss", "minimize": True}}

def run_seed(seed, quick, workdir):
    with open(Path(__file__).parent.parent.parent / "calls.txt", "a") as f:
        f.write(f"{seed}{'q' * quick} {len(os.sched_getaffinity(0))}\\n")
    if seed == 13:
        raise RuntimeError("unlucky")
    (workdir / "kept.txt").write_text(str(seed))
    a = {"loss": 1.0 + 0.01 * seed, "cost": 1.0}
    b = {"loss": 2.0 + 0.03 * seed, "cost": 2.0}
    return {"a": a, "b": b, "_figures": {"dots": [seed, seed + 1]}}

def figures(results, outdir):
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots()
    for run in results["runs"]:
        kept = Path(results["workdir"]) / f"seed_{run['seed']}" / "kept.txt"
        ax.plot(run["shown"]["dots"], [int(kept.read_text())] * 2)
    fig.savefig(outdir / "dots.svg")
    plt.close(fig)
"""


def git(folder, *words):
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


class Repository:
    """A git repository with one fake experiment."""

    def __init__(self, path):
        self.path, self.root = path, path / "experiments"
        self.folder = self.root / "fake"
        self.folder.mkdir(parents=True)
        self.claims, self.experiment = self.folder / "claims.toml", self.folder / "experiment.py"
        self.claims.write_text(CLAIMS)
        self.experiment.write_text(textwrap.dedent(EXPERIMENT))
        (self.folder / "page.md").write_text("# A fake\n\nIt decides nothing.\n")
        git(path, "init", "-q")
        self.commit()

    def commit(self):
        git(self.path, "add", "-A", "experiments")
        git(self.path, "commit", "-q", "-m", "x")

    def calls(self):
        path = self.path / "calls.txt"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNCOMP_LOCK", str(tmp_path / "lock"))
    return Repository(tmp_path)
