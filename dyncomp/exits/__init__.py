"""Exits: heads, gates, rules, objectives and calibration for networks that may end early."""

from dyncomp.exits.action import ActionHead
from dyncomp.exits.action_loss import ActionObjective
from dyncomp.exits.bank import ExitBank
from dyncomp.exits.budget_controller import BudgetThresholds, middle_steps, refine_thresholds
from dyncomp.exits.budgets import (
    deepest_exit,
    floor_thresholds,
    ratio_for_mean,
    solve_thresholds,
)
from dyncomp.exits.consistency import ConsistencyRule
from dyncomp.exits.controllers import HeadWarmUp, PositiveWeights
from dyncomp.exits.gates import ExitGates, gate_features
from dyncomp.exits.heads import ExitHeads
from dyncomp.exits.objectives import JointExitObjective, MultiExitObjective
from dyncomp.exits.rules import ConfidenceRule, GateRule, PatienceRule, decide

__all__ = [
    "ActionHead",
    "ActionObjective",
    "BudgetThresholds",
    "ConfidenceRule",
    "ConsistencyRule",
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
    "floor_thresholds",
    "gate_features",
    "middle_steps",
    "ratio_for_mean",
    "refine_thresholds",
    "solve_thresholds",
]
