"""Exits of the real SmolLM2: raw states say nothing through the last head, and maps change that."""

import numpy as np
import pytest

from dyncomp import decoding, pretrained
from dyncomp.decoding.net import Net, separate
from dyncomp.tasks import corpus

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not pretrained.smollm2(), reason="DYNCOMP_SMOLLM2 is not set"),
]
EXITS = (12, 24)


def test_maps_by_least_squares_speak_where_the_raw_lens_does_not():
    path = pretrained.smollm2()
    assert path is not None
    loaded = pretrained.load(path)
    tokenizer = loaded.tokenizer
    assert tokenizer is not None
    encode = tokenizer.encode
    net = Net(*separate(loaded.model, loaded.variables))
    documents = dict(corpus.standard_library())

    def windows(*names):
        ids = [i for name in names for i in encode(documents[name].decode())]
        return np.asarray(ids[: len(ids) // 512 * 512], np.int32).reshape(-1, 128)

    train = windows("textwrap.py", "heapq.py", "bisect.py")
    found = decoding.read_states(net, EXITS, train)
    maps = decoding.least_squares(found, ridge=1e-2)
    held_out = decoding.read_states(net, EXITS, windows("queue.py")[:8])
    raw, own = (decoding.score_exits(net, held_out, m) for m in (None, maps))
    assert (raw.agreement()[:2] < [0.1, 0.35]).all()
    assert (own.agreement()[:2] > [0.15, 0.4]).all(), own.agreement()
    assert (own.nats.mean(1)[:2] < raw.nats.mean(1)[:2] - 5).all()
    assert own.nats[-1].mean() < 3.5  # the model itself reads code
