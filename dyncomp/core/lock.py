"""One measurement at a time on a machine: benches and evidence runs take turns."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dyncomp.core.errors import DyncompError


def lock_path() -> Path:
    """The lock file of this user, or the one that ``DYNCOMP_LOCK`` names."""
    default = Path(tempfile.gettempdir()) / f"dyncomp-measuring-{os.getuid()}.lock"
    return Path(os.environ.get("DYNCOMP_LOCK", default))


@contextlib.contextmanager
def measuring(what: str) -> Iterator[None]:
    """Holds the lock while measuring ``what``; the system frees it when the process ends, however it ends.

    Raises:
      DyncompError: something else is being measured.
    """
    with open(lock_path(), "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise DyncompError(
                f"{holder} is being measured on this machine; wait for it, then start {what} again"
            ) from None
        file.truncate(0)
        file.write(f"{what} (process {os.getpid()})")
        file.flush()
        yield
