"""Several processes as one program: joining, and what all of them must decide alike.

Every process runs the same program on the same mesh, so whatever a host decides by itself (what a file says, whether
a disk is full) must be agreed on before anyone acts on it: a process that takes another branch leaves the others
waiting in a collective for ever. In one process all of these are plain calls.
"""

import atexit
import pickle
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from dyncomp.core.errors import DyncompError

HEARTBEAT_SECONDS = 20
"""A process that has not been heard of for so long is lost, and the runtime ends the others."""
SHUTDOWN_SECONDS = 20
"""How long a process that ends waits for the others to end too."""
SAID_BYTES = 240

Result = TypeVar("Result")


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    local_device: int | None = None,
) -> None:
    """Joins the other processes of a job; call it before anything is computed.

    Args:
      coordinator: ``HOST:PORT`` of process 0; None asks Slurm, Open MPI, Kubernetes or Cloud TPU, as JAX does.
      processes: how many there are.
      process: which one this is.
      local_device: the one GPU that this process takes; None for all (and CPUs and TPUs know no such choice).

    Raises:
      DyncompError: no cluster is found, or the others did not come.
    """
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            None if local_device is None else [local_device],
            cluster_detection_method="deactivate" if coordinator else None,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise DyncompError(_why(coordinator, error)) from None
    atexit.register(leave)


def _why(coordinator: str | None, error: Exception) -> str:
    said = str(error).strip().splitlines()[0][:200]
    if coordinator:
        return f"could not join the processes at {coordinator}: {said}"
    return (
        f"--distributed: no Slurm, Open MPI, Kubernetes or Cloud TPU job is found here ({said}); "
        "give --coordinator HOST:PORT --processes N --process I"
    )


def leave() -> None:
    """Ends this process's part in the job once the others end theirs; afterwards it computes alone."""
    try:
        jax.distributed.shutdown()
    except RuntimeError:  # the others are gone already: nothing is left to do together
        pass


def lead() -> bool:
    """Whether this process writes files and speaks to the user."""
    return jax.process_index() == 0


def gather(values: np.ndarray) -> np.ndarray:
    """``values`` [...] of every process, stacked [processes ...]; 32-bit or smaller dtypes."""
    return multihost_utils.process_allgather(values)


def first_said(text: str) -> str:
    """The first text that is not empty, in the order of the processes, cut to `SAID_BYTES`; "" where all are."""
    if jax.process_count() == 1:
        return text
    own = np.zeros(SAID_BYTES, np.uint8)
    said = text.encode()[:SAID_BYTES]
    own[: len(said)] = np.frombuffer(said, np.uint8)
    texts = (row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in gather(own))
    return next(filter(None, texts), "")


def added(own: Mapping[str, int]) -> dict[str, int]:
    """Sums over all processes, modulo 2**64; all name the same keys, in the same order."""
    if jax.process_count() == 1:
        return dict(own)
    halves = gather(np.array(list(own.values()), np.uint64).view(np.uint32))
    total = np.ascontiguousarray(halves).view(np.uint64).sum(axis=0, dtype=np.uint64)
    return dict(zip(own, total.tolist(), strict=True))


def from_lead(make: Callable[[], Result]) -> Result:
    """What ``make`` returns in process 0, where alone it is called; an error raised there is raised everywhere.

    Args:
      make: returns something that can be pickled.
    """
    if jax.process_count() == 1:
        return make()
    value, error = _broadcast(_outcome(make) if lead() else None)
    if error is not None:
        raise error
    return value


def _outcome(make: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    try:
        return make(), None
    except Exception as error:
        return None, error


def _broadcast(outcome: object) -> tuple:
    """Process 0's object; its bytes are padded to a power of two, so that few programs are compiled."""
    own = pickle.dumps(outcome)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(own))))
    padded = np.zeros(1 << (size - 1).bit_length(), np.uint8)
    if lead():
        padded[:size] = np.frombuffer(own, np.uint8)
    return pickle.loads(multihost_utils.broadcast_one_to_all(padded)[:size].tobytes())
