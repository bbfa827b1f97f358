"""`run`, `eval` and `report` as a newcomer meets them."""

import json
import re
import signal
import subprocess

import numpy as np
import pytest
from terminal import ONE, cli, command, spawn

from dyncomp.core.workdir import steps_in
from dyncomp.training import loop
from dyncomp.training.trackers import read_records


def test_a_run_leaves_what_it_promises(trained):
    workdir, printed = trained
    assert printed.code == 0, printed.err
    for name in ("top_p", "dense"):
        left = {path.name for path in (workdir / name).iterdir()}
        promised = ("config.gin", "metrics.jsonl", "summary.json", "checkpoints", "tensorboard")
        assert left >= set(promised)
        assert steps_in(workdir / name)[-1] == 4
    assert (workdir / "pareto.svg").read_text().startswith("<svg")
    assert (workdir / "suite.json").exists()


def test_the_table_fits_80_columns_and_says_what_matters(trained):
    workdir, printed = trained
    assert max(map(len, printed.out.splitlines()[1:-1])) <= 80
    summaries = [json.loads((workdir / n / "summary.json").read_text()) for n in ("top_p", "dense")]
    lines = [line for line in printed.out.splitlines() if line.startswith("│")]
    rows = {c[0]: c[1:] for line in lines for c in [[w.strip() for w in line[1:-1].split("│")]]}
    assert list(rows)[0] == "bits_per_byte (lower is better)", rows
    for name, key in (("needed FLOPs", "flops_needed"), ("executed FLOPs", "flops_executed")):
        shown = [float(cell.replace(",", "")) for cell in rows[name]]
        assert shown == pytest.approx([s["compute"][key] for s in summaries], rel=1e-3)
    assert rows["parameters"] == [f"{s['parameters']:,}" for s in summaries]
    assert float(rows["active experts"][0]) >= 1 and rows["active experts"][1] == ""
    assert {"seconds per step", "compile seconds", "memory, XLA (MiB)"} <= set(rows)
    assert not any("/" in name for name in rows)  # no events: they are in summary.json
    assert printed.out.splitlines()[-1] == f"report: {workdir / 'report.html'}"


def test_the_report_shows_loads_and_text_by_experts(trained):
    workdir, _ = trained
    page = (workdir / "report.html").read_text()
    with np.load(workdir / "top_p" / "decisions.npz") as found:
        keep = found["group_0/block_0/ffn/route/keep"]
        experts = found["group_0/block_0/ffn/route/experts"]
        load = found["group_0/block_0/ffn/load"]
        inputs = found["inputs"]
    for layer in range(2):
        mine = np.bincount(experts[layer][keep[layer]], minlength=4)
        np.testing.assert_array_equal(load[layer], mine)
    assert 'aria-label="expert load per layer"' in page
    body = re.search(r'<pre class="text">(.*?)</pre>', page, re.S)
    assert body is not None
    spans = re.findall(r'title="([^"]+)">(.*?)</span>', body[1], re.S)
    text = bytes(inputs.reshape(-1).tolist()).decode("utf-8", "replace")
    assert "".join(piece for _, piece in spans) == text.removesuffix("\ufffd")
    mean = keep.sum(-1).mean(0)
    assert {value for value, _ in spans} == {f"{m:.3g}" for m in np.unique(mean)}


def test_the_same_command_again_trains_nothing(trained, config, monkeypatch):
    workdir, _ = trained
    monkeypatch.setattr(loop, "Session", None)
    before = (workdir / "top_p" / "metrics.jsonl").stat().st_mtime_ns
    found = cli("run", config, "--workdir", workdir, "--json")
    assert found.code == 0 and found.err == ""
    printed = json.loads(found.out)
    assert printed["summary"] == json.loads((workdir / "suite.json").read_text())
    assert printed["report"] == str(workdir / "report.html")
    assert (workdir / "top_p" / "metrics.jsonl").stat().st_mtime_ns == before


def test_more_steps_go_on_from_the_last_checkpoint(config, tmp_path):
    short = cli("run", config, "--workdir", tmp_path, ONE, "--no-progress", "--tracker", "jsonl")
    assert short.code == 0 and not (tmp_path / "tensorboard").exists()
    longer = cli("run", config, "--workdir", tmp_path, ONE, "--no-progress", "--gin.STEPS=6")
    assert longer.code == 0 and "was another config; this run goes on" in longer.err
    records = read_records(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records if r["split"] == "train"] == [2, 4, 6]


def test_sigterm_saves_and_the_same_command_goes_on(config, tmp_path):
    words = ("run", config, "--workdir", tmp_path, ONE, "--no-progress", "--preempt-code", "79")
    words = (*words, "--gin.STEPS=200", "--gin.training.Run.save_every=20")
    with subprocess.Popen(command(*words), stderr=subprocess.PIPE, text=True) as child:
        while not steps_in(tmp_path) and child.poll() is None:
            pass
        child.send_signal(signal.SIGTERM)
        said = child.communicate()[1].splitlines()
    assert child.returncode == 79, said
    (saved,) = re.findall(r"after step (\d+) of 200, which is saved", said[-1])
    assert "run the same command to go on" in said[-1] and steps_in(tmp_path)[-1] == int(saved)
    again = spawn(*words)
    assert again.code == 0 and json.loads((tmp_path / "summary.json").read_text())["step"] == 200
    steps = [r["step"] for r in read_records(tmp_path / "metrics.jsonl") if r["split"] == "train"]
    assert steps == sorted({*range(2, 201, 2), *(s for s in steps if s == int(saved))})


@pytest.mark.parametrize("code", ["0", "256", "-1"])
def test_an_exit_code_that_would_say_success_is_refused(config, code):
    assert "1 to 255" in cli("run", config, "--preempt-code", code).error


def test_eval_gives_the_figures_of_the_run(trained):
    workdir, _ = trained
    found = cli("eval", workdir / "top_p", "--json")
    assert found.code == 0, found.err
    whole = json.loads(found.out)
    assert whole["split"] == "test" and whole["compute"]["elements"] > 2 * 4 * 16
    shown = cli("eval", workdir / "top_p", "--split", "validation")
    assert "bits_per_byte" in shown.out
    assert shown.out.splitlines()[0] == f"{workdir / 'top_p'} on validation"


def test_eval_of_a_suite_or_of_nothing(trained, tmp_path):
    workdir, _ = trained
    assert "no config.gin" in cli("eval", workdir).error
    assert str(tmp_path) in cli("eval", tmp_path).error


def test_report_over_chosen_runs(trained, tmp_path):
    workdir, _ = trained
    out = tmp_path / "deep" / "page.html"
    found = cli("report", workdir / "dense", workdir / "top_p", "--out", out)
    assert found.code == 0 and found.out == f"report: {out}\n"
    assert "<h1>2 runs: dense, top_p</h1>" in out.read_text()
    assert "is no work directory" in cli("report", tmp_path / "none", "--out", out).error
    assert "nothing to report" in cli("report", out.parent).error
