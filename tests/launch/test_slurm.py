"""The batch script: its options, and what it does when run with stand-ins for ``srun`` and ``scontrol``."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.launch import engine, via_submitit

SRUN = """#!/bin/sh
printf '%s\\n' "$@" > "$SEEN/srun"
exit "$CODE"
"""
SCONTROL = """#!/bin/sh
echo "$@" > "$SEEN/scontrol"
"""


def options(text: str) -> dict[str, str]:
    """Options of ``sbatch`` in a script."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.M))


@pytest.mark.parametrize("name", ["slurm", "submitit"])
def test_options(name, written):
    if name == "submitit":
        pytest.importorskip("submitit")
    found = options(written(name, "h100:2x8", at_once=1))
    assert found["array"] == "0-1%1"
    assert found["partition"] == "long" and found["account"] == "me" and found["time"] == "1440"
    assert found["nodes"] == "2" and found["ntasks-per-node"] == "8"  # a task a GPU
    assert found["gpus-per-node"] == "h100:8"
    assert found["signal"] == "TERM@120" and "requeue" in found and found["open-mode"] == "append"


def test_machines(written):
    assert options(written("slurm", "gpu:4"))["gpus-per-node"] == "4"
    found = options(written("slurm", "cpu:3"))
    assert (found["nodes"], found["ntasks-per-node"]) == ("3", "1") and "gpus-per-node" not in found
    assert options(written("slurm"))["array"] == "0-1"


def test_what_the_user_names_wins(written):
    found = options(written("slurm", "h100:8", sbatch={"gpus-per-node": "8", "signal": "TERM@60"}))
    assert found["gpus-per-node"] == "8" and found["signal"] == "TERM@60"


@pytest.fixture
def run(tmp_path):
    """``run(script, task, code)``: its exit code, what ``srun`` was given, what ``scontrol`` was."""

    def ran(script: str, task: int, code: int) -> SimpleNamespace:
        tools = tmp_path / "bin"
        tools.mkdir()
        for tool, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (tools / tool).write_text(text)
            (tools / tool).chmod(0o755)
        env = {"SEEN": str(tmp_path), "CODE": str(code), "SLURM_JOB_ID": "7"}
        env |= {"SLURM_ARRAY_TASK_ID": str(task), "PATH": f"{tools}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-u"], input=script, env=env, text=True, capture_output=True)
        read = lambda name: (tmp_path / name).read_text() if (tmp_path / name).exists() else ""
        assert done.stderr == ""
        return SimpleNamespace(code=done.returncode, srun=read("srun"), scontrol=read("scontrol"))

    return ran


@pytest.mark.parametrize("task", [0, 1])
def test_each_task_runs_its_point(task, written, make, run):
    found = run(written("slurm"), task, 0)
    assert found.srun.splitlines() == [sys.executable, "-m", "dyncomp", *make("slurm").points[task]]
    assert found.code == 0 and found.scontrol == ""


def test_several_tasks_are_told_to_join(written, make, run):
    found = run(written("slurm", "gpu:2"), 0, 0).srun.splitlines()
    assert found[3:] == [*make("slurm").points[0], "--distributed"]


@pytest.mark.parametrize("name", ["slurm", "submitit"])
@pytest.mark.parametrize(("code", "again"), [(75, "requeue 7\n"), (1, ""), (137, "")])
def test_only_a_saved_run_is_queued_again(name, code, again, written, run):
    if name == "submitit":
        pytest.importorskip("submitit")
    found = run(written(name), 0, code)
    assert found.code == code and found.scontrol == again


def test_submitit_calls_dyncomp(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="code 1"):
        via_submitit.task(["run"])
    saved = SimpleNamespace(returncode=75)
    monkeypatch.setattr(subprocess, "run", lambda command: saved)
    with pytest.raises(SystemExit) as stop:  # no result is written down, so that the point goes on
        via_submitit.task(["run"])
    assert stop.value.code == 75


def test_submitit_away_from_a_cluster(make, monkeypatch):
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda cls: -1))
    with pytest.raises(DyncompError, match="srun is not here"):
        via_submitit.submit(make("submitit"))
    assert "submitit.core._submit" in engine("submitit").write(make("submitit")).text()


def test_submitit_submits_one_array(make, tmp_path, monkeypatch):
    """With stand-ins for Slurm's commands, submitit's own code makes and submits the array."""
    pytest.importorskip("submitit")
    for tool in ("srun", "sbatch"):
        (tmp_path / tool).write_text("#!/bin/sh\necho Submitted batch job 12\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    job = make("submitit")
    object.__setattr__(job, "workdir", tmp_path / "w")
    assert [made.job_id for made in via_submitit.submit(job)] == ["12_0", "12_1"]
    pickles = sorted(path.name for path in (tmp_path / "w").rglob("*submitted.pkl"))
    assert pickles == ["12_0_submitted.pkl", "12_1_submitted.pkl"]
