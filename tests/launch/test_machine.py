"""Machines: what their names say, and runs that do not fit them."""

from types import SimpleNamespace

import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.launch import Machine, check_mesh
from dyncomp.parallel import MeshSpec


@pytest.mark.parametrize(
    ("text", "hosts", "per_host", "devices"),
    [
        ("cpu", 1, 1, 1),
        ("cpu:3", 3, 1, 3),
        ("gpu:4", 1, 4, 4),
        ("h100:2x8", 2, 8, 16),
        ("v5e:1x1", 1, 1, 1),
        ("v5e:2x4", 2, 4, 8),
        ("v5e:16x16", 64, 4, 256),
        ("v4:2x2x1", 1, 4, 4),
        ("v5p:2x2x4", 4, 4, 16),
        ("tpu7x:2x2x1", 1, 4, 8),
    ],
)
def test_machines(text, hosts, per_host, devices):
    machine = Machine.parse(text)
    assert (machine.hosts, machine.per_host, machine.devices) == (hosts, per_host, devices)
    assert Machine.parse(str(machine)) == machine


@pytest.mark.parametrize(
    "text",
    ["", "v5", "h100:", "h100:x", "h100:0", "h100:2x2x2", "cpu:2x2", "v5e:4", "v5e:3x3", "v4:2x2"],
)
def test_machines_that_are_none(text):
    if text == "h100:":
        assert Machine.parse(text) == Machine.parse("h100")
        return
    with pytest.raises(DyncompError, match="no machine|machine .*: write"):
        Machine.parse(text)


def run(mesh, batch_size=32):
    return SimpleNamespace(mesh=mesh, batch_size=batch_size)


@pytest.mark.parametrize(
    ("made", "machine", "message"),
    [
        (run(None), "cpu:2", "bind training.Run.mesh"),
        (run(MeshSpec(tensor=3)), "v5e:4x4", "16 devices are not a multiple of 3"),
        (run(MeshSpec(data=4)), "gpu:8", "needs 4 devices but there are 8"),
        (run(MeshSpec(fsdp=16), 24), "v5e:4x4", "batch size 24 is not a multiple of 16"),
    ],
)
def test_runs_that_do_not_fit(made, machine, message):
    with pytest.raises(DyncompError, match=message):
        check_mesh(made, Machine.parse(machine))


def test_runs_that_fit():
    check_mesh(run(None), Machine.parse("h100"))
    check_mesh(run(MeshSpec(fsdp=4, tensor=2)), Machine.parse("h100:2x8"))


def test_the_run_of_a_suite_is_named():
    suite = SimpleNamespace(selected=lambda: None, runs={"good": run(MeshSpec()), "bad": run(None)})
    with pytest.raises(DyncompError, match="^bad: "):
        check_mesh(suite, Machine.parse("cpu:2"))
    suite.selected = lambda: suite.runs["good"]
    check_mesh(suite, Machine.parse("cpu:2"))
