"""Exits: heads, gates, rules, objectives and calibration for networks that may end early."""

from dyncomp.exits.bank import ExitBank
from dyncomp.exits.budgets import deepest_exit, solve_thresholds
from dyncomp.exits.controllers import HeadWarmUp, PositiveWeights
from dyncomp.exits.distilled import DistilledExitObjective
from dyncomp.exits.gates import ExitGates, gate_features
from dyncomp.exits.heads import ExitHeads
from dyncomp.exits.objectives import JointExitObjective, MultiExitObjective
from dyncomp.exits.rules import ConfidenceRule, GateRule, PatienceRule, decide
from dyncomp.exits.shares import share_thresholds, swept_shares

__all__ = [
    "ConfidenceRule",
    "DistilledExitObjective",
    "ExitBank",
    "ExitGates",
    "ExitHeads",
    "GateRule",
    "HeadWarmUp",
    "JointExitObjective",
    "MultiExitObjective",
    "PatienceRule",
    "PositiveWeights",
    "decide",
    "deepest_exit",
    "gate_features",
    "share_thresholds",
    "solve_thresholds",
    "swept_shares",
]
