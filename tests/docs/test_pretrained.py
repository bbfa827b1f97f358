"""docs/pretrained.md: its round trip runs as printed, and its table names what loads."""

import re

from dyncomp.pretrained import architectures


def test_round_trip(document, tmp_path, monkeypatch):
    _, blocks = document("docs/pretrained.md")
    (code,) = (body for language, _, body in blocks if language == "python")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert (tmp_path / "tiny" / "model.safetensors").exists()


def test_table_is_complete(document):
    text, _ = document("docs/pretrained.md")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == {known.model_type for known in architectures.ARCHITECTURES}
