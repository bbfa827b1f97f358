"""Mixers, rotary positions and key/value cache policies."""

from dyncomp.attention.attention import Attention, attend
from dyncomp.attention.cache import FullCache, KVCache
from dyncomp.attention.rope import rope_angles, rotate

__all__ = ["Attention", "FullCache", "KVCache", "attend", "rope_angles", "rotate"]
