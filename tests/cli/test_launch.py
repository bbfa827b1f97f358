"""``launch`` and ``sweep --engine``: what is printed, written and submitted; early errors of one line."""

import json
import re
import shlex
import stat

import pytest
from terminal import ONE, cli

from dyncomp.cli.main import parser
from dyncomp.cli.output import split_overrides

SLURM = ("--engine", "slurm", "--partition", "long")
JOBSET = ("--engine", "jobset", "--image", "me/dyncomp", "--storage", "claim:/data")


def test_what_a_dry_run_prints_parses(config, here):
    printed = cli("launch", config, *SLURM, "--dry-run", ONE).out
    assert "#SBATCH --partition=long" in printed
    assert printed.endswith("$ sbatch runs/tiny/launch/tiny.sbatch\n")
    assert list(here.iterdir()) == []
    (line,) = re.findall(r"^0\) set -- (.*) ;;$", printed, re.M)
    rest, overrides = split_overrides(shlex.split(line))
    args = parser().parse_args(rest)
    assert (args.command, args.config, args.workdir) == ("run", str(config), "runs/tiny")
    assert overrides == ["training.Suite.select='top_p'"]


def test_json(config, here):
    found = json.loads(cli("launch", config, *JOBSET, "--dry-run", "--json").out)
    assert found["commands"] == [["kubectl", "create", "-f", "launch/tiny.yaml"]]
    assert "--workdir /data/tiny " in found["files"]["launch/tiny.yaml"]
    assert found["dry_run"] is True


def test_a_sweep_is_an_array_of_its_points(config, here):
    words = ("sweep", config, "--grid", "STEPS=4,6", "--jobs", 1, ONE, *SLURM)
    printed = cli(*words, "--dry-run").out
    assert "#SBATCH --array=0-1%1" in printed
    points = re.findall(r"^\d\) set -- (.*) ;;$", printed, re.M)
    assert [shlex.split(point)[-1] for point in points] == ["--gin.STEPS=4", "--gin.STEPS=6"]
    assert "--workdir runs/tiny_sweep/STEPS=4 " in points[0]


def test_it_is_submitted(config, here, monkeypatch):
    (here / "bin").mkdir()
    tool = here / "bin" / "sbatch"
    tool.write_text('#!/bin/sh\ncp "$1" seen\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    assert cli("launch", config, *SLURM).code == 0
    script = here / "runs" / "tiny" / "launch" / "tiny.sbatch"
    assert (here / "seen").read_text() == script.read_text()


def test_finished_points_are_not_launched(config, here):
    words = ("sweep", config, "--grid", "STEPS=4,6", ONE)
    folder = here / "runs" / "tiny_sweep" / "STEPS=4"
    folder.mkdir(parents=True)
    arguments = ["run", str(config), "--workdir", "runs/tiny_sweep/STEPS=4", "--no-progress", ONE]
    (folder / "sweep.done").write_text(json.dumps([*arguments, "--gin.STEPS=4"]))
    assert "#SBATCH --array=0-0" in cli(*words, *SLURM, "--dry-run").out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--engine", "slrum"), "no engine 'slrum': did you mean slurm?"),
        (("--engine", "slurm"), "engine slurm needs --partition"),
        (("--engine", "jobset"), "engine jobset needs --image"),
        ((*SLURM, "--image", "x"), "--image is not for engine slurm"),
        ((*SLURM, "--machine", "v5e:4x4"), "engine slurm has no v5e"),
        ((*SLURM, "--machine", "h100:two"), "no machine 'h100:two'"),
        (
            (*SLURM, "--machine", "cpu:2"),
            "top_p: cpu:2 has 2 devices but training.Run.mesh is None",
        ),
        ((*SLURM, "--sbatch", "account"), "write NAME=VALUE"),
        ((*SLURM, "--name", "Mine"), "use small letters"),
        ((*JOBSET, "--workdir", "/elsewhere"), "is not below /data"),
        ((*SLURM, "--gin.STEPS=many"), "text values need quotes"),
        (SLURM, "sbatch is not here"),
    ],
)
def test_errors(config, here, monkeypatch, words, message):
    monkeypatch.setenv("PATH", str(here))
    assert message in cli("launch", config, *words).error
    assert list(here.iterdir()) == []


def test_a_mesh_that_does_not_divide(here):
    words = ("launch", "zipvl_paper", *SLURM, "--machine", "h100:2x8", "--dry-run")
    assert cli(*words).code == 0
    found = cli(*words, "--gin.parallel.MeshSpec.tensor=3")
    assert "16 devices are not a multiple of 48" in found.error


def test_flags_of_schedulers_need_an_engine(config, here):
    words = ("sweep", config, "--grid", "STEPS=1,2")
    assert "--dry-run is for schedulers: add --engine" in cli(*words, "--dry-run").error
