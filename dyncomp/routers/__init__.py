"""Routers: small modules that rate the experts for each row and choose among them."""

from dyncomp.routers.losses import balance_loss, entropy_loss, z_loss
from dyncomp.routers.random import Random
from dyncomp.routers.softmax import TopK, TopP

__all__ = ["Random", "TopK", "TopP", "balance_loss", "entropy_loss", "z_loss"]
