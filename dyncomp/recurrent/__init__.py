"""Depth in time: adaptive solvers of differential equations, fixed points, spiking steps."""

from dyncomp.recurrent.adaptive import Progress, StepControl, equal_steps
from dyncomp.recurrent.budgets import tolerance_for
from dyncomp.recurrent.cells import TanhCell, power_norm
from dyncomp.recurrent.equilibrium import FixedPoint, adjoint
from dyncomp.recurrent.equilibrium_block import EquilibriumBlock
from dyncomp.recurrent.fields import ConvField, MLPField
from dyncomp.recurrent.fixed_point import FixedStats, fixed_point, residual
from dyncomp.recurrent.ode import ODESolver, SolveStats
from dyncomp.recurrent.ode_block import ODEBlock, attempt_cost
from dyncomp.recurrent.penalties import penalised
from dyncomp.recurrent.quantise import learned_step
from dyncomp.recurrent.reversible import reversible_heun
from dyncomp.recurrent.spiking import Neuron, fires
from dyncomp.recurrent.tableau import DOPRI5, EULER, RK4, TABLEAUS, TSIT5, Tableau

__all__ = [
    "ConvField",
    "DOPRI5",
    "EULER",
    "EquilibriumBlock",
    "FixedPoint",
    "FixedStats",
    "MLPField",
    "Neuron",
    "ODEBlock",
    "ODESolver",
    "Progress",
    "RK4",
    "SolveStats",
    "StepControl",
    "TABLEAUS",
    "TSIT5",
    "Tableau",
    "TanhCell",
    "adjoint",
    "attempt_cost",
    "equal_steps",
    "fires",
    "fixed_point",
    "learned_step",
    "penalised",
    "power_norm",
    "residual",
    "reversible_heun",
    "tolerance_for",
]
