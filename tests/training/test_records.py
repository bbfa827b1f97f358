"""The progress bar, as a reader sees it, and rates."""

import functools
import io
import json

import pytest
from rich.console import Console

from dyncomp import attention, experts, models, routers, tasks
from dyncomp.parallel.roofline import peak_flops
from dyncomp.training import AdamW, Run, records
from dyncomp.training.engine import Engine
from dyncomp.training.records import Bar, Timings


def test_flops_a_second_since_the_last_log_line(tmp_path, monkeypatch):
    """Two stretches of 2 and 3 steps that took 4 and 6 seconds: 10 seconds for 5 steps of 30 FLOPs, 15 a second."""
    now = iter([0.0, 4.0, 10.0, 16.0, 20.0, 21.0])
    monkeypatch.setattr(records.time, "perf_counter", lambda: next(now))
    timings = Timings(tmp_path / "timings.jsonl", peak=60.0)
    for step, steps, reset in ((2, 2, True), (5, 3, True), (6, 1, False)):
        for _ in range(steps):
            timings.count()
        timings.pause(step)
        if step > 2:
            timings.computed(step, {"needed": 30.0, "executed": 45.0, "dense": 90.0})
        if reset:
            timings.reset()
    timings.close()
    told = [json.loads(line) for line in (tmp_path / "timings.jsonl").open()]
    rates = [record for record in told if "mfu" in record]
    wanted = {
        "step": 5, "flops_needed_per_second": 15.0, "flops_executed_per_second": 22.5,
        "flops_dense_per_second": 45.0, "mfu": 0.25, "mfu_executed": 0.375, "mfu_dense": 0.75,
    }  # fmt: skip
    assert rates[0] == pytest.approx(wanted)
    assert rates[1]["mfu"] == pytest.approx(0.5) and timings.medians()["mfu"] == 0.375


def test_peaks_by_what_jax_calls_a_device():
    assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU v4") == 275e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("cpu") is None


def test_the_bar_names_the_run_and_shows_steps_rate_and_loss():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    bar = Bar("top[p]", 4, 1, True, console)

    def drawn():
        stream.seek(0)
        stream.truncate()
        console.print(bar.progress.get_renderable())
        return stream.getvalue()

    with bar.doing("compiling"):
        assert "top[p]" in drawn() and "1/4" in drawn() and "compiling" in drawn()
    bar.update(3)
    bar.logged(1.23456, 0.04)
    with bar.doing("evaluating"):
        assert "evaluating" in drawn() and "loss" not in drawn()
    bar.update(4)
    assert "4/4" in drawn() and "25 steps/s loss 1.235" in drawn()
    bar.close()


def test_a_bar_that_is_not_shown_prints_nothing():
    stream = io.StringIO()
    bar = Bar("x", 4, 0, False, Console(file=stream, force_terminal=True))
    bar.update(4)
    bar.logged(1.0, 1.0)
    bar.close()
    assert stream.getvalue() == ""


def test_dense_equivalent_counts_every_expert_on_every_token():
    """Two of four experts: the dense FLOPs exceed the executed ones by two experts on all tokens of the step."""
    router = functools.partial(routers.TopK, k=2)
    unit = functools.partial(experts.MoE, router=router, num_experts=4, hidden=8)
    mixer = functools.partial(attention.Attention, heads=2)
    block = functools.partial(models.Block, mixer=mixer, ffn=unit)
    model = models.DecoderLM(vocab_size=32, d_model=16, groups=[models.Group([block], 3)])
    run = Run(
        model=model, task=tasks.CodeLM(context=8), optimizer=AdamW(learning_rate=1e-3), steps=1,
        batch_size=4, accumulate=2,
    )  # fmt: skip
    assert Engine(run).rows_of_every_expert() == {"group_0/block_0/ffn/experts/rows": 3 * 4 * 8 * 4}
