"""Conditional computation in JAX: networks that decide, input by input, what to compute.

Import the rooms you need (`from dyncomp import routers, experts`); this module stays light. ``dyncomp.load(workdir)``
gives the model, variables and config of a finished run.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dyncomp.training.restore import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """Imports ``load`` on first use, so that ``import dyncomp`` loads nothing else."""
    if name == "load":
        import functools

        from dyncomp import config
        from dyncomp.training.restore import load

        return functools.partial(load, loader=config.load)
    raise AttributeError(f"module 'dyncomp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
