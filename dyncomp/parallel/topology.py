"""Descriptions of machines that are not here: TPU slices by name, and simulated CPU devices."""

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from dyncomp.core.errors import DyncompError

GIB = 2**30
HBM = {
    "v4": 16 * GIB,
    "v5e": 16 * GIB,
    "v5p": 95 * GIB,
    "v6e": 32 * GIB,
    "tpu7x": 96 * GIB,
}
"""Memory of one device, bytes, as published by the maker; v4 and tpu7x chips are two devices each."""

EXAMPLES = "v4:4x4x4, v5e:2x2, v5e:16x16, v5p:4x4x4, v6e:16x16, tpu7x:2x2x1, cpu:4"
QUIET = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""What libtpu asks of a TPU machine when it loads, and a lock that is a TPU's; nothing that it compiles changes."""

OVERLAP = {"xla_tpu_enable_async_all_to_all": "true"}
"""Options of the TPU compiler: an all-to-all may run beside the matrix products it does not depend on."""

_TPU = re.compile(r"(v4|v5e|v5p|v6e|tpu7x):\d+x\d+(x\d+)?")
_CPU = re.compile(r"cpu:(\d+)")


def compile_step(lowered: jax.stages.Lowered, mesh: Mesh | None) -> jax.stages.Compiled:
    """Compiles a step for this mesh: on TPUs with `OVERLAP`, where the compiler has it.

    The one of jax 0.10.2 has not for slices of v5e above 4x4, and says so; the all-to-alls then wait.
    """
    if mesh is None or mesh.devices.flat[0].platform != "tpu":
        return lowered.compile()
    try:
        return lowered.compile(compiler_options=dict(OVERLAP))
    except jax.errors.JaxRuntimeError as error:
        if "Async all-to-all not supported" not in str(error):
            raise
        return lowered.compile()


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: as asked for.
      devices: descriptions (TPU) or simulated devices (CPU).
      memory: bytes of one device, or None where there is no fixed limit.
    """

    name: str
    devices: Sequence[Any]
    memory: int | None


def find(name: str) -> Topology:
    """The topology called ``name``.

    Raises:
      DyncompError: no such topology, libtpu is missing, or too few CPU devices are simulated.
    """
    if found := _CPU.fullmatch(name):
        return Topology(name, _cpu_devices(int(found.group(1))), None)
    found = _TPU.fullmatch(name)
    if not found:
        raise DyncompError(f"unknown topology {name!r}; known are such as {EXAMPLES}")
    return Topology(name, _tpu_devices(name), HBM[found.group(1)])


def _cpu_devices(count: int) -> Sequence[Any]:
    if count < 1:
        raise DyncompError("topology cpu:0 has no devices; use cpu:1 or more")
    try:  # works only before the first computation of the process
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise DyncompError(
            f"topology cpu:{count}: this process simulates {len(devices)} CPU devices; "
            f"set XLA_FLAGS=--xla_force_host_platform_device_count={count} before it starts"
        )
    return devices[:count]


def _tpu_devices(name: str) -> Sequence[Any]:
    from jax.experimental import topologies

    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise DyncompError(
            f'topology {name} needs the TPU compiler: pip install "dyncomp[tpu]"'
        ) from None
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # the plugin raises its own kinds
        said = str(error).splitlines()[0][:200]
        raise DyncompError(
            f"topology {name} is refused ({said}); known are such as {EXAMPLES}"
        ) from None
