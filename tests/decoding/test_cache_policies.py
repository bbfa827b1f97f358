"""The decode drivers over caches that forget or select: the same text where all is kept, a refusal where it must be."""

import functools

import numpy as np
import pytest

from dyncomp.attention import FullCache, HeavyHitters, MixedPrecision, SinkWindow, TokenSelection
from dyncomp.core.errors import DyncompError
from dyncomp.decoding import (
    ExitAndCatchUp,
    ExitEarly,
    FirstLayers,
    Generator,
    Session,
    SpeculativeGenerator,
)
from dyncomp.decoding.reading import check_rows
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


TIGHT = {
    "full": FullCache,
    "sinks": functools.partial(SinkWindow, sink=2, window=6),
    "hitters": functools.partial(HeavyHitters, budget=8, recent=3),
    "tokens": functools.partial(TokenSelection, sink=2, top=3, local=2),
    "bits": functools.partial(MixedPrecision, span=4, prompt=16),
}


@pytest.mark.parametrize("name", ("full", "sinks"))
def test_catching_up_leaves_what_single_tokens_leave(lm, name):
    """Every third token goes deep and takes two along; its logits are those of a session that read one by one."""
    model = with_mixer(lm[0], cache=TIGHT[name])
    policy = ExitAndCatchUp((2,), window=3)
    generator = Generator(model, lm[1], policy, keep_logits=True)
    (one,) = generator.generate(lm[2][:1], 15, controls=np.zeros(1, np.float32))
    assert one.depths == [6, 2, 2] * 5
    session = Session(model, lm[1])
    session.open(lm[2][:1], 64)
    for place, token in enumerate(one.tokens[:-1], 1):
        logits = session.step([[token]])[0]
        if one.depths[place] == 6:
            np.testing.assert_allclose(one.logits[place], logits, atol=1e-5)


@pytest.mark.parametrize("name", ("hitters", "tokens", "bits"))
def test_caches_that_decide_once_a_pass_cannot_catch_up(lm, name):
    model = with_mixer(lm[0], cache=TIGHT[name])
    with pytest.raises(DyncompError, match=f"{TIGHT[name].func.__name__} decides once a pass"):
        Generator(model, lm[1], ExitAndCatchUp((2,)))


def test_a_cache_is_not_tried_on_a_single_slot(lm):
    """Looking for windows, `check_rows` makes the policy: a prompt of 16 does not fit one slot."""
    check_rows(with_mixer(lm[0], cache=TIGHT["bits"]), 2)


@pytest.mark.parametrize("name", ("hitters", "sinks", "tokens"))
def test_only_a_full_cache_is_copied(lm, name):
    model = with_mixer(lm[0], cache=TIGHT[name])
    with pytest.raises(DyncompError, match=f"not of {TIGHT[name].func.__name__}; use fill='prop"):
        Generator(model, lm[1], ExitEarly((2,), fill="copy"))
    ExitEarly((2,)).check(model)
