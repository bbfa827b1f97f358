"""Every block of a model a factory of its own, so that each can have another mixer or network."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Variables
from dyncomp.models.decoder_lm import DecoderLM
from dyncomp.models.group import Group
from dyncomp.models.layout import STACKED, is_stacked, stack


def apart(model: DecoderLM, variables: Variables) -> tuple[DecoderLM, Variables]:
    """The same model with one group of as many blocks as each group has in all, repeated once; no number changes.

    Args:
      variables: stacked or separate; come back stacked, and without metadata.
    """
    own = nn.meta.unbox(variables)
    own = dict(own) if is_stacked(own) else stack(own)
    groups = [Group(tuple(group.blocks) * group.repeat) for group in model.groups]
    moved = {name: _apart(tree, model) for name, tree in own.items()}
    return model.clone(groups=groups), moved


def _apart(tree: Mapping[str, Any], model: DecoderLM) -> dict[str, Any]:
    found = dict(tree)
    for g, group in enumerate(model.groups):
        if f"group_{g}" not in tree:
            continue
        period = tree[f"group_{g}"][STACKED]
        found[f"group_{g}"] = {
            STACKED: {
                f"block_{layer * len(group.blocks) + j}": jax.tree.map(
                    lambda leaf, i=layer: leaf[i : i + 1], period[f"block_{j}"]
                )
                for layer in range(group.repeat)
                for j in range(len(group.blocks))
                if f"block_{j}" in period
            }
        }
    return found


def with_mixers(model: DecoderLM, changes: Sequence[Mapping[str, Any]]) -> DecoderLM:
    """A model that is `apart` with other bindings of each block's mixer, in order: ``{"pattern": ...}``.

    Raises:
      DyncompError: as many changes as blocks are needed, and blocks that are partials with a ``mixer`` that is one.
    """
    blocks = [block for group in model.groups for block in group.blocks]
    if len(changes) != len(blocks) or any(group.repeat > 1 for group in model.groups):
        raise DyncompError(
            f"with_mixers: {len(changes)} changes for {len(blocks)} blocks; take the model of `apart`, a change a block"
        )
    rest = iter(changes)
    groups = [Group([bound(block, next(rest)) for block in group.blocks]) for group in model.groups]
    return model.clone(groups=groups)


def with_mixer(model: DecoderLM, **change: Any) -> DecoderLM:
    """Any model with other bindings of all its mixers alike: ``with_mixer(model, cache=...)``; layers stay as they lie.

    Raises:
      DyncompError: a block is no functools.partial with a ``mixer`` that is one.
    """
    groups = [Group([bound(block, change) for block in g.blocks], g.repeat) for g in model.groups]
    return model.clone(groups=groups)


def bound(block: Any, change: Mapping[str, Any]) -> Any:
    """A block's factory with other bindings of its mixer.

    Raises:
      DyncompError: it is no functools.partial with a ``mixer`` that is one.
    """
    mixer = getattr(block, "keywords", {}).get("mixer")
    if mixer is None:
        raise DyncompError("with_mixer: a block is no functools.partial with a mixer; bind it so")
    return functools.partial(block, mixer=functools.partial(mixer, **change))
