"""Descriptions of machines that are not here: TPU slices and nodes of GPUs by name, and simulated CPU devices."""

import dataclasses
import importlib.util
import logging
import os
import re
import shutil
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
    "h100": 80 * 10**9,
}
"""Memory of one device, bytes, as published by the maker; v4 and tpu7x chips are two devices each."""

EXAMPLES = (
    "v4:4x4x4, v5e:2x2, v5e:16x16, v5p:4x4x4, v6e:16x16, tpu7x:2x2x1, h100:8, h100:2x8, cpu:4"
)
QUIET = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""What libtpu asks of a TPU machine when it loads, and a lock that is a TPU's; nothing that it compiles changes."""

H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84929347584
  l2_cache_size: 52428800
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""What XLA asks of an H100 (SXM), as such a card and NVIDIA's data sheet tell."""

PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")

OVERLAP = {"xla_tpu_enable_async_all_to_all": "true"}
"""Options of the TPU compiler: an all-to-all may run beside the matrix products it does not depend on."""

_TPU = re.compile(r"(v4|v5e|v5p|v6e|tpu7x):\d+x\d+(x\d+)?")
_GPU = re.compile(r"h100:(?:(\d+)x)?(\d+)")
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
      DyncompError: no such topology, its compiler is missing, or too few CPU devices are simulated.
    """
    if found := _CPU.fullmatch(name):
        return Topology(name, _cpu_devices(int(found.group(1))), None)
    if found := _GPU.fullmatch(name):
        nodes, each = int(found.group(1) or 1), int(found.group(2))
        return Topology(name, _gpu_devices(name, nodes, each), HBM["h100"])
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


def _gpu_devices(name: str, nodes: int, each: int) -> Sequence[Any]:
    """Described GPUs: the compiler of XLA's CUDA plugin needs neither a card nor a driver, but ``ptxas``."""
    from jax.experimental import topologies

    if nodes < 1 or each < 1:
        raise DyncompError(f"topology {name} has no devices; use h100:1 or more")
    if not any(_installed(plugin) for plugin in PLUGINS):
        fix = 'pip install --no-deps "jax-cuda13-plugin" "jax-cuda13-pjrt" of jax\'s own version'
        raise DyncompError(f"topology {name} needs XLA's CUDA compiler: {fix}")
    if shutil.which("ptxas") is None:
        raise DyncompError(f"topology {name} needs ptxas on the PATH: pip install nvidia-cuda-nvcc")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)  # it misses a driver
    try:
        found = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=H100, topology=f"1x{nodes}x{each}"
        )
    except Exception as error:  # the plugin raises its own kinds
        said = str(error).splitlines()[0][:200]
        raise DyncompError(
            f"topology {name} is refused ({said}); known are such as {EXAMPLES}"
        ) from None
    return found.devices


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
