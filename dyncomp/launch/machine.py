"""What a job asks for: TPU slices, nodes with GPUs, or plain processes."""

import dataclasses
import math
import re
from typing import Any, Literal

from jax.sharding import AbstractMesh

from dyncomp.core.errors import DyncompError
from dyncomp.parallel.mesh import MeshSpec, check_batch

EXAMPLES = "cpu, cpu:4, gpu:8, h100:2x8 (nodes x GPUs of a node), v5e:4x4, v5p:2x2x4"


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of accelerator and what others call it.

    Attributes:
      gke: value of the node label of Google's Kubernetes; empty for none.
      sky: SkyPilot's accelerator, or the prefix of a TPU's; empty where it has none.
      xpk: prefix of xpk's device or TPU type; empty where it has none.
      cores: TensorCores of a TPU chip, which v4 and v5p slices are named by.
      devices: JAX devices of a chip.
    """

    gke: str
    sky: str
    xpk: str
    cores: int = 1
    devices: int = 1


TPUS = {
    "v4": Kind("tpu-v4-podslice", "tpu-v4", "v4", cores=2),
    "v5e": Kind("tpu-v5-lite-podslice", "tpu-v5litepod", "v5litepod"),
    "v5p": Kind("tpu-v5p-slice", "tpu-v5p", "v5p", cores=2),
    "v6e": Kind("tpu-v6e-slice", "tpu-v6e", "v6e"),
    "tpu7x": Kind("tpu7x", "", "tpu7x", cores=2, devices=2),
}
GPUS = {
    "gpu": Kind("", "", ""),
    "l4": Kind("nvidia-l4", "L4", "l4"),
    "a100": Kind("nvidia-a100-80gb", "A100-80GB", ""),
    "h100": Kind("nvidia-h100-80gb", "H100", "h100-80gb"),
    "h200": Kind("nvidia-h200-141gb", "H200", "h200-141gb"),
    "b200": Kind("nvidia-b200", "B200", "b200"),
}
CHIPS_PER_HOST = 4
"""Of a machine in a TPU slice, but for slices of a single chip."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """A slice or a group of like nodes.

    Attributes:
      kind: a key of `TPUS` or `GPUS`, or ``cpu``.
      hosts: machines.
      per_host: chips of a machine; 1 for ``cpu``.
      topology: of a TPU slice, such as ``4x4``; else empty.
    """

    kind: str
    hosts: int
    per_host: int
    topology: str = ""

    @classmethod
    def parse(cls, text: str) -> "Machine":
        """The machine called ``text``.

        Raises:
          DyncompError: unknown kind, or a shape it does not have.
        """
        kind, _, shape = text.partition(":")
        known = ("cpu", *GPUS, *TPUS)
        if kind not in known or not re.fullmatch(r"([1-9]\d*(x[1-9]\d*)*)?", shape):
            raise DyncompError(f"no machine {text!r}; known are such as {EXAMPLES}")
        sizes = [int(size) for size in shape.split("x")] if shape else [1]
        if kind in TPUS:
            return cls._slice(kind, shape, sizes)
        if len(sizes) > 1 + (kind in GPUS):
            raise DyncompError(f"machine {text!r}: write {_form(kind)}")
        if kind == "cpu":
            return cls(kind, sizes[0], 1)
        hosts, per_host = sizes if len(sizes) == 2 else (1, sizes[0])
        return cls(kind, hosts, per_host)

    @classmethod
    def _slice(cls, kind: str, shape: str, sizes: list[int]) -> "Machine":
        flat = kind in ("v5e", "v6e")
        chips = math.prod(sizes)
        if len(sizes) != (2 if flat else 3) or (chips > 1 and chips % CHIPS_PER_HOST):
            raise DyncompError(f"machine '{kind}:{shape}': write {_form(kind)}")
        per_host = min(chips, CHIPS_PER_HOST)
        return cls(kind, chips // per_host, per_host, shape)

    @property
    def family(self) -> Literal["cpu", "gpu", "tpu"]:
        """What kind of chip it is."""
        return "tpu" if self.kind in TPUS else "gpu" if self.kind in GPUS else "cpu"

    @property
    def names(self) -> Kind:
        """What others call its chips."""
        return {**TPUS, **GPUS}.get(self.kind, Kind("", "", ""))

    @property
    def chips(self) -> int:
        """Of all hosts together."""
        return self.hosts * self.per_host

    @property
    def devices(self) -> int:
        """JAX devices of all hosts together."""
        return self.chips * self.names.devices

    def __str__(self) -> str:
        shape = self.topology or (
            f"{self.hosts}x{self.per_host}" if self.family == "gpu" else str(self.hosts)
        )
        return f"{self.kind}:{shape}"


def _form(kind: str) -> str:
    if kind in TPUS:
        form = "4x4" if kind in ("v5e", "v6e") else "2x2x4"
        return f"the topology of a slice with whole hosts of {CHIPS_PER_HOST} chips, as in {kind}:{form}"
    return f"{kind}:2x8 for 2 nodes with 8 each" if kind in GPUS else "cpu:4 for 4 processes"


def check_mesh(run: Any, machine: Machine) -> None:
    """Refuses a machine on which a run could not start.

    Args:
      run: `dyncomp.training.Run`, or a `Suite`, of which the selected run is looked at, or else all.
      machine: what it shall run on.

    Raises:
      DyncompError: no mesh for several devices, or a mesh or batch that they do not divide; names the run.
    """
    chosen = run.selected() if hasattr(run, "selected") else run
    for name, member in (run.runs if chosen is None else {"": chosen}).items():
        try:
            _check(member, machine)
        except DyncompError as error:
            raise DyncompError(f"{name}: {error}" if name else str(error)) from error


def _check(run: Any, machine: Machine) -> None:
    spec: MeshSpec | None = run.mesh
    if spec is None and machine.devices > 1:
        raise DyncompError(
            f"{machine} has {machine.devices} devices but training.Run.mesh is None, which uses one; "
            "bind training.Run.mesh = @parallel.MeshSpec()"
        )
    if spec is not None:
        sizes = spec.sizes(machine.devices)
        check_batch(run.batch_size, AbstractMesh(tuple(sizes.values()), tuple(sizes)))
