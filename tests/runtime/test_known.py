"""What is known when a network is built: decisions that fold, values that nobody wants, executors without gradients."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.runtime import (
    END,
    Graph,
    HostExecutor,
    MaskedExecutor,
    Segment,
    Segmented,
    StreamExecutor,
    Traced,
    resolve,
    save_segments,
)
from dyncomp.runtime.everyone import Everyone
from dyncomp.runtime.liveness import find_liveness, live_after

from .programs import WIDTH, network, random_parts, walk

ROOT = Path(__file__).resolve().parents[2]
INPUTS = np.random.default_rng(5).normal(size=(6, WIDTH)).astype(np.float32)


def chain(count=4, width=64):
    """x = tanh(x w), an exit after each but the last that reads x v."""

    def run(weights, x, threshold):
        y = jnp.tanh(jnp.dot(x, weights["w"]))
        score = jnp.dot(y, weights["v"])[:, 0]
        return y, y, score > threshold, score

    draw = lambda n, *shape: np.random.default_rng(n).normal(size=shape).astype(np.float32) / 8
    own = [{"w": draw(n, width, width), "v": draw(n, width, 1)} for n in range(count)]
    parts = [Segment(run, weights, Cost(10**n), f"s{n}") for n, weights in enumerate(own)]
    return Segmented(lambda _, x: x, None, parts, [0.0] * count), own


def compiled_cost(fn, *args):
    found = jax.jit(fn).lower(*args).compile().cost_analysis()
    return {name: found[name] for name in ("flops", "transcendentals", "bytes accessed")}


def test_a_network_whose_decisions_are_known_is_the_program_one_would_write():
    net, own = chain()
    x = jnp.ones((32, 64))

    def by_hand(weights, x):
        for one in weights:
            x = jnp.tanh(jnp.dot(x, one["w"]))
        return x

    for leave, kept in ((None, 4), (1, 2)):
        routes = {f"s{n}": int(n == leave) for n in range(3 if leave is None else leave + 1)}
        known = resolve(net, routes)
        (segment,) = known.segments
        assert segment.name == "+".join(f"s{n}" for n in range(kept))
        assert segment.cost.flops == (10**kept - 1) // 9
        traced = Traced(known)
        output = lambda weights, x, traced=traced: traced(weights, x, jnp.zeros(1)).output
        ours = compiled_cost(output, traced.weights, x)
        assert ours == compiled_cost(by_hand, own[:kept], x)
        assert ours["flops"] >= kept * 2 * 32 * 64 * 64
        again = HostExecutor(known, x, capacity=32, buckets=(32,))
        np.testing.assert_allclose(again(x).outputs, by_hand(own[:kept], x), rtol=1e-6, atol=1e-6)
        assert again.compilations == 1


def test_known_decisions_among_open_ones_change_nothing_else():
    """s1 always goes to s3: what the examples do is what they do where that decision always comes out so."""
    parts = random_parts(np.random.default_rng(3), segments=4, loops=False)
    parts[0].targets, parts[1].targets = ("s1", "s2"), ("s2", "s3")
    parts[2].targets, parts[3].targets = ("s3", END), (END,)
    known = resolve(network(parts), {"s1": 1})
    assert [segment.name for segment in known.segments] == ["s0", "s1", "s2", "s3"]
    parts[1].targets = ("s3",)
    outputs, exits, visits, nearest = walk(parts, INPUTS)
    found = MaskedExecutor(known)(INPUTS)
    assert nearest > 1e-5 and len(set(visits[:, 1])) == 2
    np.testing.assert_array_equal(found.visits, visits)
    np.testing.assert_allclose(found.outputs, outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "routes, told",
    [
        ({"s9": 0}, "no segment 's9'"),
        ({"s0": 2}, "'s0' has 2 targets: route 2"),
        ({"s2": 0}, "leads back, always"),
    ],
)
def test_wrong_routes_are_refused(routes, told):
    net, _ = chain(3, 4)
    loop = Segment(net.segments[2].run, net.segments[2].weights, Cost(0), "s2", ("s1", END), 2)
    net = Segmented(net.begin, None, [*net.segments[:2], loop], [0.0] * 3)
    with pytest.raises(DyncompError, match=told):
        resolve(net, routes)


def enumerated(targets, reads, writes, length=6):
    """Live values after each segment, from all paths of up to some length."""
    found = []
    for index in range(len(targets)):
        live, paths = set(), [(index,)]
        for _ in range(length):
            longer = []
            for path in paths:
                for target in targets[path[-1]]:
                    if target < len(targets):
                        own = reads[target] - set().union(*(writes[n] for n in path[1:]), set())
                        live |= own
                        longer.append((*path, target))
            paths = longer
        found.append(frozenset(live))
    return found


def test_liveness_is_what_all_paths_read_before_they_write():
    rng = np.random.default_rng(0)
    subset = lambda: frozenset(np.flatnonzero(rng.random(5) < 0.4).tolist())
    for _, loops in itertools.product(range(12), (False, True)):
        parts = random_parts(rng, segments=4, loops=loops)
        targets = Graph.of(network(parts)).targets
        reads, writes = [subset() for _ in parts], [subset() for _ in parts]
        assert live_after(targets, reads, writes) == enumerated(targets, reads, writes)


def relay():
    """Three values: a is read by s1 alone, b by s2 alone and written by s1, c by nobody."""

    def first(weights, carry, threshold):
        score = carry["a"][:, 0]
        return carry, carry["a"], score > threshold, score

    def second(weights, carry, threshold):
        carry = {**carry, "b": 2 * carry["a"], "c": carry["c"] + 1}
        return carry, carry["b"], carry["b"][:, 0] > threshold, carry["b"][:, 0]

    def third(weights, carry, threshold):
        return carry, carry["b"] + 1, carry["b"][:, 0] > 0, carry["b"][:, 0]

    begin = lambda _, x: {"a": x, "b": x * jnp.nan, "c": jnp.concatenate([x, x], axis=1)}
    runs = (first, second, third)
    parts = [Segment(run, None, name=f"s{n}") for n, run in enumerate(runs)]
    return Segmented(begin, None, parts, [0.3, -0.8])


def test_what_nobody_reads_is_not_moved_and_what_is_there_does_not_matter():
    net = relay()
    carry = jax.eval_shape(net.begin, None, jax.ShapeDtypeStruct((1, WIDTH), np.float32))
    found = find_liveness(net, Graph.of(net), carry)
    a, b, c = range(3)
    assert found.gathered == (frozenset(), {a, c}, {b}) and found.written == ({a, c}, {b}, set())
    host = HostExecutor(net, INPUTS, capacity=6, buckets=(6,))
    assert host.moved.tolist() == [[0, 4 * 3 * WIDTH], [4 * 3 * WIDTH, 4 * WIDTH], [4 * WIDTH, 0]]
    whole = HostExecutor(net, INPUTS, capacity=6, buckets=(6,), liveness=False)
    assert whole.moved.tolist() == [[0, 16 * WIDTH], [16 * WIDTH, 16 * WIDTH], [16 * WIDTH, 0]]
    wanted = MaskedExecutor(net)(INPUTS)
    host._programs._buffer[b] = jnp.full_like(host._programs._buffer[b], np.nan)
    for run in (host, whole, host):  # what an earlier batch left behind does not matter either
        ran = run(INPUTS)
        np.testing.assert_allclose(ran.outputs, wanted.outputs, rtol=1e-6)
        np.testing.assert_array_equal(ran.exits, wanted.exits)
    assert len(set(wanted.exits.tolist())) > 1


def test_executors_that_the_host_drives_refuse_to_be_differentiated():
    net, own = chain(2, 4)
    x = np.ones((2, 4), np.float32)
    host, stream = HostExecutor(net, x, capacity=2), StreamExecutor(net, x, bucket=1)

    def built(weights):
        parts = [Segment(p.run, w) for p, w in zip(net.segments, weights, strict=True)]
        return HostExecutor(Segmented(net.begin, None, parts, net.thresholds), x, capacity=2)

    for call, at in ((lambda x: host(x).outputs, x), (stream.submit, x), (built, own)):
        with pytest.raises(DyncompError, match="use Traced"):
            jax.grad(lambda at, call=call: jnp.sum(call(at)))(at)


def test_segments_that_do_the_same_are_one_program_and_constants_are_part_of_it():
    net, own = chain(5)
    x = np.random.default_rng(7).normal(size=(4, 64)).astype(np.float32)
    host = HostExecutor(net, x, capacity=4, buckets=(2, 4)).warm_up()
    assert host.compilations == 3 * 2  # the first, those between, the last

    def closed(weights):
        """Weights that the compiler sees as constants."""
        run = net.segments[0].run
        return Segment(lambda _, x, threshold: run(weights, x, threshold), None, Cost(1), "")

    parts = [dataclasses.replace(closed(one), name=f"c{n}") for n, one in enumerate(own)]
    fixed = Segmented(net.begin, None, parts, net.thresholds)
    apart = HostExecutor(fixed, x, capacity=4, buckets=(2, 4)).warm_up()
    assert apart.compilations == 5 * 2
    wanted = MaskedExecutor(net)(x)
    for run in (host, apart):
        found = run(x)
        np.testing.assert_array_equal(found.exits, wanted.exits)
        np.testing.assert_allclose(found.outputs, wanted.outputs, rtol=1e-5, atol=1e-6)
    assert len(set(wanted.exits.tolist())) > 1


def test_speculation_runs_at_most_one_segment_in_vain_an_exit_and_an_empty_set_launches_nothing():
    net, _ = chain(4, 6)
    net.thresholds[:] = [np.inf, -np.inf, 0.0, 0.0]  # all leave at the second
    for ahead, rows in ((False, [1, 1, 0, 0]), (True, [1, 1, 1, 0])):
        host = HostExecutor(net, INPUTS, capacity=2, speculate=ahead)
        ran = host(INPUTS[:1])
        assert ran.executed.tolist() == rows and ran.visits.tolist() == [[1, 1, 0, 0]]
        assert host.compilations == 2  # the first segment, and one program for all that follow


def test_speculates_by_itself_once_nobody_leaves():
    net, _ = chain(3, 6)
    host = HostExecutor(net, INPUTS, capacity=6, buckets=(6,))
    host.thresholds[:] = [np.inf, -np.inf, 0.0]
    assert host(INPUTS).executed.tolist() == [6, 6, 0]  # nothing is known yet
    assert host(INPUTS).executed.tolist() == [
        6,
        6,
        0,
    ]  # ahead of the first decision, not of the second
    host.thresholds[1] = np.inf
    ran = [host(INPUTS).executed.tolist() for _ in range(12)]
    assert ran == [[6, 6, 6]] * 12
    host.thresholds[0] = -np.inf
    assert [host(INPUTS).executed.tolist() for _ in range(2)] == [[6, 6, 0], [6, 0, 0]]


def test_tuned_it_is_one_program_while_nobody_leaves(monkeypatch):
    net, _ = chain(4, 6)
    once, calls = Everyone.__call__, []
    monkeypatch.setattr(Everyone, "__call__", lambda *args: calls.append(1) or once(*args))
    host = HostExecutor(net, INPUTS, capacity=6).warm_up()
    programs, want = host.compilations, MaskedExecutor(net)
    assert host.tune(1) is host and host.compilations == programs + 1
    few, all_left, never = [np.inf, 0.0, np.inf, 0.0], [-np.inf] * 4, [np.inf] * 4
    for thresholds, rows, at_once in (
        (never, 6, False),  # nothing is known yet
        (never, 6, True),
        (never, 5, True),
        (few, 6, True),
        (all_left, 6, False),  # some left before
        (never, 2, False),
    ):
        host.thresholds[:] = want.thresholds[:] = thresholds
        before = len(calls)
        found, other = host(INPUTS[:rows]), want(INPUTS[:rows])
        np.testing.assert_allclose(found.outputs, other.outputs, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.scores, other.scores, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found.exits, other.exits)
        np.testing.assert_array_equal(found.visits, other.visits)
        # That segments ran six rows each tells nothing: sizes of launches follow measured times.
        assert (len(calls) > before) == at_once, (thresholds, rows)
        assert not at_once or found.executed.tolist() == [6] * 4
    assert host.compilations == programs + 1


def test_a_lone_example_is_one_program(tmp_path):
    net, _ = chain(4, 6)
    net.thresholds[:] = [np.inf, 0.0, np.inf, 0.0]
    alone, want = HostExecutor(net, INPUTS, capacity=1).warm_up(), MaskedExecutor(net)
    folder = save_segments(net, INPUTS, tmp_path / "net", capacity=1, buckets=(1,))
    for run in (alone, HostExecutor.load(folder).warm_up()):
        assert run.compilations == 1
        for row in range(len(INPUTS)):
            found, other = (call(INPUTS[row : row + 1]) for call in (run, want))
            np.testing.assert_allclose(found.outputs, other.outputs, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(found.exits, other.exits)
            np.testing.assert_array_equal(found.visits, other.visits)
            np.testing.assert_array_equal(found.executed, found.needed)
        run.thresholds[:] = -np.inf  # arguments, not constants
        assert run(INPUTS[:1]).exits.tolist() == [0] and run.compilations == 1


def test_a_stream_of_saved_segments_in_a_new_process(tmp_path):
    parts = random_parts(np.random.default_rng(2))
    net, slots = network(parts), StreamExecutor.slots(4, 4)
    want = MaskedExecutor(net)(INPUTS)
    folder = save_segments(net, INPUTS, tmp_path / "net", capacity=slots, buckets=(4,))
    np.savez(tmp_path / "want.npz", inputs=INPUTS, outputs=want.outputs, exits=want.exits)
    code = """
import sys
import numpy as np
from dyncomp.runtime import HostExecutor, StreamExecutor
folder, want = sys.argv[1], np.load(sys.argv[2])
stream = StreamExecutor.load(folder)
tickets = stream.submit(want["inputs"])
left = sorted(stream.drain(), key=lambda one: one.ticket)
outputs = np.stack([one.output for one in left])
host = HostExecutor.load(folder)
assert [one.ticket for one in left] == tickets and stream.bucket == 4
for found, exits in ((outputs, [one.exit for one in left]), (lambda r: (r.outputs, r.exits))(host(want["inputs"]))):
    np.testing.assert_allclose(found, want["outputs"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(exits, want["exits"])
assert (host.moved > 0).any()
"""
    args = [sys.executable, "-c", code, str(folder), str(tmp_path / "want.npz")]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    small = save_segments(net, INPUTS, tmp_path / "small", capacity=8, buckets=(4,))
    with pytest.raises(DyncompError, match=f"capacity={slots}"):
        StreamExecutor.load(small)
