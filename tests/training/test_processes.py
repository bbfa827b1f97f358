"""Several processes train like one: numbers, data, checkpoints between other numbers of processes."""

import json

import jax
import numpy as np
import pytest
from several import N, family, taken_traces, together, traced

from dyncomp.core.errors import DyncompError
from dyncomp.core.workdir import steps_in
from dyncomp.parallel import MeshSpec, processes
from dyncomp.parallel.shardings import process_rows
from dyncomp.training.checkpoint import read_newest
from dyncomp.training.loop import train


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_train_and_evaluate_like_one(tmp_path):
    """Dense, experts, exits; two processes of two devices against one device, float32."""
    for count in (1, 2):
        said = together(tmp_path / str(count), count, count, "family")
        assert said.strip() == ""
    for name in family(tmp_path):
        folders = [tmp_path / str(count) / name for count in (1, 2)]
        one, two = map(records, folders)
        assert [(r["step"], r["split"]) for r in one] == [(r["step"], r["split"]) for r in two]
        for a, b in zip(one, two, strict=True):
            assert a.keys() == b.keys()
            # Experts pad the rows of each device.
            for key in a.keys() - {"split", "flops_executed"}:
                close = 1e-4 if key == "grad_norm" else 1e-5
                np.testing.assert_allclose(b[key], a[key], rtol=close, err_msg=f"{name} {key}")
        summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
        for figure in ("flops_needed", "elements"):
            assert summaries[0]["compute"][figure] == summaries[1]["compute"][figure]
        for kept in ("decisions.npz", "exits.npz"):
            assert (folders[0] / kept).exists() == (folders[1] / kept).exists() == (name == "exits")
        with (folders[1] / "timings.jsonl").open() as timings:
            told = set().union(*map(json.loads, timings))
        assert {"stall", "straggler", "straggle", "checkpoint"} <= told


def test_resumed_by_other_numbers_of_processes_every_example_is_seen_once(tmp_path):
    """An epoch of 8 steps by 2, 1 and 2 processes; then the same by one undisturbed process."""
    seen = set()
    for steps, count in (("2", 2), ("4", 1), ("8", 2)):
        together(tmp_path, count, 1, "traced", steps)
        parts = taken_traces(tmp_path)
        assert len(parts) == count
        for part in parts.values():
            assert not part & seen
            seen |= part
        assert steps_in(tmp_path / "run")[-1] == int(steps)
    assert seen == set(range(N))
    whole = traced(tmp_path, 8)["run"]
    train(whole, tmp_path / "whole", progress=False)
    ours, theirs = read_newest(tmp_path / "run"), read_newest(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    for path in theirs:
        np.testing.assert_allclose(ours[path], theirs[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_rows_of_a_process_follow_the_mesh():
    mesh = MeshSpec(fsdp=2).build()
    assert process_rows(8, mesh).tolist() == list(range(8)) == process_rows(8, None).tolist()
    with pytest.raises(DyncompError, match="batch size 6 is not a multiple of 4"):
        process_rows(6, mesh)


def test_one_process_agrees_with_itself():
    assert processes.lead() and processes.first_said("a") == "a"
    assert processes.from_lead(lambda: {"a": 1}) == {"a": 1}
    assert processes.added({"a": 2**63, "b": 1}) == {"a": 2**63, "b": 1}
    assert processes.gather(np.float32([1, 2])).shape == (1, 2)
    assert jax.process_count() == 1
