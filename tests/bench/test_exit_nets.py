"""The networks of `bench exits`: planted shares, prices, and PyTorch computing the same."""

import numpy as np
import pytest

from dyncomp.bench import exit_nets, exit_peer
from dyncomp.runtime import HostExecutor, StreamExecutor


@pytest.fixture(scope="module", params=["text", pytest.param("vit", marks=pytest.mark.peers)])
def small(request):
    """(name, network of four blocks)."""
    return request.param, exit_nets.NETS[request.param](4, 8)


def test_exits_are_used_and_the_last_is_the_network_without_exits(small):
    _, subject = small
    inputs = subject.draw(64, 3)
    host = HostExecutor(subject.net, inputs, capacity=64, buckets=(1, 8, 64))
    exits = host(inputs).exits
    assert len(set(exits.tolist())) >= 3 and abs(exits.mean() + 1 - 4 / 3) < 0.4
    host.thresholds[:] = np.inf
    found = host(inputs)
    assert (found.exits == 3).all()
    np.testing.assert_allclose(found.outputs, subject.full(inputs), rtol=1e-4, atol=1e-4)
    # All that it spends more are the first three heads.
    heads = 64 * 3 * 2 * exit_nets.WIDTH * exit_nets.CLASSES
    assert found.ledger.total() - 64 * subject.flops == heads


def test_a_server_of_fixed_depth_gives_the_first_exits_logits(small):
    _, subject = small
    inputs = subject.draw(5, 3)
    host = HostExecutor(subject.net, inputs, capacity=8, buckets=(8,))
    host.thresholds[:] = -np.inf  # a third of four blocks is one
    found = exit_nets.fixed_server(subject, 8)(inputs)
    np.testing.assert_allclose(found, host(inputs).outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.peers
def test_pytorch_computes_the_same(small):
    name, subject = small
    inputs = subject.draw(40, 3)
    ours = HostExecutor(subject.net, inputs, capacity=40)(inputs)
    theirs = exit_peer.batches(name, subject, 40)(inputs)
    np.testing.assert_array_equal(theirs.exits, ours.exits)
    np.testing.assert_allclose(theirs.outputs, ours.outputs, rtol=1e-3, atol=1e-3)
    assert (theirs.executed == theirs.needed).all()
    whole = exit_peer.full(name, subject)(inputs)
    np.testing.assert_allclose(whole, subject.full(inputs), rtol=1e-3, atol=1e-3)
    streams = exit_peer.stream(name, subject, 8), StreamExecutor(subject.net, inputs, bucket=8)
    left = []
    for stream in streams:
        stream.submit(inputs)
        left.append({one.ticket: one.exit for one in stream.drain()})
    assert left[0] == left[1] == dict(enumerate(ours.exits.tolist()))
