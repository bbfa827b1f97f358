"""A sparse pattern for every head of a trained model: searched on one text, kept in a small file, applied."""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dyncomp import attention
from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Int, Variables
from dyncomp.models.apart import bound, with_mixer
from dyncomp.models.decoder_lm import DecoderLM
from dyncomp.models.group import Group
from dyncomp.models.layout import STACKED, is_stacked, stack

KINDS = {
    kind.__name__: kind
    for kind in (
        attention.AShape, attention.Everything, attention.RandomBlocks, attention.TopBlocks,
        attention.VerticalSlash,
    )
}  # fmt: skip
"""Patterns a file may name."""

CROSSOVER = 4096
"""Tokens of a prompt from which patterns pay on two CPU cores (attention/prefill in docs/benchmarks.md)."""


@dataclasses.dataclass(frozen=True)
class HeadPatterns:
    """Which pattern each head of each block has.

    Attributes:
      patterns: what there is; tiles of one size.
      heads: int [l h], an index of ``patterns`` for every block and query head.
    """

    patterns: tuple[Any, ...]
    heads: Any  # lists are taken too

    def __post_init__(self):
        object.__setattr__(self, "heads", np.asarray(self.heads, np.int32))
        if self.heads.ndim != 2 or not self.patterns or self.heads.size == 0:
            raise DyncompError("HeadPatterns: give patterns, and an index for every block and head")
        if self.heads.min() < 0 or self.heads.max() >= len(self.patterns):
            raise DyncompError(
                f"HeadPatterns: index {self.heads.max()} (least {self.heads.min()}) of {len(self.patterns)} patterns"
            )

    def save(self, path: str | Path) -> None:
        """Writes a JSON file."""
        said = [{"kind": type(p).__name__, **dataclasses.asdict(p)} for p in self.patterns]
        if unknown := [one["kind"] for one in said if one["kind"] not in KINDS]:
            raise DyncompError(f"HeadPatterns: a file names {', '.join(KINDS)}, not {unknown[0]}")
        rows = ",\n  ".join(json.dumps(row.tolist()) for row in self.heads)
        Path(path).write_text(
            f'{{"patterns": {json.dumps(said, indent=1)},\n "heads": [\n  {rows}]}}\n'
        )

    @classmethod
    def load(cls, path: str | Path) -> "HeadPatterns":
        """Reads what `save` wrote.

        Raises:
          DyncompError: no such file, or something else in it.
        """
        try:
            told = json.loads(Path(path).read_text())
            patterns = tuple(
                KINDS[one["kind"]](**{key: value for key, value in one.items() if key != "kind"})
                for one in told["patterns"]
            )
            return cls(patterns, np.asarray(told["heads"], np.int32))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DyncompError(
                f"{path} is no file of patterns ({type(error).__name__}: {error}); write one with HeadPatterns.save"
            ) from None

    def released(self, columns: int, blocks: int) -> "HeadPatterns":
        """As the released code rewrites what its search found: no A-shapes and no block-sparse heads are left.

        Args:
          columns: the index that A-shape heads get instead (100 columns, 800 diagonals there).
          blocks: the index that block-sparse heads get (1000 and 6096).
        """
        to = {attention.AShape: columns, attention.TopBlocks: blocks}
        table = np.asarray([to.get(type(p), n) for n, p in enumerate(self.patterns)])
        return HeadPatterns(self.patterns, table[self.heads])


def read_heads(
    model: DecoderLM, variables: Variables, tokens: Int[Array, "b t"]
) -> Iterator[tuple[Array, Array, Array]]:
    """Queries, keys and values of each block over whole texts, dense attention below, block by block.

    Blocks are run one at a time, so that one layer's lie in memory.
    """
    own = nn.meta.unbox(variables)
    own = dict(own) if is_stacked(own) else stack(own)
    places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    x = model.apply({"params": own["params"]}, tokens, places, method="embed")
    for g, group in enumerate(model.groups):
        calls = [_reader(make, model.dtypes) for make in group.blocks]
        for layer in range(group.repeat):
            for j, call in enumerate(calls):
                params = own["params"][f"group_{g}"][STACKED][f"block_{j}"]
                x, heads = call(jax.tree.map(lambda leaf, i=layer: leaf[i], params), x)
                yield heads


@functools.lru_cache(maxsize=64)
def _reader(make: Any, dtypes: DTypes) -> Any:
    """One block with dense attention; compiled once for a factory."""
    change = {"pattern": attention.Everything, "pattern_from": 2}
    block = bound(make, change)(dtypes=dtypes)

    @jax.jit
    def call(params: Any, x: Array) -> tuple[Array, tuple[Array, Array, Array]]:
        y, aux = block.apply({"params": params}, x, capture=("heads",))
        found = aux.plans["mixer"]["heads"]
        return y, (found["q"], found["k"], found["v"])

    return call


def search_patterns(
    layers: Sequence[tuple[Array, Array, Array]],
    patterns: Sequence[Any],
    since: int = 0,
    by: Literal["error", "recall"] = "error",
) -> HeadPatterns:
    """For every head the pattern nearest to dense attention (MInference, algorithm 1).

    Args:
      layers: of one calibration text, what `read_heads` gives.
      patterns: candidates; `attention.fit_slash` makes their costs equal.
      since: queries before this place do not count.
      by: the least "error" of outputs (the paper), or the most attention mass kept, "recall" (the released code).

    Raises:
      DyncompError: another ``by``.
    """
    if by not in ("error", "recall"):
        raise DyncompError(f"search_patterns: by={by!r}; use 'error' or 'recall'")
    found = attention.compare_patterns(layers, patterns, since)
    best = jnp.argmin(found.error, axis=0) if by == "error" else jnp.argmax(found.recall, axis=0)
    return HeadPatterns(tuple(patterns), np.asarray(best, np.int32))


def with_patterns(
    model: DecoderLM, variables: Variables, found: HeadPatterns, pattern_from: int = CROSSOVER
) -> tuple[DecoderLM, Variables]:
    """The model whose heads prefill by their patterns, and its variables; other ``heads`` compile nothing.

    Passes of fewer than ``pattern_from`` positions stay dense: there that is faster.

    Raises:
      DyncompError: not as many rows as blocks.
    """
    pattern = functools.partial(attention.Assigned, found.patterns)
    return with_told(
        model, variables, pattern, [{"heads": row} for row in found.heads], pattern_from
    )


def with_told(
    model: DecoderLM,
    variables: Variables,
    pattern: Any,
    told: Sequence[Mapping[str, Any]] | None = None,
    pattern_from: int = 2,
) -> tuple[DecoderLM, Variables]:
    """All mixers with one pattern, whose run-time choices, if it has any, are ``told`` for each block (``controls``).

    Raises:
      DyncompError: not as many as blocks, or a model with controls of its own.
    """
    if told is not None and len(told) != model.depth:
        raise DyncompError(f"patterns for {len(told)} blocks; the model has {model.depth}")
    changed = with_mixer(model, pattern=pattern, pattern_from=pattern_from)
    own = nn.meta.unbox(variables)
    own = dict(own) if is_stacked(own) else stack(own)
    if own.get("controls"):
        raise DyncompError("the model has run-time controls of its own; patterns go without")
    if told is not None:
        own["controls"] = _controls(changed.groups, told)
    return changed, own


def _controls(groups: Sequence[Group], told: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stacked, where `Attention` finds them."""
    controls, at = {}, 0
    for g, group in enumerate(groups):
        period = len(group.blocks)
        rows = [told[at + j : at + group.repeat * period : period] for j in range(period)]
        parts = {f"block_{j}": {"mixer": {"pattern": _stacked(own)}} for j, own in enumerate(rows)}
        controls[f"group_{g}"] = {STACKED: parts}
        at += group.repeat * period
    return controls


def _stacked(rows: Sequence[Mapping[str, Any]]) -> dict[str, Array]:
    return {key: jnp.stack([jnp.asarray(row[key]) for row in rows]) for key in rows[0]}
