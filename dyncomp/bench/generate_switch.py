"""What switching between a large and a small model realises: time against the shares of both models' own steps."""

import time
from typing import Any

import numpy as np

from dyncomp.bench import fresh, generate_peer, timing
from dyncomp.decoding import Generator, PeriodicSwitch, SwitchingGenerator
from dyncomp.decoding.net import separate
from dyncomp.models import DecoderLM, Group

LARGE, SMALL, GOAL, REPEATS = 10, 23, 0.85, 9
"""Tokens that each model writes in turn, 0.30 of them the large one's; `EntropySwitch` writes at least 10, too."""
PERIODS, PROMPT = 3, 380
FOREVER = 1 << 20
REFERENCE = (
    "(share x seconds of large + (1 - share) x seconds of small) / seconds of switching, a token; each alone in the "
    "plain generator; float32, batch 1, 400 to 500 tokens of context, large share 0.30; small: a fifth of the blocks"
)


def row(quick: bool) -> dict[str, Any]:
    """Catching up is what is lost."""
    found = fresh.call(f"{__name__}:seconds", {"quick": quick})
    share = LARGE / (LARGE + SMALL)
    each = [
        (share * large + (1 - share) * small) / both
        for both, large, small in zip(found["both"], found["large"], found["small"], strict=True)
    ]
    ratio, interval = timing.median_interval(each)
    median = {name: float(np.median(values)) for name, values in found.items()}
    return timing.row(
        "generate/switch_30",
        ratio,
        interval,
        reference=REFERENCE,
        runs=len(each),
        goal=None if quick else GOAL,
        relation="report" if quick else ">=",
        peer="shares of both models' own steps",
        median_ours=median["both"],
        median_peer=share * median["large"] + (1 - share) * median["small"],
        seconds_large=median["large"],
        seconds_small=median["small"],
        seconds_large_in_this_driver=median["large_driven"],
    )


def seconds(quick: bool) -> dict[str, list[float]]:
    """Seconds of a token of ``both`` in turn, of ``large`` and ``small`` alone, and of large alone in this driver."""
    model, variables = generate_peer.subject("float32", quick)
    pair = first_blocks(model, variables, max(model.depth // 5, 1)), (model, variables)
    generators: dict[str, Any] = {
        "both": SwitchingGenerator(*pair, PeriodicSwitch(large=LARGE, small=SMALL)),
        "large": Generator(*pair[1]),
        "small": Generator(*pair[0]),
        "large_driven": SwitchingGenerator(*pair, PeriodicSwitch(large=FOREVER, small=1)),
    }
    prompt = generate_peer.prompt(model.vocab_size, 1, 8 if quick else PROMPT)[0].tolist()
    new = (1 if quick else PERIODS) * (LARGE + SMALL)
    found: dict[str, list[float]] = {name: [] for name in generators}
    for turn in range(2 if quick else REPEATS + 1):
        for name, generator in generators.items():
            spent = []
            for count in (1, new + 1):  # the prompt and the first token are in both
                start = time.perf_counter()
                generator.generate([prompt], count)
                spent.append(time.perf_counter() - start)
            if turn:  # the first compiles
                found[name].append((spent[1] - spent[0]) / new)
    return found


def first_blocks(model: DecoderLM, variables: Any, depth: int) -> tuple[DecoderLM, Any]:
    """A model of the first ``depth`` blocks with the same embedding and head."""
    own, weights = separate(model, variables)
    return own.clone(groups=(Group(own.groups[0].blocks, depth),)), weights
