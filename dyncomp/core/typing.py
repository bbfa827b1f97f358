"""Array types and the one legend of dimension letters used in every annotation.

========  =======================================================
letter    meaning
========  =======================================================
``b``     batch (examples)
``t``     positions of a sequence (``s``: key/value positions)
``n``     rows: examples or positions flattened (``m``: rows after dispatch)
``d``     model width (``o``: output width)
``f``     hidden width of a feed-forward unit
``e``     experts (alternatives of a router)
``k``     slots of a plan (chosen alternatives per row)
``c``     classes, or slots per expert under a capacity (said where used)
``h``     attention heads (``g``: key/value heads), ``p``: width of a head
``x``     exits, the final classifier included (``y``: without it)
``l``     layers
``v``     vocabulary
========  =======================================================
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Scalar, UInt32

from dyncomp.core.errors import DyncompError

Factory: TypeAlias = Callable[..., Any]
"""A class or partial that a seam calls with its fixed name (never an instance)."""

Variables: TypeAlias = Mapping[str, Any]
"""Linen variable collections: ``{"params": ..., "controls": ...}``."""

__all__ = [
    "Array",
    "Bool",
    "Factory",
    "Float",
    "Int",
    "Key",
    "PyTree",
    "Scalar",
    "UInt32",
    "Variables",
    "check_factory",
]


def check_factory(value: Any, seam: str) -> None:
    """Refuses an instance at a seam.

    Raises:
      DyncompError: ``value`` is a module instance or not callable; the message names the fix.
    """
    if isinstance(value, nn.Module) or not callable(value):
        name = type(value).__name__
        raise DyncompError(
            f"{seam}: got an instance of {name}; pass the factory {name} (in gin @{name}, not @{name}())"
        )
