"""Turns a run's decisions.npz into pictures: which expert, which token, which exit.

The file is what `dyncomp.training.evaluate.save_decisions` wrote: every array of every plan under its path, ``kinds``
(JSON, path -> name of the plan's class), ``mask`` of the batch, and under ``shown/`` what the task says a reader can
look at (`Task.describe`). A plan of an unknown class gets a histogram of each of its arrays.
"""

import codecs
import json
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.report.pictures import (
    coloured_text,
    exit_histogram,
    expert_load,
    histogram,
    image_grid,
)

Arrays = Mapping[str, np.ndarray]
MAX_TOKENS = 1024
MAX_HISTOGRAMS = 12
DAMAGE = (DyncompError, KeyError, TypeError, ValueError, IndexError)


def pictures(arrays: Arrays) -> list[tuple[str, str]]:
    """(caption, HTML) of everything there is to draw; what cannot be drawn says why in one line."""
    found = []
    for caption, draw in _planned(arrays):
        try:
            html = draw()
        except DAMAGE as error:
            html = f'<p class="note">not drawn: {escape(str(error) or type(error).__name__)}</p>'
        found.append((caption, html))
    return found


def _planned(arrays: Arrays) -> list[tuple[str, Callable[[], str]]]:
    """Captions and what draws them, without drawing."""
    kinds = _kinds(arrays)
    routes = [path for path, kind in kinds.items() if kind == "RoutePlan"]
    has_text, has_images = "shown/bytes" in arrays, "shown/images" in arrays
    planned: list[tuple[str, Callable[[], str]]] = []
    others = []
    for path, kind in kinds.items():
        if _last(path) == "load":
            planned.append((f"Which experts work: {path}", _Call(_load, arrays, path)))
        elif kind == "ExitPlan":
            planned.append(("Where examples leave", _Call(_exits, arrays, path)))
            if has_images:
                planned.append(("Images by exit", _Call(_images, arrays, path)))
        elif kind == "RoutePlan":
            if not has_text:
                planned.append((f"Active experts: {path}", _Call(_active, arrays, path)))
        else:
            others += [key for key in arrays if key == path or key.startswith(f"{path}/")]
    if routes and has_text:
        planned.append(("Experts per piece of text", _Call(_text, arrays, routes)))
    for key in others[:MAX_HISTOGRAMS]:
        planned.append((key, _Call(histogram, arrays[key], _last(key))))
    return planned


class _Call:
    """A call for later."""

    def __init__(self, function: Callable[..., str], *arguments: Any):
        self.function, self.arguments = function, arguments

    def __call__(self) -> str:
        return self.function(*self.arguments)


def _kinds(arrays: Arrays) -> dict[str, str]:
    """Path -> class of the plan; arrays without a class stand for themselves."""
    try:
        kinds = json.loads(str(arrays["kinds"]))
        return {str(path): str(kind) for path, kind in kinds.items()}
    except (KeyError, ValueError, AttributeError):
        ours = ("kinds", "mask", "inputs")
        return {k: "" for k in arrays if k not in ours and not k.startswith("shown/")}


def _last(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _load(arrays: Arrays, path: str) -> str:
    load = arrays[path]
    return expert_load(load.reshape(-1, load.shape[-1]))


def _counts(arrays: Arrays, path: str) -> np.ndarray:
    """Used alternatives of each row of a `RoutePlan`, [l n]."""
    counts = arrays[f"{path}/keep"].sum(axis=-1)
    return counts.reshape(-1, counts.shape[-1])


def _active(arrays: Arrays, path: str) -> str:
    return histogram(_counts(arrays, path), "active experts")


def _exits(arrays: Arrays, path: str) -> str:
    real = arrays["mask"].astype(bool)
    exits = arrays[f"{path}/exit"][real]
    return exit_histogram(np.bincount(exits, minlength=arrays[f"{path}/scores"].shape[-1]))


def _images(arrays: Arrays, path: str) -> str:
    real = arrays["mask"].astype(bool)
    return image_grid(arrays["shown/images"][real], arrays[f"{path}/exit"][real])


def _text(arrays: Arrays, routes: list[str]) -> str:
    """Tokens of the batch, coloured by their mean active experts over all layers that route them."""
    tokens = arrays["mask"].size
    counts = [_counts(arrays, path) for path in routes]
    layers = np.concatenate([c for c in counts if c.shape[-1] == tokens])
    shown = np.flatnonzero(arrays["mask"].reshape(-1))[:MAX_TOKENS]
    pieces = _pieces(arrays["shown/bytes"], arrays["shown/widths"].reshape(-1))
    experts = layers.mean(axis=0)
    return coloured_text([pieces[n] for n in shown], [float(experts[n]) for n in shown])


def _pieces(content: np.ndarray, widths: np.ndarray) -> list[str]:
    """Text of each token; a character that several tokens share stands with the last of them."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    ends = np.cumsum(widths)
    raw = content.astype(np.uint8).tobytes()
    return [decoder.decode(raw[e - w : e]) for e, w in zip(ends, widths, strict=True)]
