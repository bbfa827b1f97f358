"""Draws docs/figures/rooms.svg from the list of rooms in docs/design.md: ``python docs/figures/rooms.py``."""

import html
import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1]
FLOORS = (  # highest first: title, colour, rooms, what it hands to the floor above
    ("command line", "#e8e3f5", ("cli",), "tables, JSON, exit codes"),
    ("around a run", "#dfe7f7", ("config", "bench", "evidence", "report", "launch"),
     "Run, rows, claims, pages"),
    ("a run", "#d9eef2", ("parallel", "training", "runtime"), "TrainState, summaries, checkpoints"),
    ("models, data", "#dcf1e2", ("models", "pretrained", "decoding", "tasks"), "(output, Aux), tokens, batches"),
    ("families", "#f3f0d3", ("routers", "experts", "attention", "exits", "depth", "recurrent", "diffusion"),
     "plans, raw losses, event counts"),
    ("ground floor", "#f8e5d0", ("core",), "plans, dispatches, costs, ledger"),
    ("kernels", "#f6d9d5", ("dyncomp_kernels",), "arrays"),
)  # fmt: skip
WIDTH, LEFT, RIGHT, HEIGHT, GAP = 1100, 170, 262, 64, 22


def rooms(text: str) -> dict[str, str]:
    """Room -> what it holds, from the code block below the heading "Rooms"."""
    block = re.search(r"## Rooms.*?```\n(.*?)```", text, re.S)
    assert block is not None
    lines = [line.split(maxsplit=1) for line in block[1].splitlines() if line.strip()]
    plain = lambda text: re.sub(r" \(.*?\)|`", "", text)  # a box has no space for asides
    return {name.rpartition("/")[2]: plain(about) for name, about in lines}


def wrap(text: str, width: float) -> list[str]:
    """At most two lines that fit ``width`` pixels of 11-pixel type."""
    limit, lines = int(width / 5.9), [""]
    for word in text.split():
        if len(lines[-1]) + len(word) + 1 > limit:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines if len(lines) <= 2 else [lines[0], lines[1][: limit - 2].rstrip(" ,") + " …"]


def draw(found: dict[str, str]) -> str:
    """The picture as SVG; every room stands on the floor that `FLOORS` gives it."""
    height = len(FLOORS) * (HEIGHT + GAP) + 26
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'font-family="Helvetica, Arial, sans-serif" fill="#222">',
        "<title>The rooms of dyncomp, and what each floor hands to the one above</title>",
        '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0 8 4 0 8z" fill="#666"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" rx="12" fill="#fff"/>',
    ]
    for index, floor in enumerate(FLOORS):
        parts += _floor(24 + index * (HEIGHT + GAP), *floor, found, top=index == 0)
    x, foot = 36, height - 24
    parts.append(
        f'<path d="M{x} 26V{foot}" stroke="#666" stroke-width="1.5" marker-end="url(#a)"/>'
    )
    parts.append(
        f'<text x="{x - 10}" y="{height / 2}" font-size="12" fill="#666" text-anchor="middle" '
        f'transform="rotate(-90 {x - 10} {height / 2})">imports only go down</text>'
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _floor(y, title, colour, names, hands, found, *, top) -> list[str]:
    inner = WIDTH - LEFT - RIGHT
    each = (inner - 10 * (len(names) - 1)) / len(names)
    parts = [_text(LEFT - 12, y + 37, 12, title, anchor="end", weight="bold")]
    for number, name in enumerate(names):
        x = LEFT + number * (each + 10)
        parts.append(
            f'<rect x="{x:.1f}" y="{y}" width="{each:.1f}" height="{HEIGHT}" rx="7" '
            f'fill="{colour}" stroke="#8886"/>'
        )
        lines = wrap(found[name], each - 16)
        parts.append(_text(x + 9, y + 20, 13, name, weight="bold"))
        parts += [_text(x + 9, y + 38 + 15 * n, 11, line) for n, line in enumerate(lines)]
    x = LEFT + inner + 22
    if not top:
        parts.append(
            f'<path d="M{x} {y + HEIGHT - 14}V{y - GAP + 2}" stroke="#666" stroke-width="1.5" '
            'marker-end="url(#a)"/>'
        )
    return [*parts, _text(x + 12, y + 37, 12, hands)]


def _text(x: float, y: float, size: int, text: str, anchor="start", weight="normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
        f'font-weight="{weight}">{html.escape(text)}</text>'
    )


if __name__ == "__main__":
    picture = draw(rooms((DOCS / "design.md").read_text()))
    Path(__file__).with_suffix(".svg").write_text(picture)
