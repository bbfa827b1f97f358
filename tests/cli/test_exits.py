"""Exit maps on the command line: training them, leaving early by them, colouring what came out."""

import json
import math
import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.cli.coloured import ColouredTranscript
from dyncomp.cli.main import main
from dyncomp.decoding import ExitMaps
from dyncomp.decoding.generated import Tick
from dyncomp.report.coloured import Key

THRESHOLD = "0.03"
"""The tiny model's tokens then leave at every exit now and then (a test checks)."""
PROMPT = ["--prompt", "def f(", "--max-new", "8"]


@pytest.fixture
def maps(tmp_path):
    """Zero maps: the raw states through the last head."""
    path = tmp_path / "exits.safetensors"
    ExitMaps((1, 3), jnp.zeros((2, 32, 32))).save(path)
    return str(path)


def said(capsys):
    return json.loads(capsys.readouterr().out)


def test_training_writes_maps_that_generate_takes(tiny_model, tmp_path, capsys):
    text = tmp_path / "text"
    text.mkdir()
    for n in range(60):
        (text / f"{n}.txt").write_text(f"{n} the same few words, again and again. " * 8)
    out = str(tmp_path / "new" / "exits.safetensors")
    small = ["--tokens", "2048", "--held-out", "256", "--window", "32", "--text", str(text)]
    assert main(["train-exits", str(tiny_model), out, "--exits", "1,3", *small, "--json"]) == 0
    found = said(capsys)
    assert [row["blocks"] for row in found["exits"]] == [1, 3, 4] and found["held_out"] == 8 * 30
    for row in found["exits"][:-1]:
        assert row["agreement"] > row["raw_agreement"]
    assert found["exits"][-1]["agreement"] == 1
    rows = ["--prompt", "a", "--prompt", "import os", "--max-new", "4", "--exits", out]
    assert main(["generate", str(tiny_model), *rows, "--threshold", "0", "--colour"]) == 0
    found = capsys.readouterr()
    assert found.out.startswith("--- a\n") and "\n--- import os\n" in found.out
    # The first token comes with the prompt.
    assert re.search(r"1 blocks +75% +3 blocks +0% +all 4 blocks +25%", found.err)


def test_colours_in_a_pipe_are_text_and_a_page_has_them(tiny_model, maps, tmp_path, capsys):
    page = tmp_path / "page.html"
    arguments = ["generate", str(tiny_model), *PROMPT, "--exits", maps, "--threshold", "0"]
    assert main([*arguments, "--colour", "--html", str(page)]) == 0
    piped = capsys.readouterr()
    assert "\x1b" not in piped.out and "1 blocks" in piped.err and "all 4 blocks" in piped.err
    html = page.read_text()
    assert '<span>def f(</span><span class="token"' in html and 'title="1 blocks"' in html


def test_several_prompts_say_what_each_says_alone(tiny_model, maps, capsys):
    """In a batch all rows would wait for the one that stays longest."""
    arguments = ["generate", str(tiny_model), "--max-new", "8", "--exits", maps, "--json"]
    arguments += ["--threshold", THRESHOLD, "--temperature", "1"]
    texts = ["a", "import os", "def f("]
    alone = []
    for text in texts:
        assert main([*arguments, "--prompt", text]) == 0
        alone.append(said(capsys))
    assert main([*arguments, *(word for text in texts for word in ("--prompt", text))]) == 0
    together = said(capsys)
    assert together["generated"] == [one["generated"][0] for one in alone]
    spent = math.fsum(one["gflops_generated"] for one in alone)
    assert together["gflops_generated"] == pytest.approx(spent, rel=1e-12)
    assert len({tuple(one["depths"]) for one in together["generated"]}) > 1


class Bytes:
    """A token a byte."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def written(text, depths):
    """A row that is painted as it comes, the model having 4 blocks and exits after 1 and 3."""
    places = [1, 3, 4]
    key = Key("blocks run", ("1 block", "3 blocks", "all 4 blocks"))
    place = lambda tick, row: places.index(tick.depths[row])
    made = ColouredTranscript(Bytes(), 1, ["END"], key, place, True)
    one = lambda value: np.array([value])
    for byte, depth in zip(text.encode(), depths, strict=True):
        made(Tick(one(byte), one(True), one(depth), one(False), one(False)))
    made.finish()
    return made


def test_painting_follows_tokens_that_were_held_back(capsys, monkeypatch):
    made = written("éE\tNd", [1, 3, 4, 4, 1, 3])
    assert capsys.readouterr().out == "éE\tNd"
    assert made.tokens(0) == (["", "é", "E", "\t", "N", "d"], [0, 1, 2, 2, 0, 1])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    made = written("abcEND", [1, 4, 3, 3, 3, 3])
    shown = capsys.readouterr().out
    assert re.sub(r"\x1b\[[\d;]*m", "", shown) == "abc"
    for letter, value in zip("abc", (0, 2, 1), strict=True):
        paper = ";".join(str(part) for part in bytes.fromhex(made.key.colour(value)[1:]))
        assert f"48;2;{paper}m{letter}" in shown


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--colour"], "need --exits"),
        (["--threshold", "0.5"], "need --exits"),
        (["--html", "x.html"], "need --exits"),
        (["--exits", "MAPS", "--speedup", "2"], "give one of them"),
        (["--exits", "MAPS", "--threshold", "2"], "0 to 1"),
        (["--exits", "MAPS", "--colour", "--json"], "leave out --colour"),
        (["--exits", "MAPS", "--html", "x", "--prompt", "b"], "one --prompt"),
        (["--exits", "NARROW"], "width of 16, the model's is 32"),
        (["--exits", "DEEP"], "from 1 to 3"),
        (["--exits", "OTHER"], "no exit maps"),
        (["--exits", "missing"], "No such file"),
    ],
)
def test_errors_are_one_line(tiny_model, maps, tmp_path, capsys, extra, message):
    ExitMaps((1,), jnp.zeros((1, 16, 16))).save(tmp_path / "narrow")
    ExitMaps((4,), jnp.zeros((1, 32, 32))).save(tmp_path / "deep")
    files = {"MAPS": maps, "NARROW": tmp_path / "narrow", "DEEP": tmp_path / "deep"}
    files["OTHER"] = tiny_model / "model.safetensors"
    extra = [str(files.get(word, word)) for word in extra]
    assert main(["generate", str(tiny_model), "--prompt", "a", *extra]) == 1
    told = capsys.readouterr().err.strip()
    assert message in told and len(told.splitlines()) == 1


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--exits", "a"], "such as 12,18"),
        (["--exits", "4"], "from 1 to 3"),
        (["--exits", "1", "--window", "100000"], "smaller --window"),
    ],
)
def test_errors_of_training_are_one_line(tiny_model, tmp_path, capsys, extra, message):
    text = tmp_path / "text.txt"
    text.write_text("line of some text\n" * 20000)
    out = [str(tmp_path / "out"), "--text", str(text), "--tokens", "512", "--held-out", "64"]
    assert main(["train-exits", str(tiny_model), *out, "--window", "16", *extra]) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in told and not (tmp_path / "out").exists()
