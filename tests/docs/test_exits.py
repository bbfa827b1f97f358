"""The page of exits: every system has its place in the table of networks, and speeds are those that were measured."""

import json
import re
from pathlib import Path

from dyncomp import config

ROOT = Path(__file__).resolve().parents[2]
PAGE, BENCH = ROOT / "docs" / "exits.md", ROOT / "docs" / "bench"


def test_every_system_is_in_the_table_of_networks():
    section = PAGE.read_text().partition("## Which networks")[2]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = {slug for row in rows for slug in re.findall(r"`(\w+)`", row)}
    shipped = {slug for slug in config.slugs() if not slug.endswith("_paper")}
    assert named == shipped, (shipped - named, named - shipped)


def test_its_table_of_speed_is_what_was_measured():
    section = PAGE.read_text().partition("## Speed")[2]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    rows = json.loads((BENCH / "exits.json").read_text())["rows"]
    measured = {row["id"]: row["ratio"] for row in rows}
    table = {
        "batches of 64": "host/64",
        "one at a time": "host/1",
        "stream": "stream",
        "overhead": "overhead",
    }
    for words, name in table.items():
        (line,) = (line for line in lines if words in line.split("|")[1])
        said = [float(cell) for cell in line.split("|")[2:4]]
        assert said == [round(measured[f"exits/{net}/{name}"], 2) for net in ("vit", "text")]
    said = [float(number) for number in re.findall(r"\d\.\d", lines[-1])]
    names = [f"exits/{net}/torch/{how}" for net in ("vit", "text") for how in ("batch", "stream")]
    assert said == [round(measured[name], 1) for name in names]
