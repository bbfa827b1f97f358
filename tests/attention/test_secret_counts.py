"""Operation counts by hand."""

import pytest

from dyncomp.attention.secret_counts import SecretCounts, SecretStep, sorting_comparisons
from dyncomp.core.errors import DyncompError

ONE = {"heads": 1, "lists": 1, "width": 64}


def test_ranked_items():
    """Property 10: n1 + 2 int(n1 / 2) with n1 = m / 32, against m / 16 flat and m by the token."""
    for m in (64, 512, 1024, 1056):
        n1 = m // 32
        assert SecretStep(tokens=m, **ONE).selection(4).ranked == n1 + 2 * int(0.5 * n1)
        flat = SecretStep(tokens=m, coarse=None, **ONE)
        assert flat.selection(4).ranked == m // 16
        tokens = SecretStep(tokens=m, coarse=None, cluster=1, **ONE)
        assert tokens.selection(4).ranked == m


def test_linear_scores_compare_nothing_but_ranks():
    """1024 tokens in 64 clusters: the bound compares 64 x 64 coordinates more, its signs 64 more."""
    make = lambda score: SecretStep(tokens=1024, coarse=None, score=score, **ONE).selection(8)
    linear, bound, signs = make("linear"), make("bound"), make("signs")
    assert linear.comparisons == sorting_comparisons(64) == 32 * 21
    assert bound.comparisons - linear.comparisons == 64 * 64
    assert signs.comparisons - linear.comparisons == 64
    assert bound.multiplications == 2 * linear.multiplications == 2 * 64 * 64


def test_attention_and_gather_by_hand():
    step = SecretStep(tokens=64, heads=4, lists=2, width=8, cluster=16)
    dense = step.attention(64)
    assert dense == SecretCounts(comparisons=4 * 63, multiplications=2 * 4 * 64 * 8, softmax=256)
    # 3 of 4 clusters for each of 2 lists, 16 keys and values of 8 numbers.
    assert step.gather(3).gathered == 2 * 3 * 4 * 16 * 2 * 8
    # 2 coarse clusters, 1 of them chosen: its 2 children's centres; then 3 of 4 clusters.
    chosen = step.selection(3)
    assert chosen.gathered == 2 * 1 * 2 * 2 * 8 and chosen.equalities == 2 * (3 * 4 + 1 * 2)
    assert (dense + dense) == dense * 2


def test_small_networks():
    assert [sorting_comparisons(n) for n in (1, 2, 3, 4, 8)] == [0, 1, 6, 6, 24]


def test_bad_steps_are_refused(unchecked):
    with pytest.raises(DyncompError, match="at least 1"):
        SecretStep(tokens=0, **ONE)
    with pytest.raises(DyncompError, match="signs"):
        SecretStep(tokens=4, score="quest", **ONE)
