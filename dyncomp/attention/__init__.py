"""Mixers, rotary positions and key/value cache policies."""

from dyncomp.attention.asked import Asked, Work
from dyncomp.attention.assigned import Assigned, Everything, FrozenLines
from dyncomp.attention.attend import attend, attend_seen
from dyncomp.attention.attention import Attention
from dyncomp.attention.bilevel import BiLevelRouting, RegionPlan
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
from dyncomp.attention.chosen import Chosen, attend_chosen
from dyncomp.attention.cluster_cache import ClusterCache, evicted, tuned
from dyncomp.attention.cluster_selection import ClusterSelection
from dyncomp.attention.clusters import ClusterPlan
from dyncomp.attention.cross import CrossAttention
from dyncomp.attention.depthwise import DepthwiseConv
from dyncomp.attention.forgetting import SinkWindow
from dyncomp.attention.hitters import HeavyHitters
from dyncomp.attention.importance import Importance, Split, key_mass
from dyncomp.attention.important import ImportantTokens, important_attention
from dyncomp.attention.kmeans import AngularHash, KMeans, RandomClusters
from dyncomp.attention.media import MediaAttention
from dyncomp.attention.mixed_bytes import Bytes, cache_bytes
from dyncomp.attention.mixed_heads import MixedHeads
from dyncomp.attention.mixed_precision import MixedCache, MixedPrecision
from dyncomp.attention.patterns import (
    AShape,
    Pattern,
    PerHead,
    RandomBlocks,
    TopBlocks,
    VerticalSlash,
    head_errors,
)
from dyncomp.attention.regions import Regions
from dyncomp.attention.ring import ring_attention
from dyncomp.attention.rope import RopeScaling, rope_angles, rotate
from dyncomp.attention.routed import RoutedAttention
from dyncomp.attention.row_cache import RowCache, RowSlots, copy_slot
from dyncomp.attention.sampled import (
    DroppedWeights,
    KeySets,
    RandomKeys,
    Sampled,
    Sampler,
    ShuffledWindows,
)
from dyncomp.attention.search import compare, compare_patterns, fit_slash
from dyncomp.attention.sight import Sight
from dyncomp.attention.token_cache import TokenCache
from dyncomp.attention.token_selection import TokenSelection

__all__ = [
    "AShape",
    "AngularHash",
    "Asked",
    "Assigned",
    "Attention",
    "BiLevelRouting",
    "Bytes",
    "CachePolicy",
    "CacheState",
    "Chosen",
    "ClusterCache",
    "ClusterPlan",
    "ClusterSelection",
    "CrossAttention",
    "MediaAttention",
    "DepthwiseConv",
    "DroppedWeights",
    "Everything",
    "FrozenLines",
    "FullCache",
    "HeavyHitters",
    "Importance",
    "ImportantTokens",
    "KMeans",
    "KVCache",
    "KeySets",
    "MixedCache",
    "MixedHeads",
    "MixedPrecision",
    "Pattern",
    "PerHead",
    "RandomBlocks",
    "RandomClusters",
    "RandomKeys",
    "RegionPlan",
    "Regions",
    "RopeScaling",
    "RoutedAttention",
    "RowCache",
    "RowSlots",
    "Sampled",
    "Sampler",
    "ShuffledWindows",
    "Sight",
    "SinkWindow",
    "Split",
    "TokenCache",
    "TokenSelection",
    "TopBlocks",
    "VerticalSlash",
    "Work",
    "attend",
    "attend_chosen",
    "attend_seen",
    "cache_bytes",
    "compare",
    "compare_patterns",
    "copy_slot",
    "evicted",
    "fit_slash",
    "head_errors",
    "important_attention",
    "keep_slots",
    "key_mass",
    "push_newest",
    "replace_newest",
    "ring_attention",
    "rope_angles",
    "rotate",
    "truncate",
    "tuned",
]
