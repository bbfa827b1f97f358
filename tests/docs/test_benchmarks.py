"""The page of benchmarks says what its JSON files say, and none of them is a smoke run."""

import importlib.util
import json
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_page_is_generated_from_full_runs():
    spec = importlib.util.spec_from_file_location("bench_page", DOCS / "bench" / "page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "benchmarks.md").read_text() == module.page()
    found = [json.loads(path.read_text()) for path in (DOCS / "bench").glob("*.json")]
    assert found and not any(result["quick"] for result in found)
