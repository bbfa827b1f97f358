"""Mixers, rotary positions and key/value cache policies."""

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
from dyncomp.attention.patterns import (
    AShape,
    Pattern,
    PerHead,
    TopBlocks,
    VerticalSlash,
    head_errors,
)
from dyncomp.attention.rope import RopeScaling, rope_angles, rotate
from dyncomp.attention.sampled import (
    DroppedWeights,
    KeySets,
    RandomKeys,
    Sampled,
    Sampler,
    ShuffledWindows,
)
from dyncomp.attention.sight import Sight

__all__ = [
    "AShape",
    "Attention",
    "DroppedWeights",
    "FullCache",
    "KVCache",
    "KeySets",
    "Pattern",
    "PerHead",
    "RandomKeys",
    "RopeScaling",
    "Sampled",
    "Sampler",
    "ShuffledWindows",
    "Sight",
    "TopBlocks",
    "VerticalSlash",
    "attend",
    "attend_seen",
    "head_errors",
    "keep_slots",
    "push_newest",
    "replace_newest",
    "rope_angles",
    "rotate",
    "truncate",
]
