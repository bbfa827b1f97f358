"""Random control graphs: every executor does what a walk of one example after the other does."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.runtime import (
    END,
    CompactExecutor,
    HostExecutor,
    LaxExecutor,
    MaskedExecutor,
    Segment,
    Segmented,
    StreamExecutor,
    Traced,
    load_segments,
    per_example,
    save_segments,
)
from dyncomp.runtime.flat import flatten
from dyncomp.runtime.per_example import refuse_branches

from .programs import WIDTH, network, random_parts, walk

BUCKETS = (1, 8, 64, 257)
EXECUTORS = {
    "masked": lambda net, inputs: MaskedExecutor(net),
    "lax": lambda net, inputs: LaxExecutor(net),
    "compact": lambda net, inputs: CompactExecutor(net, (1, 4)),
    "host": lambda net, inputs: HostExecutor(net, inputs, capacity=257, buckets=BUCKETS),
    "ahead": lambda net, inputs: HostExecutor(
        net, inputs, capacity=257, buckets=BUCKETS, speculate=True
    ),
}


def drawn(seed, batch, loops):
    """Parts and inputs whose scores all keep away from their thresholds: there, rounding decides nothing."""
    rng = np.random.default_rng(seed)
    parts = random_parts(rng, loops=loops)
    inputs = rng.normal(size=(8 * batch, WIDTH)).astype(np.float32)
    clear = [row for row in inputs if walk(parts, row[None])[3] > 1e-4]
    return parts, np.stack(clear[:batch])


@pytest.mark.parametrize("how", EXECUTORS)
@pytest.mark.parametrize(
    "seed, batch, loops", [(0, 1, True), (1, 7, True), (2, 257, True), (3, 33, False)]
)
def test_random_graphs_agree_with_a_walk_of_single_examples(how, seed, batch, loops):
    parts, inputs = drawn(seed, batch, loops)
    outputs, exits, visits, _ = walk(parts, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = EXECUTORS[how](network(parts), inputs)(inputs)
    np.testing.assert_array_equal(found.exits, exits)
    np.testing.assert_array_equal(found.visits, visits)
    np.testing.assert_allclose(found.outputs, outputs, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.needed, visits.sum(0))
    assert found.ledger.total("needed") == (visits.sum(0) * np.arange(1, 5)).sum()
    assert (found.executed >= found.needed).all()
    if how == "host":
        assert (found.executed[visits.sum(0) == 0] == 0).all()
    if how == "lax" and batch == 1:
        np.testing.assert_array_equal(found.executed, found.needed)


@pytest.mark.parametrize("seed", range(2))
def test_a_stream_gives_what_batches_give_and_runs_full_buckets(seed):
    parts, inputs = drawn(10 + seed, 40, loops=True)
    outputs, exits, visits, _ = walk(parts, inputs)
    stream = StreamExecutor(network(parts), inputs, bucket=8).warm_up()
    programs, found = stream.compilations, []
    for start in range(0, len(inputs), 5):
        stream.submit(inputs[start : start + 5])
        found += stream.step()
    assert stream.executed.sum() % 8 == 0 and (stream.executed == stream.needed).all()
    found += stream.drain()
    assert stream.compilations == programs and not stream.pending
    assert sorted(one.ticket for one in found) == list(range(len(inputs)))
    for one in found:
        assert one.exit == exits[one.ticket] and one.waited >= 0
        np.testing.assert_allclose(one.output, outputs[one.ticket], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(stream.needed, visits.sum(0))


def test_nobody_waits_longer_than_told():
    """Over all depths together, whatever a launch takes (one step of the clock, another to read it)."""
    run = lambda weights, x, threshold: (x, x, x > threshold, x)
    net = Segmented(lambda _, x: x, None, [Segment(run, None)] * 3, [4.0, 2.0])
    inputs, now, tick = np.asarray([1.0, 3.0, 5.0, 1.0], np.float32), [0.0], 0.125
    stream = StreamExecutor(net, inputs, bucket=16, max_wait=1.0, clock=lambda: now[0])
    stream.submit(inputs)
    assert stream.step() == [] and stream.executed.sum() == 0
    found = []
    for _ in range(40):
        now[0] += tick
        found += stream.step()
    assert {one.ticket: one.exit for one in found} == {0: 2, 1: 1, 2: 0, 3: 2}
    for one in found:
        # Late one tick after max_wait; each launch then takes a tick, and the next starts a tick later.
        assert 1.0 < one.waited <= 1.0 + tick + 2 * tick * (one.exit + 1)
    assert stream.executed.tolist() == [4, 4, 2]


def test_time_in_launches_is_no_waiting():
    """A launch that takes longer than max_wait makes nobody late."""
    run = lambda weights, x, threshold: (x, x, x > threshold, x)
    net = Segmented(lambda _, x: x, None, [Segment(run, None)] * 2, [2.0])
    inputs, now = np.asarray([1.0, 3.0], np.float32), [0.0]
    stream = StreamExecutor(net, inputs, bucket=2, max_wait=1.0, clock=lambda: now[0])
    stream.submit(inputs)
    assert stream.step() == [] and stream.executed.tolist() == [2, 0]
    now[0] = 9.0
    assert [one.ticket for one in stream.step()] == [1]
    assert stream.step() == [] and stream.executed.tolist() == [2, 0]
    now[0] = 10.125
    assert stream.step() == [] and stream.executed.tolist() == [2, 1]


def test_gradients_through_masked_and_bounded_branches_agree_and_open_loops_have_none():
    parts, inputs = drawn(1, 7, loops=True)
    net = network(parts)
    thresholds = jnp.zeros(len(parts))

    def gradients(traced):
        loss = lambda weights: jnp.sum(traced(weights, jnp.asarray(inputs), thresholds).output ** 2)
        return jax.tree.leaves(jax.jit(jax.grad(loss))(traced.weights))

    masked = gradients(Traced(net))
    for how in ("lax", "compact"):
        for ours, want in zip(gradients(Traced(net, how, (2,), bounded=True)), masked, strict=True):
            np.testing.assert_allclose(ours, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(DyncompError, match="set bounded=True"):
        gradients(Traced(net, "lax"))


def test_order_of_examples_permutes_outputs_and_a_second_run_compiles_nothing():
    parts, inputs = drawn(2, 33, loops=True)
    host = HostExecutor(network(parts), inputs, capacity=40, buckets=(1, 8, 40)).warm_up()
    programs, first = host.compilations, host(inputs)
    assert programs == len(parts) * 3
    order = np.random.default_rng(0).permutation(len(inputs))
    again = host(inputs[order])
    np.testing.assert_allclose(again.outputs, first.outputs[order], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(again.exits, first.exits[order])
    for batch in (1, 2, 9, 33):
        host(inputs[:batch])
    assert host.compilations == programs


def test_a_score_that_is_no_number_never_leaves_and_is_told():
    def run(weights, carry, threshold):
        return carry, carry, carry >= threshold, carry

    net = Segmented(lambda _, x: x, None, [Segment(run, None)] * 3, [0.5, 0.5])
    inputs = np.asarray([np.nan, 1.0, 0.5, 0.4], np.float32)
    for make in EXECUTORS.values():
        with pytest.warns(RuntimeWarning, match="1 of 4 examples"):
            found = make(net, inputs)(inputs)
        np.testing.assert_array_equal(found.exits, [2, 0, 0, 2])  # a tie leaves
    stream = StreamExecutor(net, inputs, bucket=4)
    stream.submit(inputs)
    with pytest.warns(RuntimeWarning, match="1 of [42] examples"):  # at each of two segments
        left = stream.drain()
    assert {one.ticket: one.exit for one in left} == {0: 2, 1: 0, 2: 0, 3: 2}


@pytest.mark.parametrize(
    "wrong, told",
    [
        (np.ones((2, WIDTH + 1), np.float32), rf"float32\[2, {WIDTH + 1}\].*float32\[b, {WIDTH}\]"),
        (np.ones((2, WIDTH), np.int32), rf"int32\[2, {WIDTH}\].*made for float32"),
        (np.float32(1), r"float32\[\]"),
    ],
)
def test_inputs_of_another_shape_or_dtype_are_refused_and_leave_no_trace(wrong, told):
    parts, inputs = drawn(3, 3, loops=False)
    net, exits = network(parts), walk(parts, inputs)[1]
    host, stream = HostExecutor(net, inputs, capacity=4), StreamExecutor(net, inputs, bucket=2)
    for take in (host, stream.submit):
        with pytest.raises(DyncompError, match=told):
            take(wrong)
    assert stream.pending == 0 and stream.drain() == []
    again = inputs.astype(np.float64)  # as jax takes it, float32
    tickets = stream.submit(again)
    found = sorted(stream.drain(), key=lambda one: one.ticket)
    assert [one.ticket for one in found] == tickets
    np.testing.assert_array_equal([one.exit for one in found], exits)
    np.testing.assert_array_equal(host(again).exits, exits)


@pytest.mark.parametrize("how", [*EXECUTORS, "tuned", "stream"])
@pytest.mark.parametrize("bar, exit", [(-np.inf, 0), (np.inf, 2)])
def test_all_leave_first_or_nobody_before_the_end(how, bar, exit):
    def run(weights, x, threshold):
        return x + 1, 10 * x, x > threshold, x

    net = Segmented(lambda _, x: x, None, [Segment(run, None)] * 3, [bar, bar])
    inputs = np.arange(5, dtype=np.float32)
    if how == "stream":
        stream = StreamExecutor(net, inputs, bucket=2)
        stream.submit(inputs)
        left = sorted(stream.drain(), key=lambda one: one.ticket)
        exits, outputs = ([getattr(one, field) for one in left] for field in ("exit", "output"))
        needed = stream.needed
    else:
        tuned = lambda net, inputs: HostExecutor(net, inputs, capacity=5).tune(1)
        executor = {**EXECUTORS, "tuned": tuned}[how](net, inputs)
        for _ in range(2):  # the second time a host knows what examples did
            found = executor(inputs)
        exits, outputs, needed = found.exits, found.outputs, found.needed
    np.testing.assert_array_equal(exits, [exit] * 5)
    np.testing.assert_array_equal(outputs, 10 * (inputs + exit))
    np.testing.assert_array_equal(needed, [5] * (exit + 1) + [0] * (2 - exit))


def test_thresholds_are_set_checked():
    run = lambda weights, x, threshold: (x, x, x > threshold, x)
    net = Segmented(lambda _, x: x, None, [Segment(run, None)] * 3, [9.0, 9.0])
    inputs = np.asarray([1.0, 3.0], np.float32)
    stream = StreamExecutor(net, inputs, bucket=2)
    for one in (*(make(net, inputs) for make in EXECUTORS.values()), stream):
        for wrong in ([2.0], [2.0] * 4, 2.0, [[2.0] * 3]):
            with pytest.raises(DyncompError, match="3 segments with .* one threshold to each"):
                one.thresholds = wrong
        one.thresholds = [2.0, 0.0]  # the last may be left out, as in a network
        assert one.thresholds.tolist() == [2.0, 0.0, 0.0]
        if one is not stream:
            np.testing.assert_array_equal(one(inputs).exits, [1, 0])
    stream.submit(inputs)
    assert {one.ticket: one.exit for one in stream.drain()} == {0: 1, 1: 0}
    with pytest.raises(DyncompError, match=r"shape \(2,\): give one to each of 3"):
        Traced(net)(Traced(net).weights, inputs, jnp.zeros(2))


def test_what_a_segment_hands_on_unchanged_is_not_written():
    parts, inputs = drawn(3, 4, loops=False)
    flat = flatten(network(parts), inputs)
    shapes = flat.arguments(1, 2, 16)
    text = flat.program(1, 2).lower(*shapes).as_text()
    # The carry's leaves are "seed" (handed on) and "x": one is scattered.
    assert text.count('"stablehlo.scatter"') == 1


def test_saved_segments_run_without_the_network(tmp_path):
    parts, inputs = drawn(2, 33, loops=True)
    net = network(parts)
    want = MaskedExecutor(net)(inputs)
    folder = save_segments(net, inputs, tmp_path / "net", capacity=40, buckets=(1, 8, 40))
    del net
    host = HostExecutor.load(folder)
    found = host(inputs)
    np.testing.assert_array_equal(found.exits, want.exits)
    np.testing.assert_allclose(found.outputs, want.outputs, rtol=1e-5, atol=1e-6)
    assert found.ledger.total("needed") == want.ledger.total("needed")
    with pytest.raises(DyncompError, match="not empty"):
        save_segments(network(parts), inputs, folder, capacity=40, buckets=(1,))
    (folder / "segment_1_rows_8.bin").write_bytes(b"x")
    with pytest.raises(DyncompError, match=r"segment_1_rows_8\.bin is missing or damaged"):
        load_segments(folder)
    with pytest.raises(DyncompError, match="can't be read"):
        load_segments(tmp_path)


def test_branches_on_one_example_are_refused_under_vmap():
    def branching(weights, x, threshold):
        y = jax.lax.cond(x[0] > 0, lambda x: x @ weights, lambda x: x, x)
        return y, y, y[0] > threshold, y[0]

    def looping(weights, x, threshold):
        y = jax.lax.while_loop(
            lambda c: jnp.sum(c[0]) < 9, lambda c: (c[0] + c[1], c[1]), (x, x * x + 1)
        )
        return y[0], y[0], y[0][0] > threshold, y[0][0]

    def fixed(weights, x, threshold):
        count = jnp.sum(weights).astype(int)
        y = jax.lax.fori_loop(0, count, lambda _, x: jnp.tanh(x), x)  # as often for all
        y = jax.lax.cond(threshold > 0, lambda x: x, lambda x: x + 1, y)
        return y, y, y[0] > threshold, y[0]

    inputs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    weights = np.eye(3, dtype=np.float32)
    net = lambda run: Segmented(
        lambda _, x: x, None, [Segment(per_example(run), weights)] * 2, [0.2]
    )
    for run, name in ((branching, "lax.cond"), (looping, "lax.while_loop")):
        with pytest.raises(DyncompError, match=f"{run.__name__}: {name}.*under vmap"):
            MaskedExecutor(net(run))(inputs)
    found = HostExecutor(net(fixed), inputs, capacity=8)(inputs)
    np.testing.assert_array_equal(found.exits, MaskedExecutor(net(fixed))(inputs).exits)


def scanned(threshold, x):
    """The carry starts as a constant and is the example's from the second trip on."""
    step = lambda c, y: (x[0], jax.lax.cond(c > threshold, jnp.tanh, jnp.sin, y))
    return jax.lax.scan(step, 0.0, x)[1]


def trips(threshold, x):
    """The same as an open loop of as many trips for all, two trips behind."""
    count = jnp.where(threshold > 0, 3, 4)
    step = lambda n, c: (c[1], x[0], jax.lax.cond(c[0] > threshold, jnp.tanh, jnp.sin, c[2]))
    return jax.lax.fori_loop(0, count, step, (0.0, 0.0, x))[2]


def called(threshold, x):
    """Inside a jitted function, of whose two results one is the example's."""
    both = jax.jit(lambda x: (2.0, x[0]))(x)
    return jax.lax.cond(both[1] > threshold, jnp.tanh, jnp.sin, x)


@pytest.mark.parametrize("body", [scanned, trips, called])
def test_branches_on_what_becomes_the_examples_are_refused(body):
    with pytest.raises(DyncompError, match="lax.cond"):
        refuse_branches(lambda x: body(0.5, x), jnp.ones(3), where=body)


def nested(threshold, x):
    inner = lambda x: jax.lax.cond(threshold > 1, jnp.tanh, jnp.sin, x)
    return jax.lax.cond(threshold > 0, inner, jnp.cos, x)


def constant(threshold, x):
    """The example is carried and stacked beside what stays the same for all."""

    def step(carry, y):
        c, total = carry
        y = jax.lax.cond(c > threshold, jnp.tanh, jnp.sin, y)
        return (c + 1, total + y), y

    return jax.lax.scan(step, (0.0, x[0]), x)[1]


def one_result(threshold, x):
    both = jax.jit(lambda t, x: (2 * t, x[0]))(threshold, x)
    return jax.lax.cond(both[0] > 1, jnp.tanh, jnp.sin, x)


@pytest.mark.parametrize("body", [nested, constant, one_result])
def test_branches_that_are_the_same_for_all_examples_are_taken(body):
    refuse_branches(lambda x: body(jnp.ones(()).sum(), x), jnp.ones(3), where=body)


def test_the_decision_of_one_example_baked_in_is_wrong_for_others():
    """What tracing with an example does: the branch that it took is the program."""

    def network(x, leave):
        return x * 10.0 if leave else jnp.sin(x) * 7.0

    traced = jax.jit(
        functools.partial(network, leave=bool(1.0 > 0.5))
    )  # decided by the example 1.0
    assert float(traced(0.1)) != pytest.approx(float(network(0.1, 0.1 > 0.5)))
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.jit(lambda x: network(x, x > 0.5))(0.1)


def test_a_decision_that_nobody_can_change_costs_what_straight_code_costs():
    def run(weights, x, threshold):
        y = jnp.tanh(x @ weights)
        return y, y, jnp.zeros(x.shape[:1], bool), jnp.zeros(x.shape[:1])

    weights = np.eye(64, dtype=np.float32)
    parts = [
        Segment(run, weights, name=f"s{n}", targets=(f"s{n + 1}" if n < 3 else END,))
        for n in range(4)
    ]
    traced = Traced(Segmented(lambda _, x: x, None, parts, [0.0] * 4))
    x = jnp.ones((32, 64))

    def flops(fn, *args):
        return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]

    def straight(weights, x):
        for own in weights:
            x = jnp.tanh(x @ own)
        return x

    output = lambda weights, x: traced(weights, x, jnp.zeros(4)).output
    ours, plain = flops(output, traced.weights, x), flops(straight, traced.weights[1], x)
    assert ours == pytest.approx(plain, rel=0.02)


@pytest.mark.parametrize(
    "parts, told",
    [
        ([("a", ("b", "c"), 0), ("b", (), 0)], "leads to 'c'; use one of a, b, end"),
        ([("a", ("b",), 0), ("b", ("a", END), 2)], "leads back to the first"),
        ([("a", ("b",), 0), ("b", ("b", END), 0)], "give it max_trips"),
        ([("a", ("b",), 0), ("b", (END, "b"), 3)], "a last target further on"),
        ([("a", ("b",), 2), ("b", (), 0)], "never leads back"),
        ([("a", ("b",), 0), ("a", (), 0)], "two segments have one name"),
        ([("a", (END,), 0), ("b", (), 0)], "'b' is never reached"),
    ],
)
def test_wrong_graphs_are_refused(parts, told):
    run = lambda w, c, t: (c, c, c > t, c)
    segments = [Segment(run, None, Cost(0), *part) for part in parts]
    net = Segmented(lambda _, x: x, None, segments, [0.0] * len(parts))
    with pytest.raises(DyncompError, match=told):
        MaskedExecutor(net)


@pytest.mark.parametrize("executor", [MaskedExecutor, HostExecutor])
@pytest.mark.parametrize(
    "run, told",
    [
        (
            lambda w, x, t: (x[:, :1], x, x[:, 0] > t, x[:, 0]),
            r"'s1' got a carry of float32\[4, 3\] and hands on",
        ),
        (
            lambda w, x, t: (x, x[:, :2], x[:, 0] > t, x[:, 0]),
            r"an output of float32\[4, 2\], the first",
        ),
        (lambda w, x, t: (x, x, x > t, x[:, 0]), r"a route of shape \(4, 3\)"),
        (lambda w, x, t: (x, x, x[:, 0] > t, jnp.mean(x)), r"a score of shape \(\)"),
    ],
)
def test_segments_that_do_not_fit_each_other_are_refused(run, told, executor):
    good = lambda w, x, t: (x, x, x[:, 0] > t, x[:, 0])
    net = Segmented(
        lambda _, x: x, None, [Segment(good, None, name="s0"), Segment(run, None, name="s1")], [0.0]
    )
    inputs = np.ones((4, 3), np.float32)
    options = {"capacity": 4} if executor is HostExecutor else {}
    pattern = told.replace("4", "1") if options else told  # a host executor looks at one row
    with pytest.raises(DyncompError, match=pattern):
        (executor(net, inputs, **options) if options else executor(net))(inputs)
