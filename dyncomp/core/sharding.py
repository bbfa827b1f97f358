"""Logical axes, constraints and `local_op`; the mesh and its table of rules come from `dyncomp.parallel`.

These live on the ground floor because modules of every family name their axes and wrap their kernel calls; which
mesh axis a name means is decided above, in one table.
"""

import contextlib
import contextvars
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array
from dyncomp_kernels._compat import vary_like

AxisNames = Sequence[str | None]
MeshAxes = str | tuple[str, ...] | None

_NO_RULES: Mapping[str, MeshAxes] = types.MappingProxyType({})
_RULES: contextvars.ContextVar[Mapping[str, MeshAxes]] = contextvars.ContextVar("rules")

Result = TypeVar("Result")


@contextlib.contextmanager
def axis_rules(rules: Mapping[str, MeshAxes]) -> Iterator[None]:
    """Sets the table from logical names to mesh axes while tracing; an empty table replicates everything."""
    token = _RULES.set(dict(rules))
    try:
        yield
    finally:
        _RULES.reset(token)


def to_spec(names: AxisNames) -> PartitionSpec:
    """The partition spec of logical names under the current rules; a mesh axis is used at most once.

    Raises:
      DyncompError: a name is not in the table.
    """
    table = _RULES.get(_NO_RULES)
    used: set[str] = set()
    entries: list[MeshAxes] = []
    for name in names:
        if name and table and name not in table:
            known = ", ".join(sorted(table))
            raise DyncompError(f"axis name {name!r} is not in the table of rules; known: {known}")
        axes = table.get(name) if name else None
        axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
        free = tuple(axis for axis in axes if axis not in used)
        used.update(free)
        entries.append(free[0] if len(free) == 1 else free or None)
    return PartitionSpec(*entries)


def current_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh set by ``jax.set_mesh``, or None on one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def parts(*names: str) -> int:
    """Into how many parts the current mesh splits the last of these axes of an array; 1 without a mesh.

    Inside a `local_op` too: there everything is whole.
    """
    mesh = current_mesh()
    return 1 if mesh is None or mesh.manual_axes else _size(mesh, to_spec(names)[-1])


def _size(mesh: jax.sharding.AbstractMesh, axes: MeshAxes) -> int:
    return math.prod(mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ()))


def constrain(x: Array, names: AxisNames) -> Array:
    """Asks for the layout that the rules give ``names``; identity without a mesh or inside a `local_op`.

    A dimension of 1 (the position of a decode step) stays whole.

    Raises:
      DyncompError: positions that the mesh does not divide.
    """
    mesh = current_mesh()
    if mesh is None or mesh.manual_axes:
        return x
    spec = [axes if size > 1 else None for axes, size in zip(to_spec(names), x.shape, strict=True)]
    for name, size, axes in zip(names, x.shape, spec, strict=True):
        if name == "seq" and size % (ways := _size(mesh, axes)):
            raise DyncompError(
                f"{size} positions are not a multiple of mesh axis {axes}={ways}; change the length or the mesh, or "
                "set MeshSpec.rules = {'seq': None}"
            )
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def local_op(
    fn: Callable[..., Result], in_names: Sequence[AxisNames], out_names: Any
) -> Callable[..., Result]:
    """Runs ``fn`` on each device's shard; identity on one device.

    Kernels cannot be partitioned automatically, so every kernel call under a mesh sits in one of these. Inside,
    every argument counts as varying over all axes that any argument is split over, so that a custom gradient of
    ``fn`` never has to sum over devices: the gradient of an argument that is whole on each device is summed here.

    Args:
      fn: function of arrays; a result must be split over the same axes as the arguments together.
      in_names: logical axis names of each argument.
      out_names: logical axis names of the result, or a pytree of such tuples.
    """
    mesh = current_mesh()
    if mesh is None or mesh.manual_axes:
        return fn
    is_names = lambda node: (
        isinstance(node, tuple) and all(name is None or isinstance(name, str) for name in node)
    )
    out_specs = jax.tree.map(to_spec, out_names, is_leaf=is_names)
    in_specs = tuple(to_spec(names) for names in in_names)

    def shard(*args: Array) -> Result:
        return fn(*(vary_like(arg, *args) for arg in args))

    return jax.shard_map(shard, in_specs=in_specs, out_specs=out_specs, check_vma=True)


def param(
    module: nn.Module,
    name: str,
    init: nn.initializers.Initializer,
    shape: Sequence[int],
    axes: AxisNames,
    dtype: str = "float32",
) -> Array:
    """A parameter with logical axis names; drawn in float32 and stored in ``dtype``."""

    def draw(key: Array, shape: Sequence[int]) -> Array:
        return init(key, shape, "float32").astype(dtype)

    if len(shape) != len(axes):
        raise DyncompError(
            f"{name}: {len(shape)} dimensions but {len(axes)} axis names {tuple(axes)}"
        )
    boxed = nn.with_logical_partitioning(draw, tuple(axes))
    return jnp.asarray(module.param(name, boxed, tuple(shape)))  # numpy where the caller gave numpy
