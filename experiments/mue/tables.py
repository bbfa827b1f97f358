"""One word to every question under every combination of exits, and thresholds that choose among them."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import spearmanr

from dyncomp.core.ledger import Cost, Ledger
from dyncomp.exits.saturation import joined_layers, similarities, time_reduction
from dyncomp.models import saturating_cost

CHUNK, GRID, NEVER, ALWAYS = 500, 11, 2.0, -1.1
Exits = tuple[np.ndarray, ...]
"""Layers run, less 1, [b] each: of every stream, then of the decoder."""


@dataclasses.dataclass(frozen=True)
class Table:
    """One word to every question, whichever layers streams and decoder leave at.

    Attributes:
      net: whose it is.
      said: [p q i b] (without q for a joint encoder), the word where streams leave after p + 1 and q + 1 layers and
        the decoder after i + 1; ``right``: whether it is the answer.
      decoder: likewise, the similarity of decoder layer i + 1.
      streams: name -> [l b], similarity of every layer.
      tokens: name -> [b], positions that are read.
    """

    net: Any
    said: np.ndarray
    right: np.ndarray
    decoder: np.ndarray
    streams: dict[str, np.ndarray]
    tokens: dict[str, np.ndarray]

    @property
    def rows(self) -> np.ndarray:
        """All questions."""
        return np.arange(self.right.shape[-1])

    def alike(self) -> dict[str, np.ndarray]:
        """Similarities [l b] of every stream, and of the decoder behind the whole encoder."""
        return {**self.streams, "decoder": self.decoder[(-1,) * len(self.streams)]}


@functools.partial(jax.jit, static_argnames="net")
def read(net: Any, params: Any, inputs: Any) -> Any:
    """Every stream's states at all depths, and their similarities."""
    read = net.apply({"params": params}, inputs, method="states")
    return read, {name: similarities(x, real) for name, (x, real) in read.items()}


@functools.partial(jax.jit, static_argnames="net")
def one_word(net: Any, params: Any, streams: Any, depths: Any) -> Any:
    """(logits [i b v], similarities [i b], normed states [i b d]) of the first word; depths: name -> layers run."""
    inner, call = net.template(), {"params": params["inner"]}
    left = [x[depths[name]] for name, (x, _) in streams.items()]
    seen = jnp.concatenate([real for _, real in streams.values()], axis=1)
    start = jnp.ones((seen.shape[0], 1), jnp.int32)
    memory = inner.apply(call, *left, method="remember")
    states = inner.apply(call, memory, seen, start, method="decode")
    logits = inner.apply(call, states[1:], method="classify")[:, :, 0]
    return logits, similarities(states), inner.bind(call).final_norm(states[1:])[:, :, 0]


def table_of(net: Any, params: Any, data: Any) -> Table:
    """Runs the encoder once and the decoder behind every combination of exits."""
    depth, parts = net.template().encoder_depth, []
    for start in range(0, len(data["mask"]), CHUNK):
        streams, alike = read(net, params, data["inputs"][start : start + CHUNK])
        found = []
        for exits in itertools.product(range(1, depth + 1), repeat=len(streams)):
            depths = {name: jnp.int32(n) for name, n in zip(streams, exits, strict=True)}
            logits, scores, _ = one_word(net, params, streams, depths)
            found.append((np.asarray(logits).argmax(-1), np.asarray(scores)))
        shape = (depth,) * len(streams)
        said, scores = (np.stack(x).reshape(*shape, *x[0].shape) for x in zip(*found, strict=True))
        tokens = {name: np.asarray(real.sum(1)) for name, (_, real) in streams.items()}
        parts.append((said, scores, jax.device_get(alike), tokens))
    said, scores, alike, tokens = jax.tree.map(lambda *x: np.concatenate(x, axis=-1), *parts)
    return Table(net, said, said == data["targets"][:, 0], scores, alike, tokens)


def first_above(scores: np.ndarray, threshold: float) -> np.ndarray:
    """Index of the first layer [l b] whose similarity exceeds the threshold; the last one asks nothing."""
    leave = scores[:-1] > np.float32(threshold)
    return np.where(leave.any(0), leave.argmax(0), len(scores) - 1)


def exits_of(table: Table, thresholds: dict[str, float]) -> Exits:
    """Where every question leaves."""
    streams = [first_above(s, thresholds.get(n, NEVER)) for n, s in table.streams.items()]
    depth = table.decoder.shape[-2]
    own = np.stack(
        [table.decoder[(*streams, np.full_like(streams[0], i), table.rows)] for i in range(depth)]
    )
    return *streams, first_above(own, thresholds.get("decoder", NEVER))


def reduction_of(table: Table, exits: Exits) -> float:
    """Expected time reduction, percent."""
    ran, sizes = [exit + 1 for exit in exits], list(table.tokens.values())
    encoder = (
        joined_layers(ran[0], ran[1], int(sizes[0][0]), sizes[1]) if len(sizes) == 2 else ran[0]
    )
    words, depth = np.ones((len(encoder), 1), bool), table.net.template().encoder_depth
    return 100.0 * time_reduction(encoder.astype(float), ran[-1][:, None], words, (depth, depth))


def flops_of(table: Table, exits: Exits, rule: bool = True, heads: Any = None) -> int:
    """FLOPs of all questions by the ledger: the encoder once; the output projection once, or ``heads`` [b] times."""
    net, layers = table.net.template(), jnp.asarray(exits[-1] + 1, jnp.int32)[:, None]
    real = {
        name: jnp.arange(n.max())[None] < jnp.asarray(n)[:, None]
        for name, n in table.tokens.items()
    }
    ran = {
        name: jnp.asarray(e + 1, jnp.int32) for name, e in zip(table.tokens, exits, strict=False)
    }
    ran |= {"decoder": layers, "made": jnp.arange(net.decoder_depth)[None] < layers}
    prices = table.net.cost(())
    if not rule:
        for part in (*table.tokens, "decoder"):
            prices[part] = {**prices[part], "rule": Cost(0)}
    extra = 0 if heads is None else int(np.sum(heads) - len(layers)) * prices["head"]["words"].flops
    events = jax.device_get(saturating_cost.events(net, real, ran))
    return Ledger(prices).record(events).total() + extra


def score(table: Table, exits: Exits, rule: bool = True, heads: Any = None) -> dict[str, float]:
    """All figures of one way to leave. ``rule``: similarities are computed; ``heads``: see `flops_of`."""
    last = table.net.template().encoder_depth - 1
    whole = flops_of(table, tuple(np.full_like(e, last) for e in exits), False)
    return {
        "accuracy": 100.0 * float(table.right[(*exits, table.rows)].mean()),
        "reduction": reduction_of(table, exits),
        "flops": flops_of(table, exits, rule, heads) / whole,
        **{
            n: float((exits[i] + 1).mean())
            for n, i in (("image", 0), ("text", -2), ("decoder", -1))
        },
    }


def at_layers(table: Table, *depths: int, rule: bool = False) -> dict[str, float]:
    """Everyone leaves at the same layers."""
    return score(table, tuple(np.full(len(table.rows), depth) for depth in depths), rule)


# ---- thresholds from held-out data


def candidates(scores: np.ndarray) -> np.ndarray:
    """Never, quantiles of the similarities [l b] of layers that may be left, always."""
    own = np.quantile(scores[:-1], np.linspace(1, 0, GRID - 1)[1:])
    return np.asarray([NEVER, *own, ALWAYS])


def tried(table: Table) -> list[tuple[float, float, dict[str, float]]]:
    """(reduction, accuracy, thresholds) of all combinations of candidates on held-out questions."""
    sets, found = {name: candidates(s) for name, s in table.alike().items()}, []
    for values in itertools.product(*sets.values()):
        thresholds = dict(zip(sets, map(float, values), strict=True))
        exits = exits_of(table, thresholds)
        found.append(
            (
                reduction_of(table, exits),
                float(table.right[(*exits, table.rows)].mean()),
                thresholds,
            )
        )
    return found


def choose(found: list[Any], target: float) -> dict[str, float]:
    """The thresholds with the best accuracy among those that reach ``target`` percent, with half a percent to spare."""
    return max((f for f in found if f[0] >= target + 0.5), key=lambda f: f[1])[2]


def ranks(table: Table) -> dict[str, float]:
    """Rank correlation of depth and mean similarity, of every stream."""
    means = {name: scores.mean(1) for name, scores in table.alike().items()}
    return {f"rank_{n}": float(spearmanr(range(len(c)), c).statistic) for n, c in means.items()}
