"""Exits: heads, gates, rules, objectives and calibration for networks that may end early."""

from dyncomp.exits.action import ActionHead
from dyncomp.exits.action_loss import ActionObjective
from dyncomp.exits.attacks import Victim
from dyncomp.exits.bank import ExitBank
from dyncomp.exits.budget_controller import BudgetThresholds, middle_steps, refine_thresholds
from dyncomp.exits.budgets import deepest_exit, floor_thresholds, ratio_for_mean, solve_thresholds
from dyncomp.exits.consistency import ConsistencyRule
from dyncomp.exits.controllers import HeadWarmUp, KeepAccuracy, PositiveWeights
from dyncomp.exits.distilled import DistilledExitObjective
from dyncomp.exits.gates import ExitGates, gate_features
from dyncomp.exits.heads import ExitHeads
from dyncomp.exits.layerwise import LayerwiseObjective
from dyncomp.exits.map_exits import MapExits
from dyncomp.exits.objectives import JointExitObjective, MultiExitObjective, RampedExitObjective
from dyncomp.exits.rules import ConfidenceRule, GateRule, PatienceRule, RunningSumRule, decide
from dyncomp.exits.saturation import Decay, SaturationRule
from dyncomp.exits.selection import cheapest_threshold, leaves_above, threshold_front
from dyncomp.exits.shares import share_thresholds, swept_shares

__all__ = [
    "ActionHead",
    "ActionObjective",
    "BudgetThresholds",
    "ConfidenceRule",
    "ConsistencyRule",
    "Decay",
    "DistilledExitObjective",
    "ExitBank",
    "ExitGates",
    "ExitHeads",
    "GateRule",
    "HeadWarmUp",
    "JointExitObjective",
    "KeepAccuracy",
    "LayerwiseObjective",
    "MapExits",
    "MultiExitObjective",
    "PatienceRule",
    "PositiveWeights",
    "RampedExitObjective",
    "RunningSumRule",
    "SaturationRule",
    "Victim",
    "cheapest_threshold",
    "decide",
    "deepest_exit",
    "floor_thresholds",
    "gate_features",
    "leaves_above",
    "middle_steps",
    "ratio_for_mean",
    "refine_thresholds",
    "share_thresholds",
    "solve_thresholds",
    "swept_shares",
    "threshold_front",
]
