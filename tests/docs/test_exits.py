"""The page of exits: every system has its place in the table of networks."""

import re
from pathlib import Path

from dyncomp import config

ROOT = Path(__file__).resolve().parents[2]


def test_every_system_is_in_the_table_of_networks():
    section = (ROOT / "docs" / "exits.md").read_text().partition("## Which networks")[2]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = {slug for row in rows for slug in re.findall(r"`(\w+)`", row)}
    shipped = {slug for slug in config.slugs() if not slug.endswith("_paper")}
    assert named == shipped, (shipped - named, named - shipped)
