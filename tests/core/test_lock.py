"""One measurement at a time: a second holder is refused, and a dead one holds nothing."""

import os
import signal
import subprocess
import sys

import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.core.lock import lock_path, measuring

HOLDER = """
import time
from dyncomp.core.lock import measuring
with measuring("bench ledger"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def own_lock(tmp_path, monkeypatch):
    """Not the lock of this machine's user."""
    monkeypatch.setenv("DYNCOMP_LOCK", str(tmp_path / "lock"))
    assert lock_path() == tmp_path / "lock"


def test_second_holder_is_refused_until_the_first_is_done():
    with measuring("evidence jei_dnn, seed 0"):
        with pytest.raises(DyncompError, match=r"evidence jei_dnn, seed 0 \(process \d+\).*bench"):
            with measuring("bench overhead"):
                pytest.fail("both held the lock")
    with measuring("bench overhead"):
        assert lock_path().read_text() == f"bench overhead (process {os.getpid()})"


def test_an_error_while_measuring_frees_the_lock():
    with pytest.raises(KeyError), measuring("a"):
        raise KeyError
    with measuring("b"):
        assert lock_path().read_text() == f"b (process {os.getpid()})"


def test_a_killed_process_holds_nothing():
    child = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    with pytest.raises(DyncompError, match=rf"bench ledger \(process {child.pid}\)"):
        with measuring("run"):
            pytest.fail("both held the lock")
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    with measuring("run"):
        assert lock_path().read_text() == f"run (process {os.getpid()})"
