"""Coloured text: nothing of a model's output acts as markup, and colours stay readable."""

import io
from html.parser import HTMLParser

import pytest
from rich.console import Console

from dyncomp.core.errors import DyncompError
from dyncomp.report.coloured import (
    HUES,
    INK,
    Key,
    html_page,
    shares,
    terminal_legend,
    terminal_text,
)

KEY = Key("blocks that ran", ("6 blocks", "12 blocks", "30 blocks"))
PIECES = ["def f(x):\n", "\t<b>&amp;", "", "\x1b[31m'\"é", "  \n"]
VALUES = [None, 0, 1, 2, 2]


class Reader(HTMLParser):
    """What a browser makes of a page: text below <pre>, tooltips, tags."""

    def __init__(self, page):
        super().__init__()
        self.text, self.titles, self.tags, self._inside = "", [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._inside |= tag == "pre"
        self.titles += [value for name, value in attrs if name == "title"]

    def handle_endtag(self, tag):
        self._inside &= tag != "pre"

    def handle_data(self, data):
        self.text += data if self._inside else ""


def printed(text, monkeypatch, **options):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in options.pop("env", {}).items():
        monkeypatch.setenv(name, value)
    out = io.StringIO()
    console = Console(file=out, width=200, **options)
    console.print(text, soft_wrap=True, end="")
    return out.getvalue()


def test_a_page_keeps_every_character_and_escapes_it():
    page = html_page("<i>code</i>", PIECES, VALUES, KEY, ["a < b"])
    found = Reader(page)
    assert found.text == "def f(x):\n\t<b>&amp;␛[31m'\"é  \n"
    assert found.titles == ["6 blocks", "30 blocks", "30 blocks"]
    assert not {"b", "i", "script"} & set(found.tags)
    assert "&lt;i&gt;code" in page and "a &lt; b" in page and "http" not in page.split("<style>")[1]


def test_a_terminal_gets_colours_and_a_file_gets_text(monkeypatch):
    text = terminal_text(PIECES, VALUES, KEY)
    plain = "def f(x):\n        <b>&amp;␛[31m'\"é  \n"
    shown = printed(text, monkeypatch, force_terminal=True, color_system="truecolor")
    assert "\x1b[38;2;20;24;29;48;2;" in shown and "\x1b[31m" not in shown
    assert printed(text, monkeypatch) == plain
    quiet = printed(text, monkeypatch, force_terminal=True, env={"NO_COLOR": "1"})
    assert quiet == plain


def test_the_legend_names_labels_and_shares(monkeypatch):
    assert shares(VALUES, KEY) == [0.25, 0.25, 0.5]
    line = printed(terminal_legend(VALUES, KEY), monkeypatch)
    assert line.split() == "blocks that ran: 6 blocks 25% 12 blocks 25% 30 blocks 50%".split()
    assert shares([None], KEY) == [0, 0, 0]
    assert "30 blocks: 50%" in html_page("t", PIECES, VALUES, KEY)


def luminance(colour):
    parts = (part / 255 for part in bytes.fromhex(colour[1:]))
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_colour_is_readable_and_shades_darken():
    deep = Key("depth", tuple(str(n) for n in range(31)))
    light = [luminance(deep.colour(n)) for n in range(31)]
    assert light == sorted(light, reverse=True) and len(set(light)) == 31
    for value in [*light, *map(luminance, HUES)]:
        assert (value + 0.05) / (luminance(INK) + 0.05) >= 7  # WCAG 2, level AAA
    assert Key("one", ("all",)).colour(0) == deep.colour(0)


def test_errors_name_the_fix():
    with pytest.raises(DyncompError, match="one value a piece"):
        terminal_text(["a"], [], KEY)
    with pytest.raises(DyncompError, match="value 3 has no label"):
        html_page("t", ["a"], [3], KEY)
    with pytest.raises(DyncompError, match="at most 6"):
        Key("kinds", tuple("abcdefg"), ordered=False)
