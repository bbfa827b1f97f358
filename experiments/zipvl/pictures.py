"""The pictures of the page: tokens kept by layer, loss against pairs and against bits, and who is kept on real text."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from dyncomp.evidence import drawing

PAIRS = {
    "dense": "dense", "adaptive_80": "tau .8", "adaptive_90": "tau .9", "adaptive_96": "tau .96",
    "adaptive_975": "tau .975", "fixed_80": "one p, as .8", "fixed_90": "one p, as .9",
    "shuffled_90": "p of shuffled layers, as .9", "accumulated_90": "accumulated, as .9",
    "random_90": "random, as .9",
}  # fmt: skip
PROBED = {
    "dense": "dense", "probed_80": "tau .8", "probed_90": "tau .9", "probed_975": "tau .975",
    "probed_fixed_90": "one p, as .9", "probed_accumulated_90": "accumulated, as .9",
    "probed_random_90": "random, as .9", "seen_90": "tau .9, divided by probes",
    "recent_90": "tau .9, 128 newest", "drawn_90": "tau .9, 128 random",
}  # fmt: skip
BITS = {
    "bits_42": "4 important, 2 others", "bits_24": "2 important, 4 others", "bits_42_random": "4/2 at random",
    "bits_42_accumulated": "4/2, accumulated", "bits_42_286": "4/2, 28.6% important",
    "bits_22": "2", "bits_33": "3", "bits_44": "4", "whole_975": "whole method, tau .975",
}  # fmt: skip


def draw(results: dict[str, Any], outdir: Path) -> None:
    """Five files."""
    shown = [run["shown"] for run in results["runs"] if run.get("shown")]
    x, y = (
        ("pairs", "pairs kept while reading the prompt"),
        ("nats", "nats a token behind the prompt"),
    )
    drawing.plane(
        results, PAIRS, outdir / "1_loss_against_pairs.svg", x=x, y=y,
        sweep=("adaptive_80", "adaptive_90", "adaptive_96", "adaptive_975", "dense"),
    )  # fmt: skip
    drawing.plane(
        results, PROBED, outdir / "2_loss_against_pairs_128_probes.svg", x=x, y=y,
        sweep=("probed_80", "probed_90", "probed_975", "dense"),
    )  # fmt: skip
    drawing.plane(
        results, BITS, outdir / "3_loss_against_bits.svg", x=("bits", "bits of a cached number"), y=y,
        sweep=("bits_22", "bits_33", "bits_44"),
    )  # fmt: skip
    layers(shown, outdir / "4_tokens_by_layer.svg")
    one = shown[0]
    drawing.shaded_text(
        one["text"], one["share"], outdir / "5_kept_on_text.png",
        what="share of layers in which a token is important, tau .8",
    )  # fmt: skip


def layers(shown: list[dict[str, Any]], path: Path) -> None:
    """Share of important tokens of every layer, mean over seeds."""
    figure, axes = plt.subplots(figsize=(6.8, 3.8))
    for name in shown[0]["layers"]:
        mean = np.mean([one["layers"][name] for one in shown], axis=0)
        axes.plot(mean, "--" if name.startswith("tables") else "-", label=name)
    axes.set(xlabel="layer", ylabel="important tokens, share of the prompt", ylim=(0, 1))
    axes.legend(fontsize=8, ncols=2)
    drawing.save(figure, path)
