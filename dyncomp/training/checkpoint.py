"""Checkpoints: written by Orbax in the background, trusted only through our own digests.

::

    <workdir>/checkpoints/<step>/      complete once dyncomp.json is there
        arrays/...                     Orbax's files: a flat dict "params/..." -> array
        config.gin  loop.json          the run's config; what the loop had summed up but not yet logged
        dyncomp.json                   format, step, digest of every file and of every array's elements

Every process of a job writes its own shards. Process 0 alone decides what is on the disk and writes everything else;
what it finds, and what goes wrong anywhere, all processes learn before they go on.
"""

import concurrent.futures
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from dyncomp.core.errors import DyncompError
from dyncomp.core.workdir import CHECKPOINTS, steps_in
from dyncomp.parallel import processes
from dyncomp.training import integrity
from dyncomp.training.integrity import DamageError
from dyncomp.training.state import TrainState, paths

PATIENCE = 3
"""So many saves in a row may fail before training stops: a store that is away for a while costs nothing else."""


class Checkpointer:
    """Saves and restores the states of one run; every process of a job calls the same methods in the same order.

    Args:
      workdir: of the run.
      max_to_keep: newest steps that stay; an older one goes only after a newer one is complete.
      config_text: saved with every step.
      say: told one line about each save that failed and each damaged step.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        max_to_keep: int = 2,
        config_text: str = "",
        say: Callable[[str], None] = lambda line: None,
    ):
        self.root = Path(workdir).absolute() / CHECKPOINTS
        self.max_to_keep, self.config_text, self.say = max_to_keep, config_text, say
        self.orbax = ocp.StandardCheckpointer()
        self.worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: concurrent.futures.Future[None] | None = None
        self.step, self.failures = 0, 0

    def save(self, state: TrainState, extra: Mapping[str, Any] | None = None) -> None:
        """Starts saving; the arrays are copied before this returns, the rest happens in the background.

        Raises:
          DyncompError: the `PATIENCE` saves before failed (a full disk, say); earlier steps are untouched.
        """
        self.settle()
        self.step = int(state.step)
        folder = self.root / str(self.step)
        leaves = {path: _held(leaf) for path, leaf in flat(state).items()}
        own = integrity.sums(leaves)
        error = processes.from_lead(lambda: self._prepare(folder, extra))
        if error is None:
            error = self._write(folder, leaves, own)
        if error is None:
            like = {path: _abstract(leaf) for path, leaf in leaves.items()}
            self.pending = self.worker.submit(self._complete, folder, like, own)
        else:
            self.pending = concurrent.futures.Future()
            self.pending.set_exception(error)

    def _prepare(self, folder: Path, extra: Mapping[str, Any] | None) -> OSError | None:
        """The folder and all that is in it but arrays; what went wrong."""
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            (folder / "config.gin").write_text(self.config_text)
            (folder / "loop.json").write_text(json.dumps(dict(extra or {})))
        except OSError as error:
            return error
        return None

    def _write(
        self, folder: Path, leaves: Mapping[str, Any], own: integrity.Sums
    ) -> OSError | None:
        """This process's part; sums come before Orbax, whose last act is a barrier: then process 0 finds them."""
        try:
            if not processes.lead():
                _part(folder, jax.process_index()).write_text(json.dumps(own))
            self.orbax.save(folder / "arrays", dict(leaves))
        except OSError as error:
            return error
        return None

    def _complete(self, folder: Path, like: Mapping[str, Any], own: integrity.Sums) -> None:
        self.orbax.wait_until_finished()
        if not processes.lead():
            return
        parts = [own, *(_taken(_part(folder, n)) for n in range(1, jax.process_count()))]
        whole = {path: sum(part[path] for part in parts) % 2**64 for path in own}
        step = int(folder.name)
        integrity.write_manifest(folder, integrity.leaf_records(like, whole), {"step": step})
        kept = steps_in(self.root.parent)[-self.max_to_keep :]
        for path in self.root.iterdir():
            if not path.name.isdigit() or int(path.name) not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def settle(self) -> None:
        """Blocks until the last save is complete, however slow the store; one that failed is told and passed over.

        Raises:
          DyncompError: it is the last of `PATIENCE` in a row.
        """
        if self.pending is None:
            return
        told = self._failed()
        self.failures = self.failures + 1 if told else 0
        if self.failures >= PATIENCE:
            raise DyncompError(f"{told}; free space and run again")
        if told:
            self.say(f"warning: {told}; training goes on")

    def wait(self) -> None:
        """Blocks until the last save is complete; raises what went wrong with it."""
        if told := self._failed():
            raise DyncompError(f"{told}; free space and run again")

    def _failed(self) -> str:
        """What went wrong with the last save, in whichever process; "" for nothing."""
        pending, self.pending = self.pending, None
        if pending is None:
            return ""
        error = pending.exception()  # Orbax wraps the store's errors in several kinds
        lines = str(error).splitlines() if error else []
        own = next((line for line in lines if line.strip()), type(error).__name__ if error else "")
        if not (reason := processes.first_said(own[:200])):
            return ""
        good = steps_in(self.root.parent)
        last = f"step {good[-1]} is safe" if good else "nothing was saved before"
        return f"could not save step {self.step} under {self.root}: {reason}; {last}"

    def abandon(self) -> None:
        """`close` while another error is on its way: a failure of the last save is not raised over it."""
        if self.pending is not None:
            self.pending.exception()
        self._free()

    def drop_after(self, step: int) -> None:
        """Removes later steps: they were passed over as damaged and will be written anew."""
        for later in (s for s in steps_in(self.root.parent) if s > step):
            shutil.rmtree(self.root / str(later), ignore_errors=True)

    def close(self) -> None:
        """Waits and frees the background threads."""
        try:
            self.wait()
        finally:
            self._free()

    def _free(self) -> None:
        self.worker.shutdown()
        self.orbax.close()

    def restore(
        self, like: Callable[[int], TrainState]
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest undamaged state.

        Args:
          like: a step to the (abstract) state of that step: tree, shapes, dtypes, shardings. Stages differ in it.

        Returns:
          (state, what was passed as ``extra``), or None when nothing was ever saved.

        Raises:
          DyncompError: the checkpoint is of another model, or every step is damaged.
        """
        steps = processes.from_lead(lambda: steps_in(self.root.parent))
        for step in reversed(steps):
            try:
                return self._restore(self.root / str(step), like(step))
            except DamageError as damage:
                self.say(f"checkpoint {self.root / str(step)}: {damage}; trying the one before")
        if steps:
            raise DyncompError(
                f"every checkpoint under {self.root} is damaged; restore a copy or delete the folder to start anew"
            )
        return None

    def _restore(self, folder: Path, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        manifest, extra = processes.from_lead(lambda: _look_at(folder))
        wanted = flat(like)
        check_same_model(manifest, wanted, folder)
        found, said = read_arrays(self.orbax, folder, wanted)
        if said := processes.first_said(said):
            raise DamageError(said)
        integrity.verify_leaves(found, manifest, processes.added)
        leaves = [found[path] for path in wanted]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), extra


def _held(leaf: Any) -> Any:
    """What stays as it is while Orbax writes: the next train step overwrites the donated buffers.

    Orbax copies from an accelerator before it returns; what lies on the CPU it would write from where it is.
    """
    if getattr(leaf, "is_fully_addressable", True):
        return np.array(leaf)
    return jnp.copy(leaf) if jax.default_backend() == "cpu" else leaf


def _part(folder: Path, process: int) -> Path:
    """Where a process leaves its part of the arrays' sums for process 0."""
    return folder / f"sums.{process}.json"


def _taken(path: Path) -> integrity.Sums:
    part = json.loads(path.read_text())
    path.unlink()
    return part


def _look_at(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The manifest and what the loop had saved, every file verified."""
    manifest = integrity.read_manifest(folder)
    integrity.verify_files(folder, manifest)
    return manifest, json.loads((folder / "loop.json").read_text())


def read_arrays(orbax: Any, folder: Path, wanted: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """(arrays of a verified folder, what went wrong): the files are intact, so it is the store or the library."""
    target = {path: _abstract(leaf) for path, leaf in wanted.items()}
    try:
        return orbax.restore(folder / "arrays", target), ""
    except Exception as error:
        return {}, f"arrays cannot be read ({str(error).splitlines()[0][:120]})"


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def flat(state: Any) -> dict[str, Any]:
    """``{"params/a/b": leaf}`` of a state, in flattening order."""
    return dict(zip(paths(state), jax.tree.leaves(state), strict=True))


def check_same_model(manifest: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Refuses a checkpoint of another model, naming what differs first."""
    if manifest["format"] not in integrity.READABLE:
        raise DyncompError(
            f"{folder} has checkpoint format {manifest['format']}, this version reads {integrity.FORMAT}"
        )
    saved = {p: (tuple(r["shape"]), r["dtype"]) for p, r in manifest["leaves"].items()}
    here = {p: (tuple(leaf.shape), str(leaf.dtype)) for p, leaf in wanted.items()}
    for path in [*here, *saved]:
        if saved.get(path) != here.get(path):
            there, ours = saved.get(path, "nothing"), here.get(path, "nothing")
            raise DyncompError(
                f"{folder} is of another model: {path} is {there} there and {ours} here;"
                " use another --workdir, or training.Run.init_from for a partial start"
            )


def read_newest(workdir: Path) -> dict[str, np.ndarray]:
    """All arrays of the newest undamaged step, on the host, whatever model they belong to; each process for itself.

    Raises:
      DyncompError: there is none.
    """
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
    )
    orbax = ocp.StandardCheckpointer(multiprocessing_options=alone)
    for step in reversed(steps_in(workdir)):
        folder = Path(workdir).absolute() / CHECKPOINTS / str(step)
        try:
            manifest, _ = _look_at(folder)
            here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            wanted = {
                path: jax.ShapeDtypeStruct(tuple(r["shape"]), r["dtype"], sharding=here)
                for path, r in manifest["leaves"].items()
            }
            found, said = read_arrays(orbax, folder, wanted)
            if said:
                raise DamageError(said)
            integrity.verify_leaves(found, manifest)
            return {path: np.asarray(leaf) for path, leaf in found.items()}
        except DamageError:
            continue
    raise DyncompError(f"no readable checkpoint under {workdir}: train there first")
