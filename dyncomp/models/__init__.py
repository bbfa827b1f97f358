"""Backbones with seams."""

from dyncomp.models.block import Block
from dyncomp.models.decoder_lm import DecoderLM
from dyncomp.models.exiting import ExitingClassifier
from dyncomp.models.group import Group, GroupStack
from dyncomp.models.layout import (
    apply,
    is_stacked,
    layer_caches,
    stack,
    unstack,
    with_layer_caches,
)
from dyncomp.models.norm import Norm
from dyncomp.models.vit import VisionTransformer

__all__ = [
    "Block",
    "DecoderLM",
    "ExitingClassifier",
    "Group",
    "GroupStack",
    "Norm",
    "VisionTransformer",
    "apply",
    "is_stacked",
    "layer_caches",
    "stack",
    "unstack",
    "with_layer_caches",
]
