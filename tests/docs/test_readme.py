"""README.md: its commands parse, the cheap ones run, its snippet works, its links and tables are true."""

import re
import shlex
import tomllib
from pathlib import Path

from dyncomp import config
from dyncomp.cli.main import parser, split_overrides

ROOT = Path(__file__).resolve().parents[2]
CHEAP = ("dyncomp list", "dyncomp config", "dyncomp bench list")


def commands(blocks) -> list[str]:
    """Every `dyncomp` line of the bash blocks, without its comment."""
    lines = [
        line for language, _, body in blocks if language == "bash" for line in body.split("\n")
    ]
    return [line.split("  #")[0].strip() for line in lines if line.startswith("dyncomp ")]


def test_every_command_parses_and_names_a_shipped_config(document):
    _, blocks = document("README.md")
    found = commands(blocks)
    assert len(found) > 8
    for line in found:
        rest, overrides = split_overrides(shlex.split(line)[1:])
        args = parser().parse_args(rest)
        if hasattr(args, "config"):
            assert config.check(args.config, overrides) == [], line


def test_cheap_commands_run(document, shell):
    _, blocks = document("README.md")
    cheap = [line for line in commands(blocks) if line.startswith(CHEAP)]
    assert len(cheap) == 4
    # Without a name it takes every config, which tests/config checks one by one.
    cheap = [f"{line} quickstart" if line == "dyncomp config check" else line for line in cheap]
    printed = shell("\n".join(cheap))
    assert "harder_tasks_more_experts" in printed  # list
    assert "training.Suite.runs = {" in printed and "Overridden" in printed  # config show
    assert "quickstart: ok" in printed  # config check
    assert "ledger" in printed  # bench list


def test_the_snippet_reads_a_run(document, shell, tmp_path):
    _, blocks = document("README.md")
    (snippet,) = (body for language, _, body in blocks if language == "python")
    (tmp_path / "snippet.py").write_text(snippet)
    select = "--gin.training.Suite.select=\"'top_p'\" --gin.training.Run.capture=False"
    shell(f"dyncomp run quickstart --quick --workdir runs/quickstart/top_p {select}")
    printed = shell("python snippet.py")
    counts = [int(number) for number in re.findall(r"\d+", printed)]
    assert counts and all(1 <= count <= 8 for count in counts)


def test_links_lead_somewhere(document):
    text, _ = document("README.md")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert len(links) > 8
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_shipped_system_is_in_the_table(document):
    text, _ = document("README.md")
    slugs = {slug for slug in config.slugs() if (ROOT / "experiments" / slug).is_dir()}
    assert slugs
    assert [slug for slug in slugs if f"[`{slug}`](configs/{slug}.gin)" not in text] == []


def test_every_extra_is_explained(document):
    text, _ = document("README.md")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    rows = set(re.findall(r"^\| `(\w+)` \| ", text.partition("## Installing more")[2], re.M))
    assert rows == set(project["optional-dependencies"])
