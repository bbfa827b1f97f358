"""Writes docs/figures/coloured_depth.html and coloured_drafts.html, and a picture of each where chromium is there::

    dyncomp train-exits MODEL exits.safetensors --exits 6,12,18,24
    python docs/figures/coloured.py MODEL exits.safetensors

The model continues a function, greedily, and each token has the colour of what produced it: the blocks it ran, with
exits; or who wrote it, the model's first blocks as a draft that the whole model agreed with, or the whole model.
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from dyncomp import pretrained
from dyncomp.decoding import (
    ExitAndCatchUp,
    ExitMaps,
    FirstLayers,
    Generator,
    MappedHead,
    SpeculativeGenerator,
)
from dyncomp.decoding.text import token_pieces
from dyncomp.report.coloured import Key, html_page

HERE = Path(__file__).resolve().parent
PROMPT = '''\
class Stack:
    """A last-in, first-out stack."""

    def __init__(self):
        self.items = []

    def push(self, item):'''
NEW, THRESHOLD, DRAFT = 95, 0.9, 12
NAME = "SmolLM2-135M-Instruct"


def depth_page(loaded: Any, maps: ExitMaps, prompt: list[int]) -> str:
    """Tokens by the blocks they ran."""
    policy = ExitAndCatchUp(maps.exits, MappedHead())
    variables = maps.variables(loaded.variables)
    generator = Generator(loaded.model, variables, policy, eos=loaded.eos_ids)
    controls = np.full(len(maps.exits), THRESHOLD, np.float32)
    (one,) = generator.generate([prompt], NEW, controls=controls)
    depth = loaded.model.depth
    edges = [*maps.exits, depth]
    labels = (*(f"{n} blocks" for n in maps.exits), f"all {depth} blocks")
    full = Generator(loaded.model, loaded.variables, eos=loaded.eos_ids)
    (own,) = full.generate([prompt], NEW)
    pairs = enumerate(zip(one.tokens, own.tokens, strict=False))
    same = next((n for n, (a, b) in pairs if a != b), len(own.tokens))
    spent = generator.ledger.total("needed") / full.ledger.total("needed")
    head = loaded.model.cost((1, 1))["head"]["tokens"].flops
    block = (full.ledger.total("needed") / (len(own.tokens) - 1) - head) / depth
    notes = [
        f"{NAME} leaves after a block where the exit's highest probability reaches {THRESHOLD}; blocks that were left "
        f"out catch up when a later token needs them. Mean: {np.mean(one.depths):.1f} of {depth} blocks a token.",
        f"{same} of {len(one.tokens)} tokens come before the first that full depth would not write. "
        "One example; docs/decoding.md has figures on held-out documents.",
        f"No work is saved here: reading a head of {loaded.model.vocab_size} tokens costs as much as "
        f"{head / block:.0f} blocks of so small a model, and all in all this took {spent:.2f} times the operations of "
        "full depth.",
    ]
    return page("Code coloured by depth", loaded, one.tokens, [edges.index(d) for d in one.depths],
                Key("Blocks that a token ran", labels), notes)  # fmt: skip


def drafts_page(loaded: Any, maps: ExitMaps, prompt: list[int]) -> str:
    """Tokens by who wrote them."""
    place = maps.exits.index(DRAFT)
    own = ExitMaps((DRAFT,), maps.maps[place : place + 1])
    drafter = FirstLayers(DRAFT, MappedHead())
    variables = own.variables(loaded.variables)
    generator = SpeculativeGenerator(loaded.model, variables, drafter, eos=loaded.eos_ids)
    (one,) = generator.generate([prompt], NEW)
    depth = loaded.model.depth
    who = [1]  # the prompt's pass gives the first token
    for kept in one.accepted:
        who += [0] * kept + [1]
    labels = (f"drafted by the first {DRAFT} blocks", f"written by all {depth}")
    notes = [
        f"The first {DRAFT} blocks of {NAME} draft some tokens, all {depth} check them at once, keep what they would "
        "have said, and write the next token themselves: the text is the model's own, token for token.",
        f"{len(one.accepted)} checks for {len(one.tokens)} tokens; "
        f"{sum(one.accepted)} of {sum(one.drafted)} drafts were kept.",
    ]
    key = Key("Who wrote a token", labels, ordered=False)
    return page(
        "Code coloured by who wrote it", loaded, one.tokens, who[: len(one.tokens)], key, notes
    )


def page(title: str, loaded: Any, tokens: list[int], values: list[int], key: Key, notes: list[str]) -> str:  # fmt: skip
    """The page of a continuation; the prompt has no colour."""
    pieces = token_pieces(loaded.tokenizer, tokens)
    return html_page(title, [PROMPT, *pieces], [None, *values], key, notes)


def screenshot(path: Path) -> None:
    """A picture of a page beside it."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        print(f"no chromium: {path.with_suffix('.png').name} stays as it is")
        return
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=900,820"]
        out = f"--screenshot={path.with_suffix('.png')}"
        command = [chromium, *options, f"--user-data-dir={profile}", out, path.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)


def main() -> None:
    """Writes both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("maps")
    args = parser.parse_args()
    loaded, maps = pretrained.load(args.model), ExitMaps.load(args.maps)
    maps.check(loaded.model)
    assert loaded.tokenizer is not None
    prompt = loaded.tokenizer.encode(PROMPT)
    for name, make in (("coloured_depth", depth_page), ("coloured_drafts", drafts_page)):
        path = HERE / f"{name}.html"
        path.write_text(make(loaded, maps, prompt), encoding="utf-8")
        screenshot(path)


if __name__ == "__main__":
    main()
