"""One table from the logical names that modules use to mesh axes.

A name that is not in the table is an error (`dyncomp.core.sharding.to_spec`), so a typo cannot silently replicate.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from dyncomp.core.errors import DyncompError
from dyncomp.core.sharding import MeshAxes, axis_rules
from dyncomp.parallel.mesh import AXES, BATCH_AXES

RULES: Mapping[str, MeshAxes] = {
    # activations
    "batch": BATCH_AXES,
    "seq": "sequence",
    "rows": (
        *BATCH_AXES,
        "sequence",
        "tensor",
    ),  # flattened (batch, seq) inside a local_op: every device has its own
    # parameters, and what activations share with them
    "embed": ("fsdp", "sequence"),
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "vocab": "tensor",
    "expert": "expert",
    "router": None,
    "classes": None,
    "exits": None,
    "layers": None,
}


def make_rules(overrides: Mapping[str, Any] | None = None) -> dict[str, MeshAxes]:
    """The table with changes.

    Args:
      overrides: logical name -> mesh axis, tuple of them, or None (replicated).

    Raises:
      DyncompError: an override names no mesh axis.
    """
    table = dict(RULES)
    for name, value in (overrides or {}).items():
        axes = (value,) if isinstance(value, str) else tuple(value or ())
        wrong = [axis for axis in axes if axis not in AXES]
        if wrong:
            raise DyncompError(
                f"rule {name!r}: no mesh axis {wrong[0]!r}; use {', '.join(AXES)} or None"
            )
        table[name] = axes[0] if len(axes) == 1 else axes or None
    return table


@contextlib.contextmanager
def use(mesh: Mesh | None, rules: Mapping[str, MeshAxes] | None = None) -> Iterator[None]:
    """Runs and traces the body on ``mesh`` under ``rules`` (default `RULES`); nothing changes for None."""
    if mesh is None:
        yield
        return
    with jax.set_mesh(mesh), axis_rules(known(mesh, rules)):
        yield


def known(mesh: Mesh, rules: Mapping[str, MeshAxes] | None) -> dict[str, MeshAxes]:
    """The table (default `RULES`) without axes that a mesh of the user's own lacks."""
    found: dict[str, MeshAxes] = {}
    for name, value in (RULES if rules is None else rules).items():
        axes = (value,) if isinstance(value, str) else tuple(value or ())
        held = tuple(axis for axis in axes if axis in mesh.axis_names)
        found[name] = held[0] if len(held) == 1 else held or None
    return found


@contextlib.contextmanager
def traced_for(mesh: Mesh, rules: Mapping[str, MeshAxes]) -> Iterator[None]:
    """Traces the body for ``mesh`` under ``rules`` where its devices may be descriptions only.

    Unlike in `use`, what the body computes while it is traced (diffrax compares results) is computed here.
    """
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), axis_rules(known(mesh, rules)):
        yield
