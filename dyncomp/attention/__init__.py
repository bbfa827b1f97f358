"""Mixers, rotary positions and key/value cache policies."""

from dyncomp.attention.asked import Asked, Work
from dyncomp.attention.attend import attend, attend_seen
from dyncomp.attention.attention import Attention
from dyncomp.attention.cache import (
    CachePolicy,
    CacheState,
    FullCache,
    KVCache,
    keep_slots,
    push_newest,
    replace_newest,
    truncate,
)
from dyncomp.attention.importance import Chosen, Importance, key_mass
from dyncomp.attention.important import ImportantTokens, important_attention
from dyncomp.attention.mixed_bytes import Bytes, cache_bytes
from dyncomp.attention.mixed_precision import MixedCache, MixedPrecision
from dyncomp.attention.patterns import (
    AShape,
    Pattern,
    PerHead,
    TopBlocks,
    VerticalSlash,
    head_errors,
)
from dyncomp.attention.rope import RopeScaling, rope_angles, rotate
from dyncomp.attention.sight import Sight

__all__ = [
    "AShape",
    "Asked",
    "Attention",
    "Bytes",
    "CachePolicy",
    "CacheState",
    "Chosen",
    "FullCache",
    "Importance",
    "ImportantTokens",
    "KVCache",
    "MixedCache",
    "MixedPrecision",
    "Pattern",
    "PerHead",
    "RopeScaling",
    "Sight",
    "TopBlocks",
    "VerticalSlash",
    "Work",
    "attend",
    "attend_seen",
    "cache_bytes",
    "head_errors",
    "important_attention",
    "keep_slots",
    "key_mass",
    "push_newest",
    "replace_newest",
    "rope_angles",
    "rotate",
    "truncate",
]
