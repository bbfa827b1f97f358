"""What is written for schedulers, given to the schedulers' own readers, dry runs and, for Slurm, to a running cluster.

SkyPilot and xpk pin versions that do not go together with ours: they live in environments of their own and are found
by their commands on the PATH. A test skips where its tool is missing.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.peers


def tool(name: str) -> Path:
    """Where a command is."""
    found = shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not here")
    return Path(found)


def launched(*words: str, command=("launch", "quickstart")) -> dict:
    """What a dry run gives to the scheduler."""
    line = [sys.executable, "-m", "dyncomp", *command, *words, "--dry-run", "--json"]
    return json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize(
    ("config", "machine"),
    [("quickstart", "cpu"), ("quickstart", "h100"), ("tutel_paper", "h100:8x8"), ("zipvl_paper", "v5e:4x4")],
)  # fmt: skip
def test_skypilot_reads_its_tasks(config, machine, tmp_path):
    python = tool("sky").with_name("python")
    words = ("--engine", "sky", "--image", "me/dyncomp", "--storage", "gs://bucket:/data")
    found = launched(*words, "--machine", machine, command=("launch", config))
    (text,) = found["files"].values()
    path = tmp_path / "task.yaml"
    path.write_text(text)
    # A bucket would be looked for on the network; everything else goes through SkyPilot's own reader.
    code = (
        "import json, sky, sys, yaml; given = yaml.safe_load(open(sys.argv[1])); del given['file_mounts'];"
        "task = sky.Task.from_yaml_config(given); resources = list(task.resources)[0];"
        "print(json.dumps([task.num_nodes, resources.job_recovery, str(resources.accelerators)]))"
    )
    environment = {**os.environ, "HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    done = subprocess.run(
        [python, "-c", code, path], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    nodes, recovery, _ = json.loads(done.stdout.splitlines()[-1])
    assert recovery["recover_on_exit_codes"] == [75]
    assert nodes == yaml.safe_load(text)["num_nodes"]


@pytest.mark.parametrize(
    ("config", "machine"),
    [("quickstart", "l4"), ("tutel_paper", "h100:8x8"), ("zipvl_paper", "v5e:4x4")],
)
def test_xpk_makes_a_jobset(config, machine, tmp_path):
    tool("xpk")
    words = (
        "--engine",
        "xpk",
        "--image",
        "me/dyncomp",
        "--storage",
        "fuse:/data",
        "--cluster",
        "c",
    )
    (command,) = launched(*words, "--machine", machine, command=("launch", config))["commands"]
    manifest = tmp_path / "jobset.yaml"
    dry = ("--dry-run", "--skip-validation", "--output-manifest-file", str(manifest))
    where = ("--project", "p", "--project-number", "1", "--zone", "us-central1-a")
    done = subprocess.run(
        [*command, *dry, *where],
        capture_output=True,
        text=True,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    job = yaml.safe_load(manifest.read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["operator"] == "NotIn" and 75 in rule["onExitCodes"]["values"]
    assert "exec dyncomp run" in manifest.read_text()


def test_slurm_queues_a_saved_run_again(tmp_path):
    """On a running cluster: the first try of every point saves and leaves with 75, the second ends well."""
    tool("sbatch")
    if subprocess.run(["scontrol", "ping"], capture_output=True).returncode:
        pytest.skip("no Slurm answers")
    partition = subprocess.run(
        ["sinfo", "--noheader", "--format=%R"], capture_output=True, text=True, check=True
    ).stdout.split()[0]
    sweep = ("sweep", "quickstart", "--grid", "STEPS=100,200", "--workdir", str(tmp_path))
    words = ("--engine", "slurm", "--partition", partition, "--minutes", "5")
    ((path, text),) = launched(*words, command=sweep)["files"].items()
    first_saves = 'import os, sys; sys.exit(0 if os.environ.get("SLURM_RESTART_COUNT") else 75)'
    text = text.replace(f"{sys.executable} -m dyncomp", f"{sys.executable} -c '{first_saves}'")
    Path(path).parent.mkdir(parents=True)
    Path(path).write_text(text)
    test_only = subprocess.run(["sbatch", "--test-only", path], capture_output=True, text=True)
    assert test_only.returncode == 0, test_only.stderr
    sent = subprocess.run(
        ["sbatch", "--parsable", path], capture_output=True, text=True, check=True
    )
    assert _ends(sent.stdout.strip()) == [("COMPLETED", "1")] * 2


def _ends(job: str) -> list[tuple[str, str]]:
    """State and restarts of every task of an array once all have ended."""
    for _ in range(300):
        shown = subprocess.run(
            ["scontrol", "show", "job", job], capture_output=True, text=True, check=True
        ).stdout
        states = re.findall(r"JobState=(\w+)", shown)
        if not {"PENDING", "RUNNING", "COMPLETING"} & set(states):
            return list(zip(states, re.findall(r"Restarts=(\d+)", shown), strict=True))
        time.sleep(1)
    raise AssertionError(f"still {states}")
