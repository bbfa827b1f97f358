"""Commands of xpk; tests/peers/test_schedulers.py hands them to xpk itself."""

import shlex

import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.launch import engine


def flags(command) -> dict[str, str]:
    assert command[:3] == ["xpk", "workload", "create"]
    return dict(zip(command[3::2], command[4::2], strict=True))


def test_a_workload_a_point(make):
    job = make("xpk", "v5e:4x4", max_restarts=9)
    first, second = map(flags, engine("xpk").write(job).commands)
    assert (first["--workload"], second["--workload"]) == ("test-0", "test-1")
    assert first["--tpu-type"] == "v5litepod-4x4" and first["--cluster"] == "c"
    assert first["--restart-on-exit-codes"] == "75" and first["--max-restarts"] == "9"
    assert first["--storage"] == "fuse"
    assert shlex.split(first["--command"]) == ["exec", "dyncomp", *job.points[0], "--distributed"]


def test_gpus(make):
    plain = [["run", "quickstart", "--workdir", "/data/w"]]
    (command,) = map(flags, engine("xpk").write(make("xpk", "h100:2x8", plain)).commands)
    assert command["--device-type"] == "h100-80gb-8" and command["--num-nodes"] == "2"
    assert command["--command"].endswith(" --processes 2 --process $NODE_RANK")
    with pytest.raises(DyncompError, match="can't pass quotes within quotes"):
        engine("xpk").write(make("xpk", "h100:8"))
