"""Writes the tables of docs/processes.md from the JSON files beside this one: ``python docs/bench/proofs.py``."""

import json
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "processes.md"
BEGIN, END = "<!-- tables of docs/bench/proofs.py -->\n", "<!-- end of tables -->\n"
VERDICTS = {True: "holds", False: "does not hold"}


def rows(name):
    """Rows of a bench; none where no result is kept."""
    path = HERE / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def meshes():
    """The worst mesh of each row."""
    figure = lambda value: f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:.2f}"  # noqa: E731
    return [
        "| `bench meshes` | worst | of | asked | verdict |",
        "|---|---|---|---|---|",
        *(
            f"| `{row['id'].partition('/')[2]}` | {figure(row['ratio'])} | {row['runs']} | "
            f"{row['relation']} {figure(row['goal'])} | {VERDICTS[row['holds']]} |"
            for row in rows("meshes")
        ),
        "",
    ]


def faults():
    """Seconds from a fault to the end of the job."""
    return [
        "| `bench faults` | faults | seconds until the job ended, shortest to longest | verdict |",
        "|---|---|---|---|",
        *(
            f"| `{row['id'].partition('/')[2]}` | {row['runs']} | {min(row['seconds']):.1f} to "
            f"{max(row['seconds']):.1f} | {VERDICTS[row['holds']]} |"
            for row in rows("faults")
        ),
        "",
    ]


def page(text):
    """The page with its tables renewed."""
    made = [line for table in (meshes, faults) if rows(table.__name__) for line in table()]
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + "\n" + "\n".join(made) + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
