"""One self-contained HTML page over one or many runs; it asks for nothing from outside."""

import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dyncomp.core.errors import DyncompError
from dyncomp.report import calibrated
from dyncomp.report.curves import curve, metric_names
from dyncomp.report.decisions import pictures
from dyncomp.report.load import RunFiles, mapping, number, read_run
from dyncomp.report.pareto import pareto
from dyncomp.report.summary import cell, figures_of

MAX_CURVES = 12
STYLE = """
:root { color-scheme: light dark; --ink: #1d232b; --soft: #5c6773; --line: #d9dee4; --paper: #fff; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ed; --soft: #9aa5b1; --line: #343c46; --paper: #14181d; --card: #1c2229; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem 1.1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .8rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
.note { color: var(--soft); font-size: .88rem; margin: .3rem 0; }
.wide { overflow-x: auto; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  overflow-wrap: normal; }
th { font-weight: 600; } td.number, th.number { text-align: right; }
td.number { white-space: nowrap; } th { vertical-align: bottom; max-width: 9rem; }
figure.wide svg { min-width: 38rem; }
figure { margin: 0; } svg { max-width: 100%; height: auto; display: block; }
pre { background: var(--card); padding: .8rem; border-radius: 6px; overflow-x: auto; font-size: .8rem;
  margin: .4rem 0; }
pre.text { white-space: pre-wrap; line-height: 1.7; }
.swatch { padding: .1rem .4rem; margin-right: 2px; border-radius: 3px; color: var(--ink); }
.tiles img { width: 42px; height: 42px; margin: 0 3px 3px 0; image-rendering: pixelated; }
details { margin: .5rem 0; } summary { cursor: pointer; }
"""
HEAD = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
    "style-src 'unsafe-inline'; img-src data:\">"
    '<link rel="icon" href="data:,">'
)


def write_report(workdirs: Sequence[Path], out: Path) -> Path:
    """Writes the page and returns its path.

    Args:
      workdirs: work directories of runs; each may lack some of its files.
      out: the page; written in one step, so that an older one survives an error.

    Raises:
      DyncompError: no directory, or one that holds nothing a report can show.
    """
    if not workdirs:
        raise DyncompError("a report needs at least one work directory")
    names = run_names(workdirs)
    runs = [read_run(Path(w), name) for w, name in zip(workdirs, names, strict=True)]
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_name(f".{out.name}.tmp")
    scratch.write_text(page(runs), encoding="utf-8")
    scratch.replace(out)
    return out


def run_names(workdirs: Sequence[Path]) -> list[str]:
    """Folder names, or paths below the common folder where two folders are called alike."""
    full = [str(Path(w).resolve()) for w in workdirs]
    names = [os.path.basename(path) for path in full]
    if len(set(names)) == len(names):
        return names
    if len(set(full)) < len(full):
        raise DyncompError("a work directory stands twice; name each once")
    return [os.path.relpath(path, os.path.commonpath(full)) for path in full]


def page(runs: Sequence[RunFiles]) -> str:
    """The page's text."""
    title = (
        runs[0].name if len(runs) == 1 else f"{len(runs)} runs: {', '.join(r.name for r in runs)}"
    )
    sections = [_overview(runs), _fronts(runs), _curves(runs), *(_run(run) for run in runs)]
    return (
        f"{HEAD}<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<h1>{escape(title)}</h1>{''.join(sections)}</main></body></html>\n"
    )


def _section(title: str, body: str, note: str = "") -> str:
    if not body:
        return ""
    return f"<section><h2>{escape(title)}</h2>{f'<p class=note>{escape(note)}</p>' * bool(note)}{body}</section>"


def _overview(runs: Sequence[RunFiles]) -> str:
    rows = {run.name: figures_of(run.summary) for run in runs}
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    body = [[name, *(row.get(column) for column in columns)] for name, row in rows.items()]
    note = (
        "Of the test split. FLOPs are per token or image. Needed: what the decisions require; executed: padding and "
        "masked work too."
    )
    return _section("Results", table(["run", *columns], body) if columns else "", note)


def _fronts(runs: Sequence[RunFiles]) -> str:
    headlines = dict.fromkeys(run.headline for run in runs if run.headline)
    plots = [pareto([run for run in runs if run.headline == name]) for name in headlines]
    body = "".join(f'<figure class="wide">{plot}</figure>' for plot in plots if plot)
    note = (
        "Of the validation split. Each dot is one setting of the run-time controls; the line joins those that no "
        "other beats."
    )
    return _section("Quality against compute", body, note)


def _curves(runs: Sequence[RunFiles]) -> str:
    names = metric_names(runs)
    plots = [f"<figure>{curve(runs, name)}</figure>" for name in names[:MAX_CURVES]]
    left = names[MAX_CURVES:]
    note = f"Not drawn, see metrics.jsonl: {', '.join(left)}." if left else ""
    return _section("Training", f'<div class="grid">{"".join(plots)}</div>' if plots else "", note)


def _run(run: RunFiles) -> str:
    shown = [f"<h3>{escape(c)}</h3><figure>{h}</figure>" for c, h in pictures(run.decisions)]
    ledger = [row for row in run.summary.get("ledger") or [] if isinstance(row, dict)]
    unread = [f"{name} is damaged and not shown" for name in run.damaged]
    parts = [
        f'<p class="note">{escape("; ".join(unread))}</p>' if unread else "",
        *shown,
        _calibrated(run),
        _details("Ledger: what was computed, by event", _objects(ledger)),
        _details("Settings of the Pareto plot", _objects([_flat(point) for point in run.pareto])),
        _details("Notes", _list([*_texts(run, "notes"), *_texts(run, "not_loaded")])),
        _details("Config", f"<pre>{escape(run.config)}</pre>" if run.config else ""),
        _details("Environment", table(["what", "value"], _pairs(run.environment))),
    ]
    return _section(run.name, "".join(parts))


def _calibrated(run: RunFiles) -> str:
    """How far each exit's probabilities can be trusted."""
    if not run.exits:
        return ""
    try:
        outputs = calibrated.Outputs.of(run.exits)
    except (DyncompError, KeyError, ValueError) as error:
        return f'<p class="note">exits.npz is not shown: {escape(str(error))}</p>'
    note = (
        "Of validation examples: every exit as if all left there, and what was emitted. "
        f"Conformal sets miss at most {calibrated.ALPHA:.0%} in expectation; their thresholds come from the first half "
        "of the examples, the figures from the second."
    )
    body = _objects(calibrated.figures(outputs))
    plots = [calibrated.reliability(outputs), calibrated.classes(outputs)]
    drawn = "".join(f"<figure>{plot}</figure>" for plot in plots)
    head = f'<h3>Calibration of the exits</h3><p class="note">{escape(note)}</p>'
    return f'{head}{body}<div class="grid">{drawn}</div>'


def _texts(run: RunFiles, key: str) -> list[str]:
    found = run.summary.get(key)
    return [str(line) for line in found] if isinstance(found, list) else []


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def _details(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>" if body else ""


def _flat(point: dict[str, Any]) -> dict[str, Any]:
    controls = mapping(point.get("controls"))
    text = ", ".join(f"{k} = {cell(v)}" for k, v in controls.items()) or "as trained"
    rest = {k: v for k, v in point.items() if not isinstance(v, (dict, list))}
    return {"controls": text, **rest}


def _objects(rows: Sequence[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return table(columns, [[row.get(column) for column in columns] for row in rows])


def _pairs(values: dict[str, Any], prefix: str = "") -> list[list[Any]]:
    found: list[list[Any]] = []
    for key, value in values.items():
        inside = (
            _pairs(value, f"{prefix}{key}/") if isinstance(value, dict) else [[prefix + key, value]]
        )
        found += inside
    return found


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """An HTML table that scrolls sideways on a phone; "" without rows. All text is escaped."""
    rows = [list(row) for row in rows]
    if not rows:
        return ""
    numeric = [any(number(row[n]) is not None for row in rows) for n in range(len(head))]
    kind = lambda n: ' class="number"' if numeric[n] else ""
    top = "".join(f'<th scope="col"{kind(n)}>{escape(str(h))}</th>' for n, h in enumerate(head))
    body = "".join(
        f"<tr>{''.join(f'<td{kind(n)}>{escape(cell(v))}</td>' for n, v in enumerate(row))}</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )
