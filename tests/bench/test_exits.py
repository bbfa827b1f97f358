"""The exits bench: what is planted, what the full network costs, and the rows of a smoke run."""

import numpy as np
import pytest

from dyncomp.bench import exits as bench
from dyncomp.core.ledger import Ledger
from dyncomp.runtime import MaskedExecutor


def test_halving_shares():
    np.testing.assert_allclose(bench.halving(4), [0.5, 0.25, 0.125, 0.125])


@pytest.mark.parametrize("rule", bench.RULES)
def test_planted_thresholds_give_the_shares_on_other_images(rule):
    size = bench.SIZES["laptop"]
    net, _ = bench.planted(size, rule)
    exits = MaskedExecutor(net)(bench._images(1000, 2)).exits
    shares = np.bincount(exits, minlength=size.depth) / 1000
    # Twice 1000 draws: five standard deviations of the difference are 11 points at most.
    assert np.abs(shares - bench.halving(size.depth)).max() < 0.11
    assert (shares[:3] > 0).all() and shares[-1] > 0


def test_the_full_network_is_priced_without_exits():
    """Against the backbone's own ledger, which knows nothing of exits."""
    size, images = bench.SIZES["laptop"], bench._images(3, 0)
    _, variables = bench.planted(size, "gates")
    model = size.backbone("scan")()
    _, aux = model.apply(variables, images)
    whole = Ledger(model.cost(images.shape)).record(aux.events).total()
    assert 3 * bench.full_flops(size, images.shape) == whole


def test_rows_of_a_smoke_run(monkeypatch):
    """The ratio is the planted saving times what time made of it."""
    monkeypatch.setattr(bench, "QUICK_BATCHES", (2,))
    monkeypatch.setattr(bench, "RULES", {"confidence": bench.RULES["confidence"]})
    monkeypatch.setattr(bench.timing, "interleaved", fixed_pairs)
    monkeypatch.setattr(bench.exit_runtime, "rows", lambda quick: [])  # test_benches runs these
    (row,) = bench.rows(quick=True)
    assert row["id"] == "exits/laptop/confidence/batch_2" and row["holds"] is None
    assert sum(row["histogram"]) == row["images"] == 64
    assert row["executed"] >= row["needed"] and row["needed"] < row["needed_peer"]
    # Made-up times: exits take half of what the full network takes.
    assert row["ratio"] == pytest.approx(2 / (row["needed_peer"] / row["needed"]))
    assert row["speedup"] == pytest.approx(2.0) and row["interval"] is not None


def fixed_pairs(ours, peer, pairs):
    """Runs both sides once and says that ours took half of the time."""
    outputs = np.concatenate([result.outputs for result in ours()])
    assert outputs.shape == np.concatenate(peer()).shape == (64, 10)
    return bench.timing.Pairs([1.0] * pairs, [2.0] * pairs, [1.0] * pairs, [2.0] * pairs)
