"""The ledger: hand-counted totals, exact merging in any order and grouping, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dyncomp.core.aux import Count, add_counts, count
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost, Ledger, matmul_cost

COSTS = {"moe": {"router": {"rows": Cost(7, 3)}, "experts": {"rows": Cost(100, 11)}}}
MOST = 2**31 - 1
small = st.integers(0, MOST)


def events(router, needed, executed):
    """Two events; each argument is anything that makes an int32 array, fetched from the device."""
    router, needed, executed = (np.asarray(x, np.int32) for x in (router, needed, executed))
    experts = np.broadcast_arrays(needed, executed)
    return {
        "moe": {"router": {"rows": Count(router, router)}, "experts": {"rows": Count(*experts)}}
    }


def totals(ledger):
    """What two equal ledgers share."""
    return [(row["event"], row["needed"], row["executed"]) for row in ledger.rows()]


def test_prices():
    assert Cost(2, 3) + Cost(10, 20) == Cost(12, 23)
    assert Cost(2, 3) * 5 == 5 * Cost(2, 3) == Cost(10, 15)
    # [3, 4] x [4, 5]: 15 results of 4 multiply-adds; 12 + 20 + 15 numbers of 2 bytes
    assert matmul_cost(3, 4, 5, itemsize=2) == Cost(2 * 15 * 4, 47 * 2)


def test_totals_by_hand():
    """Two steps of two layers: counts with a layer axis, with a batch axis, and scalars."""
    ledger = Ledger(COSTS)
    ledger.record(events([4, 4], [[1, 2], [3, 0]], [[2, 2], [4, 4]]))
    ledger.record(events(4, 5, 8))
    assert ledger.events("needed", under="router") == 12
    assert ledger.events("needed", under="experts") == 11
    assert ledger.events("executed", under="experts") == 20
    assert ledger.total("needed") == 12 * 7 + 11 * 100
    assert ledger.total("executed") == 12 * 7 + 20 * 100
    assert ledger.total("needed", unit="bytes") == 12 * 3 + 11 * 11
    assert ledger.total("executed", unit="bytes", under="experts") == 20 * 11
    rows = list(ledger.rows())
    assert [row["event"] for row in rows] == ["moe/experts/rows", "moe/router/rows"]
    assert rows[0] == {
        "event": "moe/experts/rows",
        "needed": 11,
        "executed": 20,
        "flops_each": 100,
        "bytes_each": 11,
        "flops_needed": 1100,
        "flops_executed": 2000,
    }


def test_events_that_never_happened_count_as_zero():
    assert Ledger(COSTS).total() == 0 and len(list(Ledger(COSTS).rows())) == 2


def test_totals_beyond_64_bits():
    """Sums of int32 counts pass 2^31 and FLOPs pass 2^63: nothing wraps, nothing rounds."""
    price = 3 * 10**15 + 1
    ledger = Ledger({"rows": Cost(price, 2**40 + 1)})
    for _ in range(3):
        ledger.record({"rows": count(jnp.full((5, 4), MOST, jnp.int32))})
    assert ledger.events() == 60 * MOST
    assert ledger.total() == 60 * MOST * price > 2**63
    assert ledger.total(unit="bytes") == 60 * MOST * (2**40 + 1)
    assert isinstance(ledger.total(), int)


steps = st.lists(st.tuples(small, small, small), min_size=1, max_size=8)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(steps, st.data())
def test_merging_is_exact_in_any_grouping_and_order(drawn, data):
    """Steps over hosts: whole = split over ledgers, merged left to right, right to left, and shuffled."""
    trees = [events(*step) for step in drawn]
    whole = functools.reduce(Ledger.record, trees, Ledger(COSTS))
    parts = [Ledger(COSTS).record(tree) for tree in trees]
    left = functools.reduce(lambda a, b: a + b, parts)
    right = functools.reduce(lambda a, b: b + a, reversed(parts))
    shuffled = functools.reduce(lambda a, b: a + b, data.draw(st.permutations(parts)))
    cut = data.draw(st.integers(0, len(trees)))
    hosts = [
        functools.reduce(Ledger.record, part, Ledger(COSTS)) for part in (trees[:cut], trees[cut:])
    ]
    expected = sum(7 * r + 100 * n for r, n, _ in drawn)
    for ledger in (whole, left, right, shuffled, hosts[0] + hosts[1]):
        assert totals(ledger) == totals(whole) and ledger.total() == expected


def test_merging_leaves_its_parts_alone_and_takes_other_events_in():
    a = Ledger({"x": Cost(2)}).record({"x": count(3)})
    b = Ledger({"y": Cost(5), "x": Cost(2)}).record({"y": count(1, 4)})
    merged = a + b
    merged.record({"x": count(10)})
    assert merged.total() == 13 * 2 + 5 and merged.total("executed") == 13 * 2 + 20
    assert (a.total(), b.total()) == (6, 5)


def test_counts_over_devices():
    """One global array over four devices, as a step under a mesh returns it, and the sum over micro-batches."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    spread = NamedSharding(mesh, PartitionSpec("data"))
    needed = jax.device_put(jnp.arange(8, dtype=jnp.int32), spread)
    tree = {"rows": Count(needed, jax.device_put(jnp.full(8, 9, jnp.int32), spread))}
    assert len(needed.addressable_shards) == 4
    ledger = Ledger({"rows": Cost(2)}).record(tree).record(add_counts(tree, tree))
    assert ledger.total() == 2 * 3 * 28 and ledger.total("executed") == 2 * 3 * 72


def test_an_event_without_a_price_is_refused():
    with pytest.raises(DyncompError, match=r"'moe/experts/columns' has no cost.*cost\(\)"):
        Ledger(COSTS).record({"moe": {"experts": {"columns": count(1)}}})


def test_two_prices_are_refused():
    with pytest.raises(DyncompError, match="'x' has two prices"):
        Ledger({"x": Cost(1)}) + Ledger({"x": Cost(1, 8)})
