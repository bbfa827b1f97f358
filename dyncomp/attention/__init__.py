"""Mixers, rotary positions and key/value cache policies."""

from dyncomp.attention.attention import Attention, attend
from dyncomp.attention.cache import (
    FullCache,
    KVCache,
    keep_slots,
    push_newest,
    replace_newest,
    truncate,
)
from dyncomp.attention.rope import RopeScaling, rope_angles, rotate

__all__ = [
    "Attention",
    "FullCache",
    "KVCache",
    "RopeScaling",
    "attend",
    "keep_slots",
    "push_newest",
    "replace_newest",
    "rope_angles",
    "rotate",
    "truncate",
]
