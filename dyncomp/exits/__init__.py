"""Exits: heads, gates, rules, objectives and calibration for networks that may end early."""

from dyncomp.exits.bank import ExitBank
from dyncomp.exits.budgets import deepest_exit, solve_thresholds
from dyncomp.exits.controllers import HeadWarmUp, PositiveWeights
from dyncomp.exits.gates import ExitGates, gate_features
from dyncomp.exits.heads import ExitHeads
from dyncomp.exits.map_exits import MapExits
from dyncomp.exits.objectives import JointExitObjective, MultiExitObjective
from dyncomp.exits.rules import ConfidenceRule, GateRule, PatienceRule, decide

__all__ = [
    "ConfidenceRule",
    "ExitBank",
    "ExitGates",
    "ExitHeads",
    "GateRule",
    "HeadWarmUp",
    "JointExitObjective",
    "MapExits",
    "MultiExitObjective",
    "PatienceRule",
    "PositiveWeights",
    "decide",
    "deepest_exit",
    "gate_features",
    "solve_thresholds",
]
