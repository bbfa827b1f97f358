"""Processes that are lost, stopped or asked to stop: one line, one exit code, the same bits in the end."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from dyncomp.bench import faults
from dyncomp.cli import supervise
from dyncomp.cli.job import STREAMS, Place
from dyncomp.cli.main import main
from dyncomp.cli.supervise import lost_in, spawned
from dyncomp.core.workdir import steps_in


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "faults.gin"
    path.write_text(faults.CONFIG.format(steps=400))
    return path


def wait_for(metrics, lines, parents):
    while faults.lines_of(metrics) < lines:
        assert all(parent.poll() is None for parent in parents), parents[0].communicate()
        time.sleep(0.01)


def test_each_fault_ends_the_job_and_costs_no_bit(tmp_path):
    result = faults.through_faults(tmp_path, faults.KINDS, processes=2, most_steps=8)
    assert not result.wrong and max(result.seconds) < faults.LIMIT_SECONDS, result


def test_a_parent_on_each_host(tmp_path, config):
    """No parent sees the other's process: the runtime finds out by itself which one was lost."""
    words = [sys.executable, "-m", "dyncomp", "run", config, "--workdir", tmp_path / "run"]
    parents = []
    for place in spawned(2):
        flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
        given = ["--coordinator", place.coordinator, "--processes", 2, "--process", place.process]
        parents.append(
            subprocess.Popen(
                [*map(str, [*words, "--no-progress", *given])],
                env={**os.environ, **flags},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    wait_for(tmp_path / "run" / "metrics.jsonl", 20, parents)
    os.kill(faults.member(parents[1], 1), signal.SIGKILL)
    for parent in parents:
        _, wrong = faults.ended(parent, 1, 2)
        assert not wrong


def test_sigterm_saves_in_all_processes(tmp_path, config):
    parent = faults.job(config, tmp_path / "run", 2)
    wait_for(tmp_path / "run" / "metrics.jsonl", 20, [parent])
    parent.send_signal(signal.SIGTERM)
    said = parent.communicate(timeout=60)[1].strip().splitlines()
    assert parent.returncode == 75 and len(said) == 1, said
    step = int(re.search(r"stopped by SIGTERM after step (\d+) of 400, which is saved", said[0])[1])
    assert steps_in(tmp_path / "run")[-1] == step
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert records[-1]["step"] == step


def test_an_error_of_the_config_is_one_line_and_not_75(tmp_path, config):
    config.write_text(config.read_text().replace("batch_size = 16", "batch_size = 15"))
    parent = faults.job(config, tmp_path / "run", 2)
    said = parent.communicate(timeout=60)[1].strip().splitlines()
    assert parent.returncode == 1 and len(said) == 1
    assert said[0].startswith("error: batch size 15 is not a multiple of 2")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--processes", "2"], "need --coordinator and --process too"),
        (["--spawn", "0"], "write 1 or more"),
        (["--spawn", "2", "--distributed"], "leave the other flags out"),
        (["--coordinator", "a:1", "--processes", "2", "--process", "2"], "use 0 to 1"),
    ],
)
def test_flags_that_do_not_go_together(config, flags, said, capsys):
    assert main(["run", str(config), *flags]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_process_that_the_runtime_gave_up_must_end_soon(tmp_path):
    """The runtime's abort may take long: the parent does not wait for it."""
    log = tmp_path / "log"
    log.write_text("[Gloo] Rank 1 is connected to 1 peer ranks.\n")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        child = supervise.Child(Place("a:1", 2, 1), process, log)
        assert child.look(0.0) == child.look(100.0) == ""
        with log.open("a") as stream:
            stream.write(f"F1127 client.h:80] {supervise.GIVEN_UP}. This most likely indicates\n")
        assert child.look(101.0) == child.look(101.0 + supervise.GRACE_SECONDS) == ""
        assert child.look(102.0 + supervise.GRACE_SECONDS) == "given up by the runtime"


def test_what_libraries_log_goes_to_the_parent(tmp_path):
    """The terminal gets the run's own words alone, such as the line that says who was lost."""
    program = (
        "import logging, sys\n"
        "from dyncomp.cli import job, supervise\n"
        "with job.joined(supervise.spawned(1)[0]):\n"
        "    logging.getLogger('absl').error('could not commit')\n"
        "    print('own', file=sys.stderr)\n"
    )
    own, log = tmp_path / "own", tmp_path / "log"
    with own.open("w") as terminal, log.open("w") as native:
        told = {STREAMS: f"{terminal.fileno()},{terminal.fileno()}"}
        command = [sys.executable, "-c", program]
        files = {"stderr": native, "pass_fds": [terminal.fileno()]}
        subprocess.run(command, env={**os.environ, **told}, check=True, **files)
    assert own.read_text() == "own\n" and "could not commit" in log.read_text()


def test_what_the_runtime_says_names_the_process():
    unhealthy = "The following tasks are unhealthy (stopped sending heartbeats):\n{}3\nThe tasks"
    for name in ("", "/job:jax_worker/replica:0/task:"):
        assert lost_in(unhealthy.format(name)) == 3
    assert lost_in("Either the leader task was preempted/died/restarted unexpectedly") == 0
    late = "absl::Status: DEADLINE_EXCEEDED: Deadline Exceeded\n\nRPC: /xla.{}/Heartbeat\n"
    assert lost_in(late.format("coordination.CoordinationService")) == 0
    assert (
        lost_in("# of tasks that reached the barrier: 1/2.\nThe first task at the barrier: 1.") == 1
    )
    assert lost_in("Polled an error from coordination service") is None
