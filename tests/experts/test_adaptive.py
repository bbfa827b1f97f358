"""The chooser against brute force over a table of times; the switch runs what was chosen."""

import itertools

import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.experts import Exchange
from dyncomp.experts.adaptive import ExchangeChooser, SwitchingStep

SLICES, CHUNKS, INNER = (0, 1, 2, 4, 8, 16), (1, 2, 4, 8), (1, 8)


def seconds(setting, best):
    """Falls and rises along r with the least at ``best``; d and the way to send change it independently."""
    r, d, near = (SLICES.index(setting.slices), CHUNKS.index(setting.chunks), setting.inner)
    least = (SLICES.index(best[0]), CHUNKS.index(best[1]), best[2])
    return 10 + abs(r - least[0]) + 0.3 * abs(d - least[1]) + 0.1 * (near != least[2])


@pytest.mark.parametrize("best", [(1, 4, 8), (16, 1, 1), (4, 8, 1), (2, 2, 8)])
def test_finds_the_least_of_all_in_few_trials(best):
    chooser, tried = ExchangeChooser(SLICES, CHUNKS, INNER), []
    for _ in range(40):
        setting = chooser.propose(300)
        if 2 not in chooser.best:
            tried.append(setting)
        chooser.record(300, setting, seconds(setting, best))
    every = [
        Exchange(slices=r, chunks=d, inner=i)
        for r, d, i in itertools.product(SLICES, CHUNKS, INNER)
    ]
    brute = min(every, key=lambda s: seconds(s, best))
    assert (brute.slices, brute.chunks, brute.inner) == best
    assert chooser.propose(300) == brute == chooser.best[2]
    # at most 2 of each halving and the last 3 along r, then 4 x 2, of which one was timed before
    assert len(tried) == len(set(tried)) <= 2 + 3 + 7 < len(every)


def test_weights_that_move_need_no_chunks():
    chooser = ExchangeChooser((0, 1), (1, 2), (1,))
    for _ in range(2):
        setting = chooser.propose(0)
        chooser.record(0, setting, 1.0 if setting.slices == 0 else 2.0)
    assert chooser.best == {0: Exchange(slices=0)}


def test_keys_are_searched_apart_and_other_reports_are_ignored():
    chooser = ExchangeChooser((0, 1), (1,), (1,), bucket=128)
    assert chooser.key(127) == 0 and chooser.key(128) == 1
    assert chooser.slots(0) == chooser.slots(127) == 128 and chooser.slots(128) == 256
    chooser.record(5, Exchange(slices=1), 0.0)  # nobody asked
    first = chooser.propose(5)
    chooser.record(5, Exchange(slices=7), 0.0)
    assert chooser.propose(100) == first == Exchange(slices=0)
    for capacity, fast in ((5, 1), (200, 0)):
        for _ in range(2):
            setting = chooser.propose(capacity)
            chooser.record(capacity, setting, 1.0 + (setting.slices != fast))
    assert {key: best.slices for key, best in chooser.best.items()} == {0: 1, 1: 0}
    with pytest.raises(DyncompError, match="at least one"):
        ExchangeChooser(())


def test_the_first_call_of_a_program_is_not_timed():
    ticks = iter(
        [0.0, 0, 1, 1, 1, 10, 10]
    )  # two programs: entered; entered and left, after 1 and 9
    made = []

    def make(setting, slots):
        made.append((setting.slices, slots))
        return lambda x: x + setting.slices

    step = SwitchingStep(make, ExchangeChooser((1, 2), (1,)), clock=lambda: next(ticks))
    assert [step(40, 10) for _ in range(5)] == [
        11,
        11,
        12,
        12,
        11,
    ]  # compile, time; compile, time; the best
    assert made == [(1, 128), (2, 128)] and step.last == Exchange(slices=1)
