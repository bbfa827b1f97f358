"""Writes docs/benchmarks.md from the JSON files beside this one: ``python docs/bench/page.py``."""

import json
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "benchmarks.md"
HEAD = """# Benchmarks

Written by `docs/bench/page.py` from `docs/bench/*.json`, each the output of `dyncomp bench NAME --json`. A ratio is
what its reference says; intervals cover 95%. A verdict is "holds" or "does not hold" only where the whole interval is
on one side of the goal. Figures of one machine on one day: make your own before you rely on them.
"""
VERDICTS = {True: "holds", False: "does not hold", "unresolved": "unresolved", None: ""}


def number(value):
    """Four significant digits."""
    return "" if value is None else f"{value:.4g}"


def line(row):
    """One row of a table."""
    interval = " to ".join(map(number, row["interval"])) if row["interval"] else ""
    asked = "" if row["goal"] is None else f"{row['relation']} {number(row['goal'])}"
    if "goal" in row["relation"]:
        asked = row["relation"].replace("goal", number(row["goal"]))
    cells = (f"`{row['id']}`", number(row["ratio"]), interval, asked, VERDICTS[row["holds"]])
    return "| " + " | ".join(cells) + f" | {row['runs']} |"


def section(result):
    """A bench: where it ran, its rows, what the ratios are."""
    made = result["environment"]
    versions = ", ".join(f"{name} {made['versions'][name]}" for name in ("jax", "flax", "optax"))
    dirty = " with changes" if made["dirty"] else ""
    text = f"{made['cpu']}, {made['cores']} cores, Python {made['python']}, {versions}; {made['date']}, "
    references = dict.fromkeys(row["reference"] for row in result["rows"])
    return "\n".join(
        [
            f"## {result['bench']}\n",
            f"`dyncomp bench {result['bench']}`. {text}revision {made['revision'][:12]}{dirty}.\n",
            "| row | ratio | interval | asked | verdict | runs |",
            "| --- | --- | --- | --- | --- | --- |",
            *map(line, result["rows"]),
            "\nRatios:",
            *(f"- {reference}" for reference in references),
            "",
        ]
    )


def page():
    """The whole page."""
    results = [json.loads(path.read_text()) for path in sorted(HERE.glob("*.json"))]
    return "\n".join([HEAD, *map(section, results)])


if __name__ == "__main__":
    PAGE.write_text(page())
