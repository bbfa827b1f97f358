"""Mixers, rotary positions and key/value cache policies."""

from dyncomp.attention.attend import attend, attend_seen
from dyncomp.attention.attention import Attention
from dyncomp.attention.bilevel import BiLevelRouting, RegionPlan
from dyncomp.attention.cache import (
    FullCache,
    KVCache,
    keep_slots,
    push_newest,
    replace_newest,
    truncate,
)
from dyncomp.attention.depthwise import DepthwiseConv
from dyncomp.attention.patterns import (
    AShape,
    Pattern,
    PerHead,
    TopBlocks,
    VerticalSlash,
    head_errors,
)
from dyncomp.attention.regions import Regions
from dyncomp.attention.rope import RopeScaling, rope_angles, rotate
from dyncomp.attention.sight import Sight

__all__ = [
    "AShape",
    "Attention",
    "BiLevelRouting",
    "DepthwiseConv",
    "FullCache",
    "KVCache",
    "Pattern",
    "PerHead",
    "RegionPlan",
    "Regions",
    "RopeScaling",
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
