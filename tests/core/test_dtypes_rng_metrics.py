"""Small ground-floor parts: the dtype policy, random keys, mergeable means."""

import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dyncomp.core import rng
from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.metrics import Mean


def test_item_sizes():
    assert (DTypes().param_itemsize, DTypes().compute_itemsize) == (4, 4)
    assert DTypes(compute="bfloat16").compute_itemsize == 2
    assert DTypes(param="float64").param_itemsize == 8


@pytest.mark.parametrize("field", ["param", "compute", "accum"])
@pytest.mark.parametrize("name", ["bf16", "int8", "float8_e4m3fn", ""])
def test_unknown_dtypes_are_refused_by_field(field, name):
    """Values from a config arrive unchecked; the message names field and fix."""
    policy = object.__new__(DTypes)
    for other in ("param", "compute", "accum"):
        object.__setattr__(policy, other, name if other == field else "float32")
    with pytest.raises(DyncompError, match=f"DTypes.{field}={name!r}.*'bfloat16'"):
        policy.__post_init__()


def crc32(text):
    """The definition, bit by bit (reflected polynomial 0xEDB88320)."""
    crc = 0xFFFFFFFF
    for byte in text.encode():
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0xEDB88320 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


NAMES = ("router", "dropout", "params", "")
PROGRAM = """
import jax
from dyncomp.core.rng import fold
for name in {names!r}:
    print(*jax.random.key_data(fold({seed}, {step}, name)).tolist())
"""


def test_keys_are_the_same_in_every_process():
    """Against the definition here, and against a fresh process with its own hash seed."""
    seed, step = 7, 123_456
    here = []
    for name in NAMES:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), crc32(name))
        here.append(jax.random.key_data(key).tolist())
        assert jax.random.key_data(rng.fold(seed, step, name)).tolist() == here[-1]
    program = PROGRAM.format(names=NAMES, seed=seed, step=step)
    env = {**os.environ, "PYTHONHASHSEED": "1"}
    run = [sys.executable, "-c", program]
    out = subprocess.run(run, env=env, capture_output=True, text=True, check=True).stdout
    assert [[int(n) for n in line.split()] for line in out.splitlines()] == here


def test_keys_differ_and_do_not_depend_on_tracing():
    keys = {
        (seed, step, name): tuple(jax.random.key_data(rng.fold(seed, step, name)).tolist())
        for seed in range(3)
        for step in range(3)
        for name in NAMES
    }
    assert len(set(keys.values())) == len(keys)
    traced = jax.jit(lambda seed, step: jax.random.key_data(rng.fold(seed, step, "router")))
    for seed, step in [(0, 0), (2, 1)]:
        data = traced(jnp.int32(seed), jnp.int32(step))
        assert tuple(data.tolist()) == keys[seed, step, "router"]
    streams = rng.streams(2, 1)
    assert sorted(streams) == ["dropout", "router"]
    for name, key in streams.items():
        assert tuple(jax.random.key_data(key).tolist()) == keys[2, 1, name]


values = st.lists(st.tuples(st.integers(-1000, 1000), st.integers(0, 3)), min_size=1, max_size=12)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(values, st.integers(0, 12))
def test_means_merge_to_the_mean_of_all(drawn, cut):
    """Integers are exact in float32, so every split gives the very same sums; weight 0 counts nowhere."""
    x, w = (np.asarray(column, np.float32) for column in zip(*drawn, strict=True))
    whole = Mean.of(jnp.asarray(x), jnp.asarray(w))
    parts = [Mean.of(jnp.asarray(x[s]), jnp.asarray(w[s])) for s in (slice(cut), slice(cut, None))]
    for merged in (parts[0].merge(parts[1]), parts[1].merge(parts[0])):
        assert float(merged.total) == float(whole.total) == sum(a * b for a, b in drawn)
        assert float(merged.count) == float(whole.count) == sum(b for _, b in drawn)
    if whole.count:
        assert whole.value() == pytest.approx(np.average(x, weights=w), rel=1e-6)
    else:
        assert math.isnan(whole.value())


def test_uneven_parts_are_not_a_mean_of_means():
    merged = Mean.of(jnp.asarray([1.0])).merge(Mean.of(jnp.asarray([4.0, 4.0, 4.0])))
    assert merged.value() == 13 / 4
    assert Mean.of(jnp.ones((2, 3)), jnp.asarray([[1.0, 0.0, 1.0]])).count == 4  # weights broadcast


def test_totals_past_float32_add_up_in_float64_on_the_host():
    """2^24 + 1 does not exist in float32; a fetched mean is a pair of numpy numbers."""
    total = Mean(np.asarray(2.0**24), np.asarray(2.0**24))
    assert float(total.merge(Mean(np.asarray(1.0), np.asarray(1.0))).total) == 2**24 + 1
