"""docs/pods.md says what its JSON files say, and those hold together; one small program is compiled again as a peer."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dyncomp.parallel import aot
from dyncomp.parallel.topology import HBM

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "docs" / "bench"


@pytest.fixture(scope="module")
def made():
    """The scripts of docs/bench as modules."""
    sys.path.insert(0, str(BENCH))
    try:
        names = ("pods", "memory_model", "scaling", "sequence", "pods_page")
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def rows(made):
    return [row for row in made["pods"].load()["rows"] if "report" in row]


def test_the_page_is_generated(made):
    assert (ROOT / "docs" / "pods.md").read_text() == made["pods_page"].page()
    assert made["pods_page"].MARGIN == aot.MARGIN


def test_every_paper_config_has_its_jobs(made):
    jobs = made["pods"].jobs()
    assert len(set(jobs)) == len(jobs)
    named = {config for config, _, _ in jobs}
    assert named == {path.stem for path in (ROOT / "configs").glob("*_paper.gin")}
    for config in named:
        slices = {name.partition(":")[0] for job, name, _ in jobs if job == config}
        assert slices == {"v5e", "v5p"}, config
    have = {(row["config"], row["slice"], row["mesh"]) for row in made["pods"].load()["rows"]}
    assert have <= set(jobs)


def test_rows_hold_together(made, rows):
    """Memory adds up, the verdict follows from it, shares of dense are at most one, and no byte moves for nothing."""
    assert rows
    for row in rows:
        report = row["report"]
        memory, chips = report["memory"], report["devices"]
        assert report["topology"] == row["slice"] and chips == made["pods"].chips(row["slice"])
        assert memory["peak"] == sum(
            sign * memory[name]
            for name, sign in (
                ("arguments", 1),
                ("outputs", 1),
                ("temporaries", 1),
                ("aliased", -1),
            )
        )
        assert report["device_memory"] == HBM[row["slice"].partition(":")[0]]
        assert report["fits"] == (memory["peak"] <= report["device_memory"])
        # Buffers are padded to tiles, small ones by far: more than what our count of the state says, never less.
        state = report["state_bytes"]
        assert 0.99 * state < memory["arguments"] < 1.6 * state + 2**24
        assert report["dense_flops"] is None or report["ledger_flops"] <= report["dense_flops"]
        for kind, moved in report["collectives"].items():
            assert (
                moved["runs"] >= moved["sites"] > 0 and moved["sent"] <= 2 * moved["bytes"] * chips
            ), kind


def test_heads_of_configs_say_the_figures(rows):
    for row in rows:
        text = (ROOT / "configs" / f"{row['config']}.gin").read_text().replace("\n# ", " ")
        if row["mesh"] == "" and f"--topology {row['slice']}" in text:
            said = f"{row['report']['memory']['peak'] / 2**30:.1f} of 16 GiB a chip"
            assert said in text, (row["config"], said)


def test_our_count_is_close(made):
    """As the page says: within 5%."""
    found = json.loads(made["memory_model"].ROWS.read_text())["rows"]
    assert [row["case"] for row in found] == list(made["memory_model"].CASES)
    ratios = {row["case"]: row["ours"]["peak"] / row["xla"] for row in found}
    assert all(abs(ratio - 1) <= 0.05 for ratio in ratios.values()), ratios


def test_our_count_is_still_the_one_stored(made):
    """Traced again on simulated devices, without a compile."""
    cases, model = made["memory_model"].CASES, made["memory_model"]
    stored = {row["case"]: row["ours"] for row in json.loads(model.ROWS.read_text())["rows"]}
    for name in ("dense", "dense, nothing recomputed", "8 experts, top 2"):
        job = aot.prepare(model.run_of(cases[name]), model.ask_of(cases[name], simulated=True))
        assert aot._predicted(job) == stored[name]


@pytest.mark.peers
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no TPU compiler")
def test_a_small_case_again(made):
    """XLA's allocation of one stored case is what it was."""
    told = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    words = [sys.executable, str(BENCH / "memory_model.py"), "dense"]
    done = subprocess.run(
        words, env={**told, "XLA_FLAGS": ""}, capture_output=True, text=True, check=True
    )
    row = json.loads(done.stdout.splitlines()[-1])
    (stored,) = (
        r for r in json.loads(made["memory_model"].ROWS.read_text())["rows"] if r["case"] == "dense"
    )
    assert row["xla"] == pytest.approx(stored["xla"], rel=0.01)


GOLDEN = {
    "dynamic_logits_fusion_paper": ("v5e:8x8", ""),
    "harder_tasks_more_experts_paper": ("v5e:16x16", "data=1,fsdp=16,expert=16"),
    "routing_transformer_paper": ("v5e:16x16", "data=1,fsdp=64,tensor=4"),
}
"""Dense, routed and sparse: with collectives of all kinds, and kernels."""


@pytest.mark.peers
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no TPU compiler")
@pytest.mark.parametrize("config", GOLDEN)
def test_facts_of_compiled_programs(made, monkeypatch, config):
    """FLOPs, bytes, collectives and kernels of a paper config are those stored."""
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)
    name, mesh = GOLDEN[config]
    (stored,) = (
        row["report"]
        for row in made["pods"].load()["rows"]
        if (row["config"], row["slice"], row["mesh"]) == (config, name, mesh)
    )
    row = made["pods"].compile_one(config, name, mesh)
    found = row.get("report") or pytest.fail(row["error"])
    assert found["ledger_flops"] == stored["ledger_flops"]
    assert found["kernels"] == stored["kernels"]
    places = lambda report: {kind: t["sites"] for kind, t in report["collectives"].items()}
    assert places(found) == places(stored)
    for of in (
        lambda report: report["work"]["product"]["flops"],
        lambda report: report["memory"]["peak"],
        lambda report: sum(t["bytes"] for t in report["collectives"].values()),
    ):
        assert of(found) == pytest.approx(of(stored), rel=0.01)


def test_long_sequences_hold_together(made):
    """The page's words: a ring needs a third of the memory at the longer length, and arithmetic binds there."""
    sequence = made["sequence"]
    found = json.loads(sequence.ROWS.read_text())["rows"]
    assert [(r["length"], r["kv_heads"], r["form"]) for r in found] == sequence.jobs()
    reports = {(r["length"], r["kv_heads"], r["form"]): r["report"] for r in found}
    peak = lambda *key: reports[key]["memory"]["peak"]
    for length in sequence.LENGTHS:
        for heads in sequence.KV_HEADS:
            assert peak(length, heads, "ring") == min(
                peak(length, heads, f) for f in sequence.FORMS
            )
    for heads in sequence.KV_HEADS:
        assert peak(32_768, heads, "ring") < 0.34 * peak(32_768, heads, "gather")
        for form in sequence.FORMS:
            times = reports[32_768, heads, form]["model"]
            assert times["compute"] > times["interconnect"]
