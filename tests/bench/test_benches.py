"""Every bench has a quick run whose rows keep the format; names, near names and processes of their own."""

import importlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from dyncomp import bench
from dyncomp.bench import experts, fresh, overhead
from dyncomp.core.errors import DyncompError
from dyncomp.tasks.images import FASHION_FOLDER
from dyncomp.training import memory

COMMON = (
    *("id", "ratio", "interval", "goal", "relation", "holds", "reference", "peer"),
    *("median_ours", "median_peer", "needed", "executed", "runs"),
)
PICTURES = pytest.mark.skipif(
    not Path(FASHION_FOLDER).exists(), reason="apt-get install dataset-fashion-mnist"
)
QUICK = [  # tests/training counts kills and faults, tests/parallel the meshes
    pytest.param(name, marks=[PICTURES] if name == "compile" else [])
    for name in bench.BENCHES
    if name not in ("kills", "faults", "meshes")
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DYNCOMP_CACHE", str(tmp_path_factory.getbasetemp() / "bench-cache"))


@pytest.fixture
def one_process(monkeypatch):
    """What benches measure in processes of their own, without these: they take seconds each to start."""

    def call(target, words, **options):
        if options:  # an environment or a core of its own
            return apart(target, words, **options)
        module, _, function = target.partition(":")
        return json.loads(json.dumps(getattr(importlib.import_module(module), function)(**words)))

    apart = fresh.call
    monkeypatch.setattr(fresh, "call", call)


@pytest.mark.usefixtures("one_process", "unchecked")
@pytest.mark.parametrize("name", QUICK)
def test_quick_rows_keep_the_format(name, capsys):
    assert bench.main(name, ["--quick"], json=True) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bench"] == name and result["quick"] and result["environment"]["cores"] >= 1
    assert result["rows"]
    if name == "overhead":  # every stretch but the first was timed
        assert [row["runs"] for row in result["rows"]] == [overhead.QUICK.pairs] * 3
        assert result["rows"][1]["same_program"] and result["rows"][1]["instructions"] > 1000
    for row in result["rows"]:
        assert [key for key in COMMON if key not in row] == []
        assert row["id"].startswith(f"{name}/") and row["runs"] >= 1
        assert np.isfinite(row["ratio"]) and row["holds"] in (True, False, "unresolved", None)
        assert row["interval"] is None or row["interval"][0] <= row["ratio"] <= row["interval"][1]
        assert (row["goal"] is None) == (row["relation"] == "report")


def test_list_names_every_bench(capsys):
    assert bench.main("list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(bench.BENCHES)
    assert all(len(line.split()) > 3 for line in lines)
    for name in bench.BENCHES:
        assert callable(importlib.import_module(f"dyncomp.bench.{name}").rows)


def test_an_unknown_name_gets_near_ones():
    with pytest.raises(DyncompError, match="no bench 'ledgre': did you mean ledger"):
        bench.measure("ledgre")
    with pytest.raises(DyncompError, match="`dyncomp bench list` names them"):
        bench.measure("zzz")


def test_a_table_for_people(capsys):
    rows = [
        {"id": "a/b", "ratio": 1.25, "interval": [1.0, 1.5], "goal": None, "relation": "report"}
    ]
    bench.show(
        {"bench": "a", "quick": True, "rows": [{**rows[0], "holds": None, "reference": "r"}]}
    )
    said = capsys.readouterr().out
    assert "bench a (quick)" in said and "1.2500" in said and "a/b: r" in said


def test_what_a_row_knows_beyond_its_ratio():
    assert bench.remark({"id": "a"}) == ""
    said = bench.remark({"speedup": 0.94, "speedup_bound": 1.22})
    assert said == "; 0.94 times as fast, where bytes allow 1.22"
    said = bench.remark({"choose_ms": 14.2, "all_ms": 82.0, "tiles": 0.123})
    assert "choosing takes 14 of 82 ms, 0.12 of its causal tiles" in said


def test_a_process_of_its_own():
    assert fresh.call("os:getpid", {}) != os.getpid()
    assert fresh.call("dyncomp.core.environment:cores", {}, pinned=True) == 1
    with pytest.raises(DyncompError, match="truediv expected 2 arguments"):
        fresh.call("operator:truediv", {})


@pytest.mark.parametrize("kernel", [True, False])
def test_peak_sees_memory_that_was_given_back(kernel, monkeypatch, tmp_path):
    if not kernel:
        monkeypatch.setattr(memory, "RESET", tmp_path / "missing" / "clear_refs")
    before, peak = memory.resident_bytes(), memory.Peak()
    assert (peak.sampler is None) == kernel
    block = np.ones(256 << 20, np.uint8)
    if not kernel:
        import time

        time.sleep(0.2)
    del block
    grown = peak.bytes() - before
    assert 250 << 20 <= grown <= 300 << 20


def test_two_experts_by_bisection():
    """active(p) = 1 + 4 p is 2 at p = 1/4."""
    assert experts.two_experts(lambda p: 1 + 4 * p) == pytest.approx(0.25, abs=0.6 / 2**11)


def test_a_layer_side_counts_what_ran():
    """Top-2 of n rows needs 2 n x 6 d f FLOPs and 2 n d e for the scores."""
    tiny = overhead.QUICK
    found = experts.measured("top_2", "gradient", True)
    n, d, f, e = tiny.batch * tiny.context, tiny.d_model, tiny.hidden // 2, tiny.experts
    assert found["active"] == 2.0
    assert found["needed"] == 2 * n * 6 * d * f + 2 * n * d * e
    assert found["needed_peer"] == n * 6 * d * tiny.hidden
