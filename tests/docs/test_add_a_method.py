"""docs/add_a_method.md works as it stands: its blocks become files, its commands run."""

import json
from pathlib import Path

PAGE = "docs/add_a_method.md"


def test_it_is_short_and_touches_no_model(document):
    text, blocks = document(PAGE)
    assert len(text.splitlines()) < 150
    files = [name for _, name, _ in blocks if name]
    experiment = {"experiments/top_any/claims.toml", "experiments/top_any/experiment.py"}
    assert set(files) == {"top_any.py", "test_top_any.py", "top_any.gin"} | experiment
    part = next(body for _, name, body in blocks if name == "top_any.py")
    assert "dyncomp.models" not in part


def test_its_commands_run(document, shell, tmp_path):
    _, blocks = document(PAGE)
    for _, name, body in blocks:
        if name:
            path: Path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(body)
    (script,) = (body for language, name, body in blocks if language == "bash" and not name)
    printed = shell(script)
    assert "1 passed" in printed
    assert "top_any.gin: ok" in printed
    assert "near_top_2" in printed
    # A smoke run leaves no evidence behind, and the part's plan is what the ledger counted.
    assert not (tmp_path / "experiments" / "top_any" / "results.json").exists()
    summary = json.loads((tmp_path / "runs" / "top_any" / "summary.json").read_text())
    events = summary["compute"]["events_per_element"]
    experts = events["group_0/block_0/ffn/experts/rows"] / events["group_0/block_0/ffn/router/rows"]
    assert 1 <= experts <= 8
