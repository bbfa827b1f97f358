"""What an encoder-decoder that leaves early runs, and what that costs.

Events are per example [b]. ``STREAM/tokens``: runs of a block on a token; ``STREAM/pairs``: pairs of its attention;
``STREAM/rule``: tokens compared; ``decoder/words``: runs of a block on a word; ``decoder/pairs`` and
``decoder/memory_pairs``: pairs of its two attentions; ``decoder/memory``: positions of the memory whose keys and values
a layer makes, once, when it first runs; ``decoder/rule``; ``fill/words``: keys and values made in a layer that does not
run; ``head/words``; ``embed/images``. Needed counts real tokens and words; executed counts padding and all layers.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from dyncomp.core.aux import Count, flatten
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.typing import Array, Bool, Float
from dyncomp.exits.saturation import SaturationRule
from dyncomp.models.encoder_decoder import EncoderDecoder

Ran = Mapping[str, Any]
"""Layers run: of each stream [b], ``decoder`` [b t] (0 for words that were not written), ``made`` bool [b l]."""


def _parts(block: Any, d_model: int, length: int) -> tuple[Cost, Cost, dict[str, Cost]]:
    """(a token in a dense block but its pairs, a pair of its self-attention, the cross-attention's prices).

    Raises:
      DyncompError: a block whose cost depends on more than how many tokens there are.
    """
    table = block.cost(d_model, length)
    known = {"projections", "pairs", "pair_blocks", "tokens", "memory", "scored"}
    names = {path.rsplit("/", 1)[-1] for path in flatten(table)}
    if names - known or "projections" not in table["mixer"] or "tokens" not in table["ffn"]:
        raise DyncompError(f"prices are those of dense blocks; events {sorted(names - known)}")
    cross = table.get("cross", {})
    token = table["mixer"]["projections"] + table["ffn"]["tokens"]
    return token + cross.get("projections", Cost(0)), table["mixer"]["pairs"], cross


def prices(net: EncoderDecoder, rule: SaturationRule) -> dict[str, Any]:
    """Price of every event."""
    d, item, row = net.d_model, net.dtypes.compute_itemsize, net.row
    reader, writer = (make(parent=None, dtypes=net.dtypes) for make in net.blocks())
    token, pair, _ = _parts(reader, d, net.patch_tokens)
    word, own, cross = _parts(writer, d, row.answer)
    stream = {"tokens": token, "pairs": pair, "rule": rule.cost(d)}
    names = ("joint",) if net.streams == "joint" else ("image", "text")
    _, g, p = writer.mixer(parent=None, dtypes=net.dtypes).sizes(d)
    head = Cost(2 * d * net.vocab_size, d * item + net.vocab_size * 4)
    embed = Cost(2 * row.pixels * d, row.pixels * 4)
    return {
        **{name: dict(stream) for name in names},
        "decoder": {
            "words": word,
            "pairs": own,
            "memory_pairs": cross["pairs"],
            "memory": cross["memory"],
            "rule": rule.cost(d),
        },
        "fill": {"words": Cost(4 * d * g * p)},
        "head": {"words": head},
        "embed": {"images": embed},
    }


def everything(net: EncoderDecoder, real: Mapping[str, Any], words: tuple[int, int]) -> dict:
    """What runs where nobody leaves."""
    b, t = words
    full = lambda shape, depth: jnp.full(shape, depth, jnp.int32)
    ran: dict[str, Any] = {name: full((b,), net.encoder_depth) for name in real}
    ran["decoder"] = full((b, t), net.decoder_depth)
    return ran | {"made": jnp.ones((b, net.decoder_depth), bool)}


def events(
    net: EncoderDecoder,
    real: Mapping[str, Bool[Array, "b n"]],
    ran: Ran,
    mask: Any = None,
    fills: bool = False,
) -> dict[str, Any]:
    """Counts of every event.

    Args:
      real: of each stream, which positions are no padding.
      ran: see `Ran`.
      mask: [b t], 0 for words that nobody needs.
      fills: whether layers that do not run make keys and values.
    """
    total = lambda x: jnp.sum(x, axis=1, dtype=jnp.int32)
    depth, most = ran["decoder"], net.decoder_depth
    b, t = depth.shape
    counts = lambda needed, executed: Count(needed, jnp.full((b,), executed, jnp.int32))
    wanted = depth > 0 if mask is None else (depth > 0) & mask.astype(bool)
    here = jnp.any(wanted, axis=1)
    found: dict[str, Any] = {}
    memory, slots = jnp.zeros((b,), jnp.int32), 0
    for name, positions in real.items():
        own, n, layers = total(positions), positions.shape[1], net.encoder_depth
        runs = jnp.where(here, ran[name], 0)
        found[name] = {
            "tokens": counts(own * runs, n * layers),
            "pairs": counts(own * own * runs, n * n * layers),
            "rule": counts(own * jnp.minimum(runs, layers - 1), n * (layers - 1)),
        }
        memory, slots = memory + own, slots + n
    depth = jnp.where(wanted, depth, 0)
    behind = jnp.arange(1, t + 1, dtype=jnp.int32)[None]
    made = total(ran["made"] & here[:, None])
    skipped = total(jnp.where(wanted, most - depth, 0)) if fills else jnp.zeros((b,), jnp.int32)
    found["decoder"] = {
        "words": counts(total(depth), t * most),
        "pairs": counts(total(depth * behind), t * t * most),
        "memory_pairs": counts(total(depth) * memory, t * slots * most),
        "memory": counts(made * memory, slots * most),
        "rule": counts(total(jnp.minimum(depth, most - 1)), t * (most - 1)),
    }
    found["fill"] = {"words": counts(skipped, t * (most - 1) if fills else 0)}
    found["head"] = {"words": counts(total(wanted), t)}
    found["embed"] = {"images": counts(here.astype(jnp.int32), 1)}
    return found


def time_share(
    net: EncoderDecoder, real: Mapping[str, Bool[Array, "b n"]], ran: Ran
) -> Float[Array, "b t"]:
    """(n_E + n_D) / (N_E + N_D) of every word; n_E is the mean over positions that are read (ours)."""
    each = {
        name: jnp.sum(positions, axis=1).astype(jnp.float32) for name, positions in real.items()
    }
    spent = [size * ran[name].astype(jnp.float32) for name, size in each.items()]
    encoder = jnp.sum(jnp.stack(spent), axis=0) / jnp.sum(jnp.stack(list(each.values())), axis=0)
    layers = encoder[:, None] + ran["decoder"].astype(jnp.float32)
    return layers / jnp.float32(net.encoder_depth + net.decoder_depth)
