"""The page: whole, escaped, self-contained, and sensible when files are missing."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.report import decisions
from dyncomp.report.curves import series
from dyncomp.report.load import read_run
from dyncomp.report.page import cell, run_names, write_report
from dyncomp.report.pareto import front, points, write_pareto

VOID = {"meta", "link", "img", "br", "use", "path", "rect"}


class Reader(HTMLParser):
    """Collects tags, checks nesting, and what the page would fetch."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def test_a_page_over_two_runs(make_run, tmp_path):
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", shift=0.5)]
    text = write_report(runs, tmp_path / "new" / "report.html").read_text()
    page = Reader(text)
    assert page.tags.count("svg") >= 4 + 4 and page.tags.count("img") == 6
    for word in ("2 runs: one, two", "1,500,000", "2,000,000", "Run.steps = 3", "packages/jax"):
        assert word in text
    assert "needed FLOPs per element" in text  # matplotlib leaves labels as comments


def test_everything_is_escaped_and_nothing_is_fetched(make_run, tmp_path):
    text = write_report([make_run(tmp_path / "a<b>&")], tmp_path / "r.html").read_text()
    page = Reader(text)
    assert "script" not in page.tags and "b" not in page.tags
    assert "&lt;script&gt;alert(" in text and "a&lt;b&gt;&amp;" in text
    assert all(link.startswith(("data:", "#")) for link in page.links), page.links
    assert not re.search(r"@import|url\((?!#)", text)


def test_the_same_bytes_again(make_run, tmp_path):
    run = make_run(tmp_path / "one")
    first = write_report([run], tmp_path / "r.html").read_bytes()
    assert write_report([run], tmp_path / "r.html").read_bytes() == first


@pytest.mark.parametrize("only", ["metrics.jsonl", "summary.json", "decisions.json"])
def test_runs_with_some_of_the_files(make_run, tmp_path, only):
    run = make_run(tmp_path / "one")
    for path in run.iterdir():
        if path.name != only:
            path.unlink()
    Reader(write_report([run], tmp_path / "r.html").read_text())


def test_nothing_to_report_is_one_line_and_keeps_the_old_page(make_run, tmp_path):
    out = tmp_path / "r.html"
    write_report([make_run(tmp_path / "one")], out)
    before = out.read_bytes()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DyncompError, match="has nothing to report") as error:
        write_report([tmp_path / "one", tmp_path / "empty"], out)
    assert "\n" not in str(error.value) and out.read_bytes() == before
    with pytest.raises(DyncompError, match="at least one"):
        write_report([], out)


def test_damaged_files_do_not_break_the_page(make_run, tmp_path):
    run = make_run(tmp_path / "one")
    (run / "summary.json").write_text(
        '{"quality": 3, "compute": null, "pareto": 7, "headline": "nats"}'
    )
    (run / "decisions.json").write_text(
        '{"load": [[1], [1, 2]], "text": 3, "exits": [], "images": {}}'
    )
    (run / "environment.json").write_text("{")
    text = write_report([run], tmp_path / "r.html").read_text()
    assert text.count("not drawn:") == 4


def test_names_of_runs(tmp_path):
    assert run_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert run_names([tmp_path / "a/x", tmp_path / "b/x"]) == ["a/x", "b/x"]
    with pytest.raises(DyncompError, match="twice"):
        run_names([tmp_path / "a", tmp_path / "a"])


def test_series_and_points_are_the_files_figures(make_run, tmp_path):
    run = read_run(make_run(tmp_path / "one"), "one")
    assert series(run, "nats", "validation") == ([1.0, 2.0, 3.0], pytest.approx([2.9, 2.8, 2.7]))
    assert points(run, "flops_executed") == [(1e6, 2.5), (2e6, 2.0)]
    assert points(run, "seconds") == [(0.05, 2.5), (0.1, 2.0)]


def test_front_against_brute_force():
    rng = np.random.default_rng(0)
    found = [(float(x), float(y)) for x, y in rng.integers(0, 12, (60, 2))]
    for minimize in (True, False):
        sign = 1 if minimize else -1
        beats = lambda a, b, s=sign: a != b and a[0] <= b[0] and s * a[1] <= s * b[1]
        best = sorted({p for p in found if not any(beats(q, p) for q in found)})
        assert front(found, minimize) == best


def test_pareto_as_a_file(make_run, tmp_path):
    run = read_run(make_run(tmp_path / "one"), "one")
    out = write_pareto([run], tmp_path / "pareto.svg")
    assert out is not None and out.read_text().startswith("<svg")
    (tmp_path / "one" / "summary.json").write_text(json.dumps({"step": 1}))
    assert write_pareto([read_run(tmp_path / "one", "one")], tmp_path / "none.svg") is None


def test_text_by_experts():
    text = decisions.coloured_text(["<b>", "x"], [1.0, 3.0])
    assert "&lt;b&gt;" in text and "0.00)" in text and "0.75)" in text
    terminal = decisions.terminal_text(["[bold]", "x"], [1.0, 3.0])
    assert terminal.plain == "[bold]x"
    assert [s.style for s in terminal.spans] == [
        "black on rgb(255,255,255)",
        "black on rgb(255,115,30)",
    ]
    with pytest.raises(DyncompError, match="2 pieces and 1 figures"):
        decisions.coloured_text(["a", "b"], [1.0])


def test_cells():
    assert [cell(v) for v in (None, 1234567, 0.123456, 12345.6, True, "a")] == [
        "", "1,234,567", "0.1235", "12,346", "True", "a",
    ]  # fmt: skip
