"""Order, slices, resumption and shutdown of the loader."""

import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dyncomp.core.errors import DyncompError
from dyncomp.tasks import Loader
from dyncomp.tasks.base import ArraySource
from dyncomp.tasks.loader import sequential


def source(count):
    return ArraySource({"inputs": np.arange(count), "targets": np.arange(count) * 2})


def seen(batches):
    return [batch["inputs"].tolist() for batch in batches]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60), st.data())
def test_every_epoch_visits_each_example_once(count, data):
    size = data.draw(st.integers(1, count))
    loader = Loader(source(count), seed=data.draw(st.integers(0, 2**40)), batch_size=size)
    stream = np.concatenate([loader.indices(step) for step in range(3 * count)])
    for epoch in stream[: len(stream) // count * count].reshape(-1, count):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(count))


def test_orders_differ_by_epoch_and_by_seed():
    orders = [
        tuple(Loader(source(50), seed=seed, batch_size=50).indices(epoch))
        for seed in (0, 1, 2)
        for epoch in (0, 1, 2)
    ]
    assert len(set(orders)) == 9
    assert tuple(range(50)) not in orders


def test_shuffles_are_uniform_enough():
    """Over many epochs each example is first about equally often (chi-square, 9 degrees of freedom)."""
    first = [int(Loader(source(10), seed=7, batch_size=1).indices(10 * e)[0]) for e in range(2000)]
    expected = 200
    chi = sum((first.count(i) - expected) ** 2 / expected for i in range(10))
    assert chi < 27.9  # p = 0.001


def test_unshuffled_order():
    loader = Loader(source(5), seed=0, batch_size=2, shuffle=False)
    assert seen(loader.iterate(0, 4)) == [[0, 1], [2, 3], [4, 0], [1, 2]]


@pytest.mark.parametrize("workers", [1, 3])
def test_starting_late_equals_skipping(workers):
    loader = Loader(source(37), seed=3, batch_size=8, workers=workers)
    whole = seen(loader.iterate(0, 20))
    assert seen(loader.iterate(13, 20)) == whole[13:]
    assert seen([loader.batch(step) for step in range(20)]) == whole
    assert seen(Loader(source(37), seed=3, batch_size=8).iterate(13, 20)) == whole[13:]
    assert list(loader.iterate(5, 5)) == []


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_rows_of_all_processes_make_the_global_batch(processes):
    """Not contiguous, as on a mesh whose devices are reordered."""
    whole = Loader(source(30), seed=1, batch_size=12)
    rows = [np.arange(i, 12, processes) for i in range(processes)]
    parts = [Loader(source(30), seed=1, batch_size=12, rows=mine) for mine in rows]
    for step in range(6):
        joined = np.empty(12, np.int64)
        for mine, part in zip(rows, parts, strict=True):
            joined[mine] = part.indices(step)
        np.testing.assert_array_equal(joined, whole.indices(step))


@pytest.mark.parametrize("count, size", [(10, 4), (8, 4), (3, 5)])
def test_sequential_is_complete_and_padded(count, size):
    batches = list(sequential(source(count), size))
    assert {len(batch["inputs"]) for batch in batches} == {size}
    real = np.concatenate([batch["inputs"][batch["mask"] == 1] for batch in batches])
    np.testing.assert_array_equal(real, np.arange(count))
    assert sum(batch["mask"].sum() for batch in batches) == count
    assert len(list(sequential(source(count), size, limit=1))) == 1


def test_an_error_while_reading_reaches_the_caller():
    class Broken(ArraySource):
        def batch(self, indices):
            raise DyncompError("the disk is gone")

    batches = Loader(Broken({"inputs": np.arange(4)}), seed=0, batch_size=2).iterate(0, 3)
    with pytest.raises(DyncompError, match="the disk is gone"):
        next(batches)


def test_abandoned_iterators_do_not_hold_up_the_interpreter():
    code = (
        "import numpy as np\n"
        "from dyncomp.tasks.base import ArraySource\n"
        "from dyncomp.tasks.loader import Loader\n"
        "source = ArraySource({'inputs': np.arange(1000)})\n"
        "held = [Loader(source, seed=s, batch_size=4, workers=2).iterate(0, 10**6) for s in range(3)]\n"
        "print([next(batches)['inputs'].shape for batches in held])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == str([(4,)] * 3), done.stderr


def test_finished_iterators_leave_no_thread():
    loader = Loader(source(100), seed=0, batch_size=4)
    before = threading.active_count()
    for _ in range(5):
        assert len(list(loader.iterate(0, 10))) == 10
    assert threading.active_count() <= before + 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 11}, r"batch_size=11 of 10 examples: use 1\.\.10"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 4, "seed": -1}, "seed=-1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(DyncompError, match=message):
        Loader(source(10), **{"seed": 0, **options})


def test_empty_split():
    with pytest.raises(DyncompError, match="no example"):
        Loader(source(0), seed=0, batch_size=1)
