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
from dyncomp.attention.rope import RopeScaling, rope_angles, rotate
from dyncomp.attention.sight import Sight

__all__ = [
    "Attention",
    "FullCache",
    "KVCache",
    "RopeScaling",
    "Sight",
    "attend",
    "attend_seen",
    "keep_slots",
    "push_newest",
    "replace_newest",
    "rope_angles",
    "rotate",
    "truncate",
]
