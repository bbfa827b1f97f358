"""What tasks are told of each other is what ``dyncomp run`` understands."""

import shlex

import pytest

from dyncomp.cli.job import Place, place_of
from dyncomp.cli.main import parser
from dyncomp.launch import Machine
from dyncomp.launch.processes import flags, under_slurm


def understood(words: list[str]) -> Place | None:
    """Where ``dyncomp run`` thinks it stands."""
    return place_of(parser().parse_args(["run", "quickstart", *words]))


@pytest.mark.parametrize(
    ("machine", "place"),
    [
        ("h100:8", None),
        ("v5e:4x4", Place()),
        ("h100:2x8", Place("first:8476", 2, 1)),
        ("cpu:2", Place("first:8476", 2, 1)),
    ],
)
def test_a_pod_and_run_agree(machine, place):
    words = shlex.split(flags(Machine.parse(machine), "first:8476", "2", "1"))
    assert understood(words) == place


@pytest.mark.parametrize(("machine", "place"), [("h100:1", None), ("h100:2x8", Place())])
def test_a_task_of_slurm_and_run_agree(machine, place):
    assert understood(under_slurm(Machine.parse(machine))) == place
