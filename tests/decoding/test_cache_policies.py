"""The decode drivers over caches that forget or select: the same text where all is kept, a refusal where it must be."""

import functools

import pytest

from dyncomp.attention import HeavyHitters, SinkWindow, TokenSelection
from dyncomp.core.errors import DyncompError
from dyncomp.decoding import FirstLayers, Generator, Session, SpeculativeGenerator
from dyncomp.models import with_mixer

FORGETTING = {
    "sinks": functools.partial(SinkWindow, sink=2, window=60),
    "hitters": functools.partial(HeavyHitters, budget=60, recent=8),
}
ROOMY = {**FORGETTING, "tokens": functools.partial(TokenSelection, sink=2, top=60, local=8)}


@pytest.fixture(scope="module")
def own(lm):
    return Generator(*lm[:2]).generate(lm[2], 9)


@pytest.mark.parametrize("name", ROOMY)
def test_what_keeps_everything_writes_the_same(lm, own, name):
    """Prompts of different lengths, padded on the left."""
    got = Generator(with_mixer(lm[0], cache=ROOMY[name]), lm[1]).generate(lm[2], 9)
    assert [one.tokens for one in got] == [one.tokens for one in own]


def test_drafts_are_taken_back_from_a_selecting_cache(lm, own):
    model = with_mixer(lm[0], cache=ROOMY["tokens"])
    (got,) = SpeculativeGenerator(model, lm[1], FirstLayers(2)).generate(lm[2][:1], 9)
    assert got.tokens == own[0].tokens


@pytest.mark.parametrize("name", FORGETTING)
def test_what_forgets_takes_nothing_back(lm, name):
    model = with_mixer(lm[0], cache=FORGETTING[name])
    session = Session(model, lm[1])
    session.open([[1, 2, 3, 4]], 64)
    session.extend([[5, 6]])
    with pytest.raises(DyncompError, match="forgets tokens"):
        session.take_back([1])
    with pytest.raises(DyncompError, match="forgets tokens"):
        SpeculativeGenerator(model, lm[1], FirstLayers(2)).generate([[1, 2, 3]], 9)


def test_a_window_of_slots_reads_one_text(lm):
    session = Session(with_mixer(lm[0], cache=FORGETTING["sinks"]), lm[1])
    with pytest.raises(DyncompError, match="one sequence at a time"):
        session.open([[1, 2], [3]], 64)
