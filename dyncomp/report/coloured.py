"""Text coloured by what produced each token: for the terminal, and as one self-contained HTML page.

Both ink and paper of a coloured piece are set, so that it reads alike on dark and light backgrounds.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from dyncomp.core.errors import DyncompError
from dyncomp.report.page import HEAD

INK = "#14181d"
SHADES = ("#fff3b0", "#c3e88d", "#6fd6b8", "#74bdf0", "#c090ea")
"""From few to many; black on the darkest still has a contrast of 7 to 1."""
HUES = ("#a8d3f7", "#ffc387", "#a6dfb5", "#f4b3cf", "#cdbdf2", "#e3d58c")
STYLE = f"""
:root {{ color-scheme: light dark; --ink: #1d232b; --soft: #55606b; --paper: #fff; --card: #f6f8fa; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e4e8ed; --soft: #9aa5b1; --paper: #14181d; --card: #1c2229; }} }}
body {{ margin: 0 auto; max-width: 60rem; padding: 1.2rem 1.1rem 2.5rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }}
h1 {{ font-size: 1.3rem; line-height: 1.25; margin: .3rem 0 .6rem; }}
p {{ color: var(--soft); font-size: .92rem; margin: .5rem 0; }}
pre {{ background: var(--card); padding: .9rem 1rem; border-radius: 6px; margin: .6rem 0; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 15px/1.65 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; tab-size: 4; }}
.token, .label {{ color: {INK}; border-radius: 3px; }}
.token {{ box-shadow: inset 1px 0 rgba(0, 0, 0, .16); }}
.label {{ padding: .1rem .5rem; margin-right: .35rem; font-size: .88rem; display: inline-block; }}
"""


@dataclasses.dataclass(frozen=True)
class Key:
    """What the colours mean.

    Attributes:
      title: what is told apart, such as "blocks that ran".
      labels: a text for each value; values are their indices.
      ordered: from few to many, in shades of one scale; else hues without an order.

    Raises:
      DyncompError: no labels, or more kinds than there are hues.
    """

    title: str
    labels: tuple[str, ...]
    ordered: bool = True

    def __post_init__(self):
        if not self.labels or not self.ordered and len(self.labels) > len(HUES):
            most = "any number of" if self.ordered else f"at most {len(HUES)}"
            raise DyncompError(f"Key.labels: {len(self.labels)} labels; give {most} labels, not 0")

    def colour(self, value: int) -> str:
        """``#rrggbb`` of a value; shades between the given ones are mixed."""
        if not self.ordered:
            return HUES[value]
        place = value / max(len(self.labels) - 1, 1) * (len(SHADES) - 1)
        below = min(int(place), len(SHADES) - 2)
        low, high = (bytes.fromhex(shade[1:]) for shade in SHADES[below : below + 2])
        mixed = (round(a + (b - a) * (place - below)) for a, b in zip(low, high, strict=True))
        return "#" + bytes(mixed).hex()


def visible(text: str) -> str:
    """Control characters, but for newline and tab, as pictures: a model must not steer a terminal."""
    shown = {code: 0x2400 + code for code in range(32) if code not in (9, 10)}
    # 0x80-0x9f hold one-byte forms of the same escapes.
    return text.translate({**shown, 127: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)})


def shares(values: Iterable[int | None], key: Key) -> list[float]:
    """Share of each label among the coloured pieces, which add up to 1; zeros where there is none."""
    counted = [value for value in values if value is not None]
    return [counted.count(n) / max(len(counted), 1) for n in range(len(key.labels))]


def terminal_text(pieces: Sequence[str], values: Sequence[int | None], key: Key) -> Any:
    """A `rich.text.Text`; printed where there are no colours, or NO_COLOR is set, it is the plain text.

    rich shows tabs as spaces. Terminals of 16 colours keep the text readable but not all shades apart.

    Args:
      pieces: one a token; empty ones (part of a character that a later token completes) show nothing.
      values: index of each piece's label; None leaves it uncoloured.
      key: what they mean.

    Raises:
      DyncompError: not one value a piece, or a value without a label.
    """
    from rich.style import Style
    from rich.text import Text

    _check(pieces, values, key)
    text = Text(end="")
    for piece, value in zip(pieces, values, strict=True):
        style = "" if value is None else Style(color=INK, bgcolor=key.colour(value))
        text.append(visible(piece), style)
    return text


def terminal_legend(values: Sequence[int | None], key: Key) -> Any:
    """One line, a `rich.text.Text`: each label in its colour with its share of the tokens."""
    from rich.text import Text

    line = Text(f"{key.title}: ")
    for n, (label, share) in enumerate(zip(key.labels, shares(values, key), strict=True)):
        line.append_text(terminal_text([f" {label} "], [n], key)).append(f" {share:.0%}  ")
    return line


def html_page(
    title: str,
    pieces: Sequence[str],
    values: Sequence[int | None],
    key: Key,
    notes: Sequence[str] = (),
) -> str:
    """One page that asks for nothing from outside; every token tells its label as a tooltip.

    Args:
      title: head line.
      pieces, values, key: see `terminal_text`.
      notes: paragraphs below the text, plain.

    Raises:
      DyncompError: see `terminal_text`.
    """
    _check(pieces, values, key)
    tokens = "".join(_token(p, v, key) for p, v in zip(pieces, values, strict=True) if p)
    labels = "".join(
        f'<span class="label" style="background:{key.colour(n)}">{escape(label)}: {share:.0%}</span>'
        for n, (label, share) in enumerate(zip(key.labels, shares(values, key), strict=True))
    )
    below = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return (
        f"{HEAD}<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<h1>{escape(title)}</h1><p>{escape(key.title)}, share of the generated tokens:</p>"
        f"<div>{labels}</div><pre>{tokens}</pre>{below}</main></body></html>\n"
    )


def _token(piece: str, value: int | None, key: Key) -> str:
    text = escape(visible(piece))
    if value is None:
        return f"<span>{text}</span>"  # a newline right after <pre> would be lost
    label = escape(key.labels[value])
    return (
        f'<span class="token" style="background:{key.colour(value)}" title="{label}">{text}</span>'
    )


def _check(pieces: Sequence[str], values: Sequence[int | None], key: Key) -> None:
    if len(pieces) != len(values):
        raise DyncompError(f"{len(pieces)} pieces and {len(values)} values; give one value a piece")
    wrong = [v for v in values if v is not None and not 0 <= v < len(key.labels)]
    if wrong:
        raise DyncompError(f"value {wrong[0]} has no label; Key has {len(key.labels)}")
