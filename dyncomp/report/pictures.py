"""Pictures of what was decided: experts' loads, text by active experts, exits, images by exit, any other plan."""

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.report.figure import COLORS, svg

VALUES = 24
"""A histogram of whole numbers has a bar for each of up to this many values, others have so many bins."""


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
        axes.set(xlabel="expert", ylabel="layer", title="share of the layer's rows")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=axes, format="{x:.0%}")

    height = 1.4 + 0.35 * min(len(share), 24)
    return svg(draw, title="expert load per layer", size=(5.2, height))


def exit_histogram(counts: Any) -> str:
    """Share of examples that leave at each exit, as SVG."""
    found = _matrix(counts, "exits", 1)

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        bars = axes.bar(range(len(found)), found / max(found.sum(), 1), color=COLORS[0])
        axes.bar_label(bars, fmt="{:.0%}", fontsize=8)
        axes.set(xlabel="exit (the last is the full network)", ylabel="share of examples")
        axes.set_xticks(range(len(found)))
        axes.yaxis.set_major_formatter("{x:.0%}")

    return svg(draw, title="histogram of exits", size=(4.6, 2.8))


def histogram(values: Any, label: str) -> str:
    """Share of each value of any decision, all axes together, as SVG: truth values, whole numbers or bins."""
    flat = np.asarray(values)
    kind = flat.dtype.kind
    flat = _matrix(flat[np.isfinite(flat)] if kind == "f" else flat.reshape(-1), label, 1)
    found, counts = np.unique(flat, return_counts=True)
    names: list[Any] = ["no", "yes"] if kind == "b" else []

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        if kind == "f" or len(found) > VALUES:
            shares = np.full(len(flat), 1 / len(flat))
            axes.hist(flat, VALUES, weights=shares, color=COLORS[0])
        else:
            axes.bar(found, counts / len(flat), color=COLORS[0])
            axes.set_xticks(found, [names[int(v)] if names else f"{v:.0f}" for v in found])
        axes.set(xlabel=label.replace("$", r"\$"), ylabel="share")
        axes.yaxis.set_major_formatter("{x:.0%}")

    return svg(draw, title=f"histogram of {label}", size=(4.6, 2.8))


def coloured_text(pieces: Sequence[str], experts: Sequence[float]) -> str:
    """HTML in which the background of every piece grows with its number of experts; alike neighbours share one.

    Where all are alike there is nothing to see, and one line says so.
    """
    shares, low, high = _shades(pieces, experts)
    if low == high:
        return f'<p class="note">{low:.3g} active experts for every token.</p>'
    spans: list[tuple[float, float, str]] = []
    for piece, value, share in zip(pieces, experts, shares, strict=True):
        if spans and spans[-1][1] == value:
            spans[-1] = (share, value, spans[-1][2] + piece)
        else:
            spans.append((share, value, piece))
    body = "".join(
        f'<span style="background:{_shade(share)}" title="{value:.3g}">{escape(piece)}</span>'
        for share, value, piece in spans
    )
    return f'<pre class="text">{body}</pre><p class="note">{_legend(low, high)}</p>'


def _shade(share: float) -> str:
    return f"rgba(224,121,27,{0.75 * share:.2f})"


def _legend(low: float, high: float) -> str:
    steps = np.linspace(0, 1, 5)
    swatches = "".join(
        f'<span class="swatch" style="background:{_shade(s)}">{low + s * (high - low):.3g}</span>'
        for s in steps
    )
    return f"Mean active experts over the layers: {swatches}"


def _shades(pieces: Sequence[str], experts: Sequence[float]) -> tuple[list[float], float, float]:
    if len(pieces) != len(experts) or not pieces:
        raise DyncompError(
            f"text: {len(pieces)} pieces and {len(experts)} figures; give one figure a piece"
        )
    values = _matrix(experts, "text", 1)
    low, high = float(values.min()), float(values.max())
    return list((values - low) / (high - low or 1.0)), low, high


def image_grid(images: Any, exits: Any, per_exit: int = 12) -> str:
    """One row of images for each exit, as an HTML table of inline PNG files.

    Args:
      images: [b h w c] in 0..1, grey (c = 1) or colour (c = 3).
      exits: [b], where each left.
      per_exit: at most so many images a row.
    """
    pixels = _matrix(images, "images", 4)
    exits = _matrix(exits, "exits", 1).astype(int)
    if len(pixels) != len(exits):
        raise DyncompError(
            f"images: {len(pixels)} images and {len(exits)} exits; give one exit an image"
        )
    rows = []
    for index in sorted(set(exits.tolist())):
        chosen = np.flatnonzero(exits == index)[:per_exit]
        tiles = "".join(
            f'<img alt="leaves at exit {index}" src="{_png(pixels[n])}">' for n in chosen
        )
        rows.append(f'<tr><th scope="row">exit {index}</th><td class="tiles">{tiles}</td></tr>')
    return f"<table>{''.join(rows)}</table>"


def _png(pixels: np.ndarray) -> str:
    from matplotlib.image import imsave

    shown = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    stream = io.BytesIO()
    imsave(stream, np.clip(shown, 0, 1), cmap="gray", vmin=0, vmax=1, format="png")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _matrix(values: Any, name: str, rank: int) -> np.ndarray:
    try:
        found = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        found = np.zeros(0)
    if found.ndim != rank or not found.size or not np.isfinite(found).all():
        raise DyncompError(f"decisions, {name}: expected {rank} axes of finite numbers, not empty")
    return found
