"""Depth in time: adaptive solvers of differential equations, fixed points, spiking steps."""

from dyncomp.recurrent.quantise import learned_step
from dyncomp.recurrent.spiking import Neuron, fires

__all__ = ["Neuron", "fires", "learned_step"]
