"""Depth in time: adaptive solvers of differential equations, fixed points, spiking steps."""
