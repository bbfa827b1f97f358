"""Meshes, axis rules, shardings, and compiling for machines that are not here."""

from dyncomp.parallel.mesh import MeshSpec, check_batch
from dyncomp.parallel.rules import RULES, make_rules, use
from dyncomp.parallel.shardings import (
    batch_sharding,
    logical_names,
    make_global_batch,
    process_rows,
    shardings_for,
)

__all__ = [
    "RULES",
    "MeshSpec",
    "batch_sharding",
    "check_batch",
    "logical_names",
    "make_global_batch",
    "make_rules",
    "process_rows",
    "shardings_for",
    "use",
]
