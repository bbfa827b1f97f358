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
from dyncomp.attention.cluster_cache import ClusterCache, evicted, tuned
from dyncomp.attention.cluster_selection import ClusterSelection
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
    "CachePolicy",
    "CacheState",
    "ClusterCache",
    "ClusterSelection",
    "FullCache",
    "KVCache",
    "Pattern",
    "PerHead",
    "RopeScaling",
    "Sight",
    "TopBlocks",
    "VerticalSlash",
    "Work",
    "attend",
    "attend_seen",
    "evicted",
    "head_errors",
    "keep_slots",
    "push_newest",
    "replace_newest",
    "rope_angles",
    "rotate",
    "truncate",
    "tuned",
]
