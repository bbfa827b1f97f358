"""Layer sets against the sheet's lists, closed forms and the rule spelled out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dyncomp import depth
from dyncomp.core.errors import DyncompError

quick = settings(deadline=None, derandomize=True, max_examples=50)


@pytest.mark.parametrize(
    ("speedup", "kept"),
    [
        (1, tuple(range(30))),
        (2, (0, *range(2, 27, 2), 29)),
        (3, (0, *range(3, 25, 3), 29)),
        (5, (0, 6, 12, 18, 24, 29)),
        (10, (0, 15, 29)),
    ],
)
def test_published_sets_of_thirty_layers(speedup, kept):
    assert depth.evenly(30, speedup) == kept
    assert len(kept) == 30 // speedup


def walked(n_layers, speedup):
    """The published walk, step by step."""
    n_keep = n_layers // speedup
    kept = {0, n_layers - 1}
    for i in range(1, n_layers - 1):
        if len(kept) == n_keep:
            break
        if i % (n_layers // (n_keep - 1)) == 0:
            kept.add(i)
    return tuple(sorted(kept))


def test_even_sets_have_the_promised_size_for_all_depths():
    for n_layers in range(4, 81):
        for speedup in range(1, n_layers // 2 + 1):
            kept = depth.evenly(n_layers, speedup)
            assert kept == walked(n_layers, speedup) == depth.check_layers(kept, n_layers)
            assert kept[0] == 0 and kept[-1] == n_layers - 1
            assert len(kept) == n_layers // speedup


def test_spread_is_the_rounded_linspace():
    for n_layers in range(2, 60):
        for keep in range(2, n_layers + 1):
            kept = depth.spread(n_layers, keep)
            assert depth.check_layers(kept, n_layers) == kept and len(kept) == keep
            off = np.abs(np.asarray(kept) - np.linspace(0, n_layers - 1, keep))
            assert off.max() <= 0.5 + 1e-9 and off[0] == off[-1] == 0


def test_contiguous_sets():
    assert depth.bottom(12, 4) == (0, 1, 2, 3)
    assert depth.top(12, 4) == (0, 9, 10, 11)
    assert depth.top(5, 5) == depth.bottom(5, 5) == depth.spread(5, 5) == (0, 1, 2, 3, 4)


@quick
@given(st.integers(2, 40), st.data())
def test_random_sets(n_layers, data):
    keep = data.draw(st.integers(2, n_layers))
    kept = depth.random_layers(n_layers, keep, seed=3)
    assert depth.check_layers(kept, n_layers) == kept and len(kept) == keep
    assert kept == depth.random_layers(n_layers, keep, seed=3)


def test_random_sets_are_uniform():
    drawn = [layer for seed in range(2000) for layer in depth.random_layers(6, 3, seed)]
    counts = np.bincount(drawn, minlength=6)
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(2000 * 0.25)


def test_layer_set_names_every_rule_at_one_size():
    rules = ("even", "spread", "bottom", "top", "random")
    sets = {rule: depth.layer_set(rule, 30, 5, seed=1) for rule in rules}
    assert {len(kept) for kept in sets.values()} == {6}
    assert sets["even"] == depth.evenly(30, 5) and sets["top"] == depth.top(30, 6)
    assert sets["spread"] == (0, 6, 12, 17, 23, 29)
    assert sets["random"] == depth.random_layers(30, 6, 1) and sets["bottom"] == depth.bottom(30, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: depth.evenly(30, 16), "1 of 30 layers"),
        (lambda: depth.evenly(30, 31), "0 of 30 layers"),
        (lambda: depth.evenly(30, 0.5), "speedup=0.5"),
        (lambda: depth.bottom(4, 5), "5 of 4 layers"),
        (lambda: depth.spread(4, 1), "keep 2..4"),
        (lambda: depth.check_layers((0, 2, 2), 4), "once, in order"),
        (lambda: depth.check_layers((0, 4), 4), "layers 0..3"),
        (lambda: depth.check_layers((3,), 4), "1 of 4 layers"),
    ],
)
def test_bad_sets_are_refused(call, message):
    with pytest.raises(DyncompError, match=message):
        call()


def test_unknown_rule_is_refused(unchecked):
    with pytest.raises(DyncompError, match="spacing='middle'"):
        depth.layer_set("middle", 30, 2)
