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
from dyncomp.attention.clusters import ClusterPlan
from dyncomp.attention.kmeans import AngularHash, KMeans, RandomClusters
from dyncomp.attention.mixed_heads import MixedHeads
from dyncomp.attention.patterns import (
    AShape,
    Pattern,
    PerHead,
    TopBlocks,
    VerticalSlash,
    head_errors,
)
from dyncomp.attention.rope import RopeScaling, rope_angles, rotate
from dyncomp.attention.routed import RoutedAttention
from dyncomp.attention.sight import Sight

__all__ = [
    "AShape",
    "AngularHash",
    "Attention",
    "ClusterPlan",
    "FullCache",
    "KMeans",
    "KVCache",
    "MixedHeads",
    "Pattern",
    "PerHead",
    "RandomClusters",
    "RopeScaling",
    "RoutedAttention",
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
