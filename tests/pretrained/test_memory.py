"""Peak memory while loading, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dyncomp import pretrained

LIMIT = 1.15
CONFIG = {
    **{"model_type": "llama", "vocab_size": 24576, "hidden_size": 1024, "intermediate_size": 4096},
    **{"num_hidden_layers": 3, "num_attention_heads": 8, "max_position_embeddings": 64},
}
SMALL = {**CONFIG, "vocab_size": 16, "hidden_size": 32, "intermediate_size": 48}
MEASURE = """
import json, sys
import jax
from dyncomp import pretrained

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024

small, large, dtype = sys.argv[1:]
jax.block_until_ready(pretrained.load(small, dtype=dtype).variables)  # code and tracing, once
before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew
loaded = pretrained.load(large, dtype=dtype)
size = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.variables))
print(json.dumps({"weights": size, "peak": status("VmHWM") - before, "rest": status("VmRSS") - before}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's counters")
@pytest.mark.parametrize(("stored", "dtype"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_peak_memory(random_checkpoint, tmp_path, stored, dtype):
    """From files twice and half as large as the result: at most 1.15 times the result is ever resident.

    The largest leaf is 25% of this model, so a second copy of it would show, and so would its pages of the file.
    """
    small = random_checkpoint(tmp_path / "small", SMALL)
    large = random_checkpoint(tmp_path / "large", CONFIG, dtype=stored)
    found = bounded(small, large, dtype)
    assert found["weights"] > 180e6


@pytest.mark.peers
@pytest.mark.skipif(not pretrained.smollm2(), reason="DYNCOMP_SMOLLM2 is not set")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_of_smollm2(random_checkpoint, tmp_path, dtype):
    pretrained.load(pretrained.smollm2())  # dequantised once, into the cache folder
    bounded(random_checkpoint(tmp_path / "small", SMALL), pretrained.smollm2(), dtype)


def bounded(small, large, dtype):
    """What was measured, within the limit."""
    command = [sys.executable, "-c", MEASURE, str(small), str(large), dtype]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["rest"] > 0.9 * found["weights"]  # or nothing was measured
    assert found["peak"] <= LIMIT * found["weights"], found
    return found
