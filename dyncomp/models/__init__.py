"""Backbones with seams."""

from dyncomp.models.apart import apart, with_mixer, with_mixers
from dyncomp.models.block import Block
from dyncomp.models.conv_net import ConvNet
from dyncomp.models.decoder_lm import DecoderLM
from dyncomp.models.ensemble import ensemble_nll, self_ensemble
from dyncomp.models.exiting import ExitingClassifier
from dyncomp.models.factored import FactoredLM
from dyncomp.models.gated import GatedLevel, SkippingClassifier
from dyncomp.models.group import Group, GroupStack
from dyncomp.models.head_patterns import (
    HeadPatterns,
    read_heads,
    search_patterns,
    with_patterns,
    with_told,
)
from dyncomp.models.layout import (
    apply,
    is_stacked,
    layer_caches,
    stack,
    unstack,
    with_layer_caches,
)
from dyncomp.models.nested import NestedLM
from dyncomp.models.norm import Norm
from dyncomp.models.pyramid import ConvBlock, HalvingConv, Level, Pyramid
from dyncomp.models.single_blocks import block_outputs, block_places, join_blocks, kv_cost
from dyncomp.models.skipping import SkippingLM
from dyncomp.models.stopping import StoppingLM
from dyncomp.models.vit import VisionTransformer

__all__ = [
    "Block",
    "ConvBlock",
    "ConvNet",
    "DecoderLM",
    "ExitingClassifier",
    "FactoredLM",
    "GatedLevel",
    "Group",
    "GroupStack",
    "HalvingConv",
    "HeadPatterns",
    "Level",
    "NestedLM",
    "Norm",
    "Pyramid",
    "SkippingClassifier",
    "SkippingLM",
    "StoppingLM",
    "VisionTransformer",
    "apart",
    "apply",
    "block_outputs",
    "block_places",
    "ensemble_nll",
    "is_stacked",
    "join_blocks",
    "kv_cost",
    "layer_caches",
    "read_heads",
    "search_patterns",
    "self_ensemble",
    "stack",
    "unstack",
    "with_layer_caches",
    "with_mixer",
    "with_mixers",
    "with_patterns",
    "with_told",
]
