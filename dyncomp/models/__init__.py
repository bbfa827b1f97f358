"""Backbones with seams."""

from dyncomp.models.apart import apart, with_mixer, with_mixers
from dyncomp.models.batch_norm import BatchNorm
from dyncomp.models.block import Block
from dyncomp.models.bottlenecks import ConvLevel
from dyncomp.models.continuous import ContinuousClassifier, ConvStem, DenseStem
from dyncomp.models.conv_net import ConvNet
from dyncomp.models.cross_block import CrossBlock
from dyncomp.models.decoder_lm import DecoderLM
from dyncomp.models.denoising import ExitingDenoiser
from dyncomp.models.encoder_decoder import EncoderDecoder
from dyncomp.models.ensemble import ensemble_nll, self_ensemble
from dyncomp.models.exiting import ExitingClassifier
from dyncomp.models.exiting_convnet import ExitingConvNet
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
from dyncomp.models.layout import apply, is_stacked, layer_caches, stack, unstack, with_layer_caches
from dyncomp.models.nested import NestedLM
from dyncomp.models.norm import Norm
from dyncomp.models.normed_conv import NormedConv
from dyncomp.models.packed import ImageTextRow
from dyncomp.models.policy import MultiExitPolicy
from dyncomp.models.pyramid import ConvBlock, HalvingConv, Level, Pyramid
from dyncomp.models.saturating import SaturatingVLM
from dyncomp.models.seeing import GatedCross, ImageTokens, Resampler, SeeingBlock, WordTokens
from dyncomp.models.single_blocks import block_outputs, block_places, join_blocks, kv_cost
from dyncomp.models.skipping import SkippingLM
from dyncomp.models.spiking import SpikingClassifier
from dyncomp.models.stopping import StoppingLM
from dyncomp.models.two_branch import TwoBranchClassifier
from dyncomp.models.uvit import UViT
from dyncomp.models.vit import VisionTransformer

__all__ = [
    "BatchNorm",
    "Block",
    "ContinuousClassifier",
    "ConvBlock",
    "ConvLevel",
    "ConvNet",
    "ConvStem",
    "CrossBlock",
    "DecoderLM",
    "DenseStem",
    "EncoderDecoder",
    "ExitingClassifier",
    "ExitingConvNet",
    "ExitingDenoiser",
    "FactoredLM",
    "GatedCross",
    "GatedLevel",
    "Group",
    "GroupStack",
    "HalvingConv",
    "HeadPatterns",
    "ImageTextRow",
    "ImageTokens",
    "Level",
    "MultiExitPolicy",
    "NestedLM",
    "Norm",
    "NormedConv",
    "Pyramid",
    "Resampler",
    "SaturatingVLM",
    "SeeingBlock",
    "SkippingClassifier",
    "SkippingLM",
    "SpikingClassifier",
    "StoppingLM",
    "TwoBranchClassifier",
    "UViT",
    "VisionTransformer",
    "WordTokens",
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
