"""Frechet distance between two sets of images, in the features of any network (Heusel et al. 2017)."""

import dataclasses
from typing import Any

import numpy as np

from dyncomp.core.errors import DyncompError


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Mean [d] and covariance [d d] of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, features: Any) -> "Moments":
        """From features [n d]; the covariance divides by n - 1.

        Raises:
          DyncompError: fewer than two rows, or another shape.
        """
        rows = np.asarray(features, np.float64)
        if rows.ndim != 2 or len(rows) < 2:
            raise DyncompError(f"Moments.of: features of shape {rows.shape}; give [n d], n >= 2")
        return cls(rows.mean(axis=0), np.atleast_2d(np.cov(rows, rowvar=False)))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), of the Gaussians with these moments.

    The trace of the root is the sum of the roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is symmetric, so
    singular covariances (fewer images than features) are no trouble.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    both = np.linalg.eigvalsh(root @ b.covariance @ root)
    cross = np.sqrt(np.maximum(both, 0.0)).sum()
    gap = a.mean - b.mean
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * cross
    return float(gap @ gap + spread)
