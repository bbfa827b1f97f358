"""The ways in which ``dyncomp generate`` writes: one model, with exits or without blocks, or two models."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from dyncomp.core.errors import DyncompError

BITS = 2.0
"""Entropy above which the large model of a pair writes."""


@dataclasses.dataclass(frozen=True)
class Way:
    """How a text is written.

    Attributes:
      generator: a driver of `decoding`.
      options: of its ``generate``.
      alone: one prompt after the other: rows of a batch would wait for each other, or can't be one.
      key: what colours of tokens mean; None where all tokens come alike.
      place: of a step and a row, the token's place in ``key``.
      about: for the page.
    """

    generator: Any
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    alone: bool = False
    key: Any = None
    place: Callable[[Any, int], int] | None = None
    about: str = ""


def check(args: argparse.Namespace) -> None:
    """Looks for options that would do nothing or contradict each other.

    Raises:
      DyncompError: names them.
    """
    ways = {"--exits": args.exits, "--speedup": args.speedup != 1, "--draft": args.draft}
    asked = [name for name, value in {**ways, "--small": args.small}.items() if value]
    if len(asked) > 1:
        raise DyncompError(f"{' and '.join(asked)} each say how to write; give one of them")
    plain = not asked or asked == ["--speedup"]
    if plain and (args.threshold is not None or args.colour or args.html):
        raise DyncompError(
            "--threshold, --colour and --html need --exits, --draft or --small: else all tokens come alike"
        )
    if args.draft and args.threshold is not None:
        raise DyncompError("--threshold is of --exits and --small; a draft has none, leave it out")
    if args.exits and args.threshold is not None and not 0 <= args.threshold <= 1:
        raise DyncompError(f"--threshold {args.threshold}: give a probability, 0 to 1")


def way(args: argparse.Namespace, loaded: Any, sampler: Any) -> Way:
    """What ``args`` ask for, with the model that was loaded."""
    if args.exits:
        return _exits(args, loaded, sampler)
    if args.draft:
        return _draft(args, loaded, sampler)
    if args.small:
        return _switch(args, loaded, sampler)
    from dyncomp.decoding import FullDepth, Generator, KeepLayers
    from dyncomp.depth import evenly

    every, depth = args.speedup, loaded.model.depth
    policy = FullDepth() if every == 1 else KeepLayers(tuple(evenly(depth, every)))
    return Way(Generator(loaded.model, loaded.variables, policy, sampler, loaded.eos_ids))


def _exits(args: argparse.Namespace, loaded: Any, sampler: Any) -> Way:
    import numpy as np

    from dyncomp.decoding import ExitAndCatchUp, ExitMaps, Generator, MappedHead
    from dyncomp.report.coloured import Key

    maps, depth = ExitMaps.load(args.exits), loaded.model.depth
    maps.check(loaded.model)
    policy, variables = ExitAndCatchUp(maps.exits, MappedHead()), maps.variables(loaded.variables)
    threshold = 0.9 if args.threshold is None else args.threshold
    places = [*maps.exits, depth]
    return Way(
        Generator(loaded.model, variables, policy, sampler, loaded.eos_ids),
        {"controls": np.full(len(maps.exits), threshold, np.float32)},
        alone=True,
        key=Key("blocks run", (*(f"{n} blocks" for n in maps.exits), f"all {depth} blocks")),
        place=lambda tick, row: places.index(int(tick.depths[row])),
        about=f"exits {args.exits}, threshold {threshold}",
    )


def _draft(args: argparse.Namespace, loaded: Any, sampler: Any) -> Way:
    from dyncomp.decoding import SpeculativeGenerator
    from dyncomp.report.coloured import Key

    drafter, eos = _drafter(args, loaded), loaded.eos_ids
    return Way(
        SpeculativeGenerator(loaded.model, loaded.variables, drafter, sampler, eos=eos),
        key=Key("written by", ("the draft, and the model agreed", "the model"), ordered=False),
        place=lambda tick, row: 0 if tick.guessed[row] else 1,
        about=f"draft {args.draft}",
    )


def _drafter(args: argparse.Namespace, loaded: Any) -> Any:
    """``skip:N``, ``first:N`` or another model."""
    from dyncomp.decoding import FirstLayers, OtherModel, SkipLayers
    from dyncomp.depth import evenly

    kind, _, count = args.draft.partition(":")
    if kind not in ("skip", "first"):
        return OtherModel(*_other(args.draft, args, loaded))
    if not count.isdecimal() or int(count) < 1:
        raise DyncompError(f"--draft {args.draft}: write a number of blocks, such as {kind}:2")
    if kind == "first":
        return FirstLayers(int(count))
    return SkipLayers(tuple(evenly(loaded.model.depth, int(count))))


def _switch(args: argparse.Namespace, loaded: Any, sampler: Any) -> Way:
    from dyncomp.decoding import EntropySwitch, SwitchingGenerator
    from dyncomp.report.coloured import Key

    small, large = _other(args.small, args, loaded), (loaded.model, loaded.variables)
    bits = BITS if args.threshold is None else args.threshold
    return Way(
        SwitchingGenerator(small, large, EntropySwitch(), sampler, loaded.eos_ids),
        {"threshold": bits},
        alone=True,
        key=Key("written by", ("the small model", "the large model"), ordered=False),
        place=lambda tick, row: int(tick.model[row]),
        about=f"small model {args.small}, threshold {bits} bits",
    )


def _other(path: str, args: argparse.Namespace, loaded: Any) -> tuple[Any, Any]:
    """A second model with the same tokens."""
    from dyncomp import pretrained

    other = pretrained.load(path, dtype=args.dtype)
    pretrained.check_pair(loaded, other)
    return other.model, other.variables
