"""The tables of the page of processes are those of the JSON files, and its bounds those of the code."""

import importlib.util
from pathlib import Path

from dyncomp.bench import faults, meshes
from dyncomp.cli import supervise

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_tables_are_generated():
    spec = importlib.util.spec_from_file_location("bench_proofs", DOCS / "bench" / "proofs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.PAGE.read_text()
    assert text == module.page(text)
    assert text.count("| holds |") + text.count("| does not hold |") == sum(
        len(module.rows(name)) for name in ("meshes", "faults")
    )


def test_bounds_are_those_of_the_code():
    text = " ".join((DOCS / "processes.md").read_text().split())
    assert f"for more than {supervise.STOPPED_SECONDS} seconds" in text
    assert "agree to 1e-8" in text and meshes.EXACT == 1e-8
    assert "agree to 1e-5" in text and meshes.CLOSE == 1e-5
    assert f"end within {faults.LIMIT_SECONDS:.0f} seconds" in text
