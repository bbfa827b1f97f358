"""The page: whole, escaped, self-contained, and sensible when files are missing."""

import json
import re
import zipfile
from html.parser import HTMLParser

import numpy as np
import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.report import decisions, pictures
from dyncomp.report.curves import series
from dyncomp.report.load import read_run
from dyncomp.report.page import run_names, write_report
from dyncomp.report.pareto import front, points, write_pareto
from dyncomp.report.summary import cell, figures_of

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
    two = make_run(tmp_path / "two", shift=0.5, pictures="images")
    runs = [make_run(tmp_path / "one"), two]
    text = write_report(runs, tmp_path / "new" / "report.html").read_text()
    page = Reader(text)
    # Pareto, curves of nats, loss and the evil one, load, exits; three images that are no padding
    assert page.tags.count("svg") == 1 + 3 + 2 and page.tags.count("img") == 3
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


@pytest.mark.parametrize("only", ["metrics.jsonl", "summary.json", "decisions.npz"])
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
    (run / "environment.json").write_text("{")
    whole = (run / "decisions.npz").read_bytes()
    (run / "decisions.npz").write_bytes(whole[: len(whole) // 2])
    text = write_report([run], tmp_path / "r.html").read_text()
    assert "decisions.npz is damaged" in text and "environment.json is damaged" in text
    flipped = bytearray(whole)
    (run / "decisions.npz").write_bytes(whole)
    with zipfile.ZipFile(run / "decisions.npz") as members:
        first = members.infolist()[0]
    flipped[first.header_offset + 30 + len(first.filename) + 40] ^= 0xFF  # inside the first array
    (run / "decisions.npz").write_bytes(bytes(flipped))
    assert "decisions.npz is damaged" in write_report([run], tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("pictures", "broken", "count"),
    [
        ("text", {"ffn/route/keep": np.zeros((2, 5, 2), bool)}, 1),  # of other tokens
        ("text", {"ffn/load": np.zeros((0, 4))}, 1),
        ("text", {"shown/widths": np.array([[3]])}, 1),
        ("images", {"exit/exit": np.array([0, -2, 1, 0])}, 1),  # the images can still be shown
        ("images", {"mask": np.ones(7)}, 2),
        ("images", {"shown/images": np.full((4, 2, 2, 1), np.nan)}, 1),
        ("images", {"kinds": {"exit": "ExitPlan", "gone": "RoutePlan"}}, 1),
    ],
)
def test_plans_that_make_no_sense_say_so(make_run, tmp_path, pictures, broken, count):
    run = make_run(tmp_path / "one", pictures=pictures)
    with np.load(run / "decisions.npz") as found:
        arrays = {**found, **broken}
    if isinstance(arrays["kinds"], dict):
        arrays["kinds"] = np.array(json.dumps(arrays["kinds"]))
    np.savez(run / "decisions.npz", **arrays)
    page = write_report([run], tmp_path / "r.html").read_text()
    Reader(page)
    assert page.count("not drawn:") == count


def test_tokens_are_coloured_by_their_mean_active_experts(make_run, tmp_path):
    text = write_report([make_run(tmp_path / "one")], tmp_path / "r.html").read_text()
    assert 'rgba(224,121,27,0.00)" title="1">&lt;b&gt;</span>' in text
    assert 'rgba(224,121,27,0.75)" title="2">&amp;</span>' in text


def test_examples_that_leave_are_counted_without_padding(make_run, tmp_path):
    run = make_run(tmp_path / "one", pictures="images")
    page = write_report([run], tmp_path / "r.html").read_text()
    shares = re.findall(r"<!-- (\d+%) -->", page.split("histogram of exits")[1].split("</svg>")[0])
    assert shares[-3:] == ["33%", "0%", "67%"]
    assert page.count('alt="leaves at exit 0"') == 1 and page.count('alt="leaves at exit 2"') == 2


def test_characters_of_several_tokens_stand_with_the_last():
    content = np.frombuffer("aé☃".encode() + b"\xff", np.uint8)
    found = decisions._pieces(content, np.ones(7, np.int64))
    assert found == ["a", "", "é", "", "", "☃", "\ufffd"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[True, False], [True, True]]), ["no", "yes"]),
        (np.array([[[3, 5]], [[5, 5]]]), ["3", "5"]),
        (np.array([0.25, np.nan, 0.75]), ["0.3", "0.5", "0.7"]),
    ],
)
def test_other_plans_get_a_histogram(values, expected):
    ((caption, html),) = decisions.pictures({"gate/live": values, "mask": np.ones(2)})
    assert caption == "gate/live"
    labels = re.findall(r"<!-- (.*?) -->", html)
    assert set(expected) <= set(labels), labels


def test_text_that_needs_the_same_everywhere():
    html = pictures.coloured_text(["a", "b"], [2.0, 2.0])
    assert "2 active experts for every token" in html and "<span" not in html


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
    text = pictures.coloured_text(["<b>", "x"], [1.0, 3.0])
    assert "&lt;b&gt;" in text and "0.00)" in text and "0.75)" in text
    with pytest.raises(DyncompError, match="2 pieces and 1 figures"):
        pictures.coloured_text(["a", "b"], [1.0])


def test_cells():
    assert [cell(v) for v in (None, 1234567, 0.123456, 12345.6, True, "a")] == [
        "", "1,234,567", "0.1235", "12,346", "True", "a",
    ]  # fmt: skip


def test_figures_come_headline_first_and_leave_out_what_is_missing():
    compute = {
        "flops_needed": 1.5,
        "events_per_element": {"a/router/rows": 3, "a/experts/rows": 4.5, "b": None},
    }
    summary = {
        "headline": "nll", "quality": {"accuracy": 0.5, "nll": 2.0}, "compute": compute,
        "timings": {"compile_seconds": [1.0, 2.5]}, "memory": {"xla_bytes": 3 * 2**20}, "parameters": None,
    }  # fmt: skip
    assert list(figures_of(summary).items()) == [
        ("nll", 2.0), ("accuracy", 0.5), ("needed FLOPs", 1.5), ("active experts", 1.5),
        ("compile seconds", 3.5), ("memory, XLA (MiB)", 3.0),
    ]  # fmt: skip
    assert figures_of({"quality": 3, "compute": [], "timings": {"compile_seconds": 1}}) == {}
