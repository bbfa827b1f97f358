"""The kernels' tests run in the same environment as all others."""

from tests.conftest import strict

__all__ = ["strict"]
