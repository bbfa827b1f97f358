"""Routers: small modules that rate the experts for each row and choose among them."""

from dyncomp.routers.annealed import Annealed
from dyncomp.routers.base import Scored
from dyncomp.routers.distilled import DistilledRouter, Hindsight
from dyncomp.routers.expert_choice import ExpertChoice
from dyncomp.routers.fixed import Given, Hash
from dyncomp.routers.imitation import imitation_loss, winners_loss
from dyncomp.routers.losses import (
    balance_loss,
    entropy_loss,
    heterogeneous_loss,
    imbalance,
    importance_loss,
    load_loss,
    z_loss,
)
from dyncomp.routers.random import Random, RandomFree
from dyncomp.routers.reduced import Grouped, PrunedTopK, SkipSecond
from dyncomp.routers.scorers import GatingResidual
from dyncomp.routers.sigmoid import ReLU, SigmoidTopK
from dyncomp.routers.softmax import NoisyTopK, RandomSecond, Switch, Threshold, TopK, TopP

__all__ = [
    "Annealed",
    "DistilledRouter",
    "ExpertChoice",
    "GatingResidual",
    "Given",
    "Grouped",
    "Hash",
    "Hindsight",
    "NoisyTopK",
    "PrunedTopK",
    "Random",
    "RandomFree",
    "RandomSecond",
    "ReLU",
    "Scored",
    "SigmoidTopK",
    "SkipSecond",
    "Switch",
    "Threshold",
    "TopK",
    "TopP",
    "balance_loss",
    "entropy_loss",
    "heterogeneous_loss",
    "imbalance",
    "imitation_loss",
    "importance_loss",
    "load_loss",
    "winners_loss",
    "z_loss",
]
