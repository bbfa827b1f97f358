"""docs/design.md: the walk computes what it prints, the picture shows the rooms, the paths exist."""

import doctest
import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "design.md"


def test_the_walk_computes_what_it_prints():
    result = doctest.testfile(str(PAGE), module_relative=False)
    assert result.attempted > 20
    assert result.failed == 0


def test_the_picture_is_drawn_from_the_page():
    path = ROOT / "docs" / "figures" / "rooms.py"
    spec = importlib.util.spec_from_file_location("rooms", path)
    rooms = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rooms)
    found = rooms.rooms(PAGE.read_text())
    drawn = [name for _, _, names, _ in rooms.FLOORS for name in names]
    assert sorted(drawn) == sorted(found)
    # A higher floor is never listed before a lower one.
    order = {name: n for n, (_, _, names, _) in enumerate(reversed(rooms.FLOORS)) for name in names}
    floors = [order[name] for name in found]
    assert floors == sorted(floors)
    same = rooms.draw(found) == path.with_suffix(".svg").read_text()
    assert same, "run python docs/figures/rooms.py"


def test_every_path_it_names_exists():
    text = PAGE.read_text()
    named = set(re.findall(r"`([a-z_]+(?:/[a-z_]+)+\.(?:py|toml|md))", text))
    assert len(named) > 5
    bases = (ROOT, ROOT / "dyncomp")
    assert [name for name in named if not any((base / name).exists() for base in bases)] == []
