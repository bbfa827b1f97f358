"""Mixers, rotary positions and key/value cache policies."""

from dyncomp.attention.assigned import Assigned, Everything, FrozenLines
from dyncomp.attention.attend import attend, attend_seen
from dyncomp.attention.attention import Attention
from dyncomp.attention.cache import (
    FullCache,
    KVCache,
    keep_slots,
    push_newest,
    replace_newest,
    truncate,
)
from dyncomp.attention.chosen import Chosen, attend_chosen
from dyncomp.attention.patterns import (
    AShape,
    Pattern,
    PerHead,
    RandomBlocks,
    TopBlocks,
    VerticalSlash,
    head_errors,
)
from dyncomp.attention.rope import RopeScaling, rope_angles, rotate
from dyncomp.attention.search import compare, compare_patterns, fit_slash
from dyncomp.attention.sight import Sight

__all__ = [
    "AShape",
    "Assigned",
    "Attention",
    "Chosen",
    "Everything",
    "FrozenLines",
    "FullCache",
    "KVCache",
    "Pattern",
    "PerHead",
    "RandomBlocks",
    "RopeScaling",
    "Sight",
    "TopBlocks",
    "VerticalSlash",
    "attend",
    "attend_chosen",
    "attend_seen",
    "compare",
    "compare_patterns",
    "fit_slash",
    "head_errors",
    "keep_slots",
    "push_newest",
    "replace_newest",
    "rope_angles",
    "rotate",
    "truncate",
]
