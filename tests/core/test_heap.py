"""Freed memory is kept: the second use of a large block costs no page faults."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import numpy as np
from dyncomp.core.heap import keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "keep" else False
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(2**24)
before = faults()
for _ in range(5):
    np.ones(2**24)  # 128 MiB
print(int(kept), faults() - before)
"""


def run(word):
    done = subprocess.run([sys.executable, "-c", SCRIPT, word], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return map(int, done.stdout.split())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_large_blocks_are_used_again():
    kept, few = run("keep")
    _, many = run("leave")
    if not kept:
        pytest.skip("not glibc")
    assert few < 100 and many > 10 * max(few, 1), (few, many)
