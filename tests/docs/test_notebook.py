"""docs/lift_a_part.ipynb runs from top to bottom, shows what it promises and is stored without outputs."""

from pathlib import Path

import nbformat
import pytest

PATH = Path(__file__).resolve().parents[2] / "docs" / "lift_a_part.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(PATH, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_stored_without_outputs_and_without_gin(notebook):
    assert [cell.outputs for cell in code(notebook) if cell.outputs] == []
    assert "gin" not in "\n".join(cell.source for cell in code(notebook)).split()


def test_lifting_three_parts_takes_about_twenty_lines(notebook):
    lifted = [cell for cell in code(notebook) if "lift" in cell.metadata.get("tags", ())]
    lines = [line for cell in lifted for line in cell.source.splitlines() if line.strip()]
    text = "\n".join(lines)
    assert all(part in text for part in ("routers.TopP", "exits.ExitHeads", "Ledger("))
    assert len(lines) <= 22


def test_it_runs(notebook, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    # One device, as a reader has; figures into the outputs, not onto a screen.
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    printed, pictures = [], 0
    for cell in code(notebook):
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stdout":
                printed += output.text.splitlines()
            pictures += "image/png" in output.get("data", {})
    assert pictures == 2

    # A larger p never needs fewer experts, and every row uses at least one.
    experts = [float(line.split(":")[1].split()[0]) for line in printed if line.startswith("p =")]
    assert len(experts) == 3
    assert 1 <= experts[0] < experts[1] < experts[2]
    # Threshold 0 sends all out at the first exit, one above 1 none; what is needed grows between them.
    deeper = [int(line.split()[2]) for line in printed if line.startswith("threshold")]
    assert (deeper[0], deeper[-1]) == (0, 256)
    assert deeper == sorted(deeper)
    needed = [line for line in printed if "experts/rows" in line]
    assert len(needed) == 1
