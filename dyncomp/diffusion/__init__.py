"""Diffusion models: schedules, samplers, and exits within a denoising step."""

from dyncomp.diffusion.certainty import CertaintyProbes, CertaintyRule, certainty_target
from dyncomp.diffusion.frechet import Moments, frechet_distance
from dyncomp.diffusion.objectives import DenoisingObjective
from dyncomp.diffusion.samplers import (
    DDIM,
    EulerMaruyama,
    Sampler,
    sample,
    sample_scanned,
)
from dyncomp.diffusion.schedules import NoiseSchedule, time_embedding

__all__ = [
    "CertaintyProbes",
    "CertaintyRule",
    "DDIM",
    "DenoisingObjective",
    "EulerMaruyama",
    "Moments",
    "NoiseSchedule",
    "Sampler",
    "certainty_target",
    "frechet_distance",
    "sample",
    "sample_scanned",
    "time_embedding",
]
