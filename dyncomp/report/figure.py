"""Matplotlib figures as inline SVG that follows the page's colours."""

import io
import re
from collections.abc import Callable
from typing import Any

COLORS = ("#3b7dd8", "#e0791b", "#2f9e63", "#c8447c", "#8a63d2", "#a08314", "#3aa3b5", "#888888")
INK = "#010203"
"""Colour of axes and text; replaced by the page's own text colour."""

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
    "grid.color": INK,
}


def svg(draw: Callable[[Any], None], *, title: str, size: tuple[float, float]) -> str:
    """Draws on a fresh figure and returns an ``<svg>`` element: no dates, no links, same bytes every time.

    Args:
      draw: gets the figure.
      title: what a screen reader says.
      size: width and height in inches.
    """
    from html import escape

    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    label = f'<svg role="img" aria-label="{escape(title, quote=True)}"'
    return text.replace(INK, "currentColor").replace("<svg", label, 1)


def plain(text: str) -> str:
    """Text in which matplotlib sees no formulas."""
    return str(text).replace("$", r"\$")
