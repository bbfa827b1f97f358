"""What a trace of model choices cost, its runs, and random traces with the same runs. Host-side numpy.

A trace is int [b t] (or [t]): who made each token, 0 the small and 1 the large model (`dyncomp.decoding.switching`).
"""

import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Int


def parameter_share(models: Int[np.ndarray, "*t"], small: int | float, large: int | float) -> float:
    """(f N_L + (1 - f) N_S) / N_L with f the large model's share of tokens (the metric of arXiv 2502.06833).

    It counts generation steps only, not the catch-up of a model that becomes active: see `tokens_read`.
    """
    if models.size == 0 or not 0 < small or not 0 < large:
        raise DyncompError("parameter_share: needs a token and positive sizes")
    share = float(np.mean(models == 1))
    return share + (1.0 - share) * small / large


def switches(models: Int[np.ndarray, "*b t"]) -> Int[np.ndarray, "*b"]:
    """How often the model changes within each row."""
    return np.sum(models[..., 1:] != models[..., :-1], axis=-1)


def tokens_read(models: Int[np.ndarray, "b t"]) -> Int[np.ndarray, "b t"]:
    """How many tokens the model of each step has to read in it: 1, or more where it has a gap to catch up.

    Both models are taken to have read the prompt but for its last token. A model reads every token up to its last
    turn exactly once, so the sum over its steps is that turn's index plus one: FLOPs are saved only after the last
    use of the large model, sequential steps always.
    """
    read = np.zeros(models.shape, np.int64)
    for row, choices in enumerate(models):
        last = {0: -1, 1: -1}
        for step, model in enumerate(choices.tolist()):
            read[row, step] = step - last[model]
            last[model] = step
    return read


def runs_of(models: Int[np.ndarray, "t"]) -> list[tuple[int, int]]:
    """(model, length) of each maximal run, in order."""
    edges = np.flatnonzero(np.diff(models)) + 1
    bounds = [0, *edges.tolist(), len(models)]
    return [
        (int(models[start]), stop - start)
        for start, stop in zip(bounds[:-1], bounds[1:], strict=True)
        if stop > start
    ]


def run_lengths(models: Int[np.ndarray, "b t"]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Run lengths of the small and of the large model over all rows, for `RandomSwitch`.

    The last run of a row is cut off by the end of the text; it is left out where its model has another run.
    """
    whole: tuple[list[int], list[int]] = ([], [])
    cut: tuple[list[int], list[int]] = ([], [])
    for row in models:
        runs = runs_of(row)
        for place, (model, length) in enumerate(runs, 1):
            (cut if place == len(runs) else whole)[model].append(length)
    small, large = (tuple(w or c) for w, c in zip(whole, cut, strict=True))
    return small, large


def shuffled_runs(
    rng: np.random.Generator, models: Int[np.ndarray, "b t"]
) -> Int[np.ndarray, "b t"]:
    """A random trace with, row by row, the same first model and the same runs of each model in another order."""
    rows = []
    for row in models:
        runs = runs_of(row)
        pools = {m: rng.permutation([n for model, n in runs if model == m]) for m in (0, 1)}
        taken = {0: iter(pools[0]), 1: iter(pools[1])}
        parts = [np.full(int(next(taken[model])), model) for model, _ in runs]
        rows.append(np.concatenate(parts) if parts else row)
    return np.stack(rows).astype(models.dtype)
