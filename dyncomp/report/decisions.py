"""Pictures of plans: what was decided, on which input.

``decisions.json`` may hold any of::

    {"load":   [[rows of expert 0, 1, ...], ...],              # one list a layer
     "text":   {"pieces": ["d", "e", ...], "experts": [1.5, ...]},  # mean active experts of each piece
     "exits":  [how many leave at exit 0, 1, ...],
     "images": {"images": [[[0..1, ...], ...], ...], "exit": [0, ...]}}   # grey images and where each left
"""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.report.figure import COLORS, svg


def expert_load(load: Any) -> str:
    """Heat map of the share of rows [l e] that each expert gets, as SVG.

    Args:
      load: counts, one row a layer.
    """
    counts = _matrix(load, "load", 2)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        image = axes.imshow(share, cmap="viridis", aspect="auto", vmin=0)
        axes.grid(False)
        axes.set(xlabel="expert", ylabel="layer", title="share of rows")
        axes.set_yticks(range(len(share)))
        figure.colorbar(image, ax=axes)

    return svg(draw, title="expert load per layer", size=(5.2, 1.4 + 0.35 * len(share)))


def exit_histogram(counts: Any) -> str:
    """Share of examples that leave at each exit, as SVG."""
    found = _matrix(counts, "exits", 1)

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        bars = axes.bar(range(len(found)), found / max(found.sum(), 1), color=COLORS[0])
        axes.bar_label(bars, fmt="{:.0%}", fontsize=8)
        axes.set(xlabel="exit", ylabel="share of examples", title="where examples leave")
        axes.set_xticks(range(len(found)))

    return svg(draw, title="histogram of exits", size=(4.6, 2.8))


def coloured_text(pieces: Sequence[str], experts: Sequence[float]) -> str:
    """HTML in which the background of every piece grows with its number of experts."""
    shares, low, high = _shades(pieces, experts)
    spans = [
        f'<span style="background:rgba(224,121,27,{0.75 * share:.2f})" title="{value:.3g}">{escape(piece)}</span>'
        for piece, value, share in zip(pieces, experts, shares, strict=True)
    ]
    legend = (
        f'<p class="note">Active experts: none of the shade {low:.3g}, full shade {high:.3g}.</p>'
    )
    return f'<pre class="text">{"".join(spans)}</pre>{legend}'


def terminal_text(pieces: Sequence[str], experts: Sequence[float]) -> Any:
    """The same for a terminal, as a `rich.text.Text`."""
    from rich.text import Text

    text = Text()
    for piece, share in zip(pieces, _shades(pieces, experts)[0], strict=True):
        text.append(
            piece, style=f"black on rgb(255,{255 - int(140 * share)},{255 - int(225 * share)})"
        )
    return text


def _shades(pieces: Sequence[str], experts: Sequence[float]) -> tuple[list[float], float, float]:
    if len(pieces) != len(experts) or not pieces:
        raise DyncompError(
            f"text: {len(pieces)} pieces and {len(experts)} figures; give one figure a piece"
        )
    values = _matrix(experts, "text", 1)
    low, high = float(values.min()), float(values.max())
    return list((values - low) / (high - low or 1.0)), low, high


def image_grid(images: Any, exits: Sequence[int], per_exit: int = 12) -> str:
    """One row of images for each exit, as an HTML table of inline PNG files."""
    pixels = _matrix(images, "images", 3)
    if len(pixels) != len(exits):
        raise DyncompError(
            f"images: {len(pixels)} images and {len(exits)} exits; give one exit an image"
        )
    rows = []
    for index in sorted(set(map(int, exits))):
        chosen = [n for n, left in enumerate(exits) if int(left) == index][:per_exit]
        tiles = "".join(
            f'<img alt="leaves at exit {index}" src="{_png(pixels[n])}">' for n in chosen
        )
        rows.append(f'<tr><th scope="row">exit {index}</th><td class="tiles">{tiles}</td></tr>')
    return f"<table>{''.join(rows)}</table>"


def _png(pixels: np.ndarray) -> str:
    from matplotlib.image import imsave

    stream = io.BytesIO()
    imsave(stream, pixels, cmap="gray", vmin=0, vmax=1, format="png")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _matrix(values: Any, name: str, rank: int) -> np.ndarray:
    try:
        found = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        found = np.zeros(0)
    if found.ndim != rank or not found.size or not np.isfinite(found).all():
        raise DyncompError(f"decisions, {name}: expected {rank} axes of finite numbers, not empty")
    return found


def pictures(decisions: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(caption, HTML) of everything a decisions.json holds; what cannot be drawn says why in one line."""
    makers = {
        "load": ("Which experts work", expert_load),
        "text": ("Experts per piece of text", lambda d: coloured_text(d["pieces"], d["experts"])),
        "exits": ("Where examples leave", exit_histogram),
        "images": ("Images by exit", lambda d: image_grid(d["images"], d["exit"])),
    }
    found = []
    for key, (caption, make) in makers.items():
        if key in decisions:
            try:
                found.append((caption, make(decisions[key])))
            except (DyncompError, KeyError, TypeError, ValueError) as error:
                found.append((caption, f'<p class="note">not drawn: {escape(str(error))}</p>'))
    return found
