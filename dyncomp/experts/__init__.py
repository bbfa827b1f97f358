"""Feed-forward units: dense ones and mixtures of experts (the ffn seam)."""

from dyncomp.experts.bank import MLPBank, SwiGLUBank
from dyncomp.experts.ffn import MLP, SwiGLU
from dyncomp.experts.free import FreeExperts
from dyncomp.experts.moe import MoE

__all__ = ["MLP", "FreeExperts", "MLPBank", "MoE", "SwiGLU", "SwiGLUBank"]
