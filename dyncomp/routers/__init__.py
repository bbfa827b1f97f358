"""Routers: small modules that rate the experts for each row and choose among them."""

from dyncomp.routers.base import Scored
from dyncomp.routers.expert_choice import ExpertChoice
from dyncomp.routers.fixed import Given, Hash
from dyncomp.routers.losses import (
    balance_loss,
    entropy_loss,
    heterogeneous_loss,
    importance_loss,
    load_loss,
    z_loss,
)
from dyncomp.routers.random import Random
from dyncomp.routers.scorers import GatingResidual
from dyncomp.routers.sigmoid import ReLU, SigmoidTopK
from dyncomp.routers.softmax import NoisyTopK, RandomSecond, Switch, Threshold, TopK, TopP

__all__ = [
    "ExpertChoice",
    "GatingResidual",
    "Given",
    "Hash",
    "NoisyTopK",
    "Random",
    "RandomSecond",
    "ReLU",
    "Scored",
    "SigmoidTopK",
    "Switch",
    "Threshold",
    "TopK",
    "TopP",
    "balance_loss",
    "entropy_loss",
    "heterogeneous_loss",
    "importance_loss",
    "load_loss",
    "z_loss",
]
