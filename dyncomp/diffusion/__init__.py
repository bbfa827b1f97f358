"""Diffusion models: schedules, samplers, and exits within a denoising step."""
