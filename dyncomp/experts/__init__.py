"""Feed-forward units: dense ones and mixtures of experts (the ffn seam)."""

from dyncomp.experts.bank import MLPBank, SwiGLUBank
from dyncomp.experts.convert import SliceDense, UpcycleDense
from dyncomp.experts.exchange import Exchange
from dyncomp.experts.ffn import MLP, SwiGLU
from dyncomp.experts.free import FreeExperts
from dyncomp.experts.hopper import HopperMLPBank, HopperSwiGLUBank
from dyncomp.experts.ladder import Ladder, LadderBank
from dyncomp.experts.moe import MoE
from dyncomp.experts.sliced import SlicedFFN

__all__ = [
    "Exchange",
    "FreeExperts",
    "HopperMLPBank",
    "HopperSwiGLUBank",
    "Ladder",
    "LadderBank",
    "MLP",
    "MLPBank",
    "MoE",
    "SliceDense",
    "SlicedFFN",
    "SwiGLU",
    "SwiGLUBank",
    "UpcycleDense",
]
