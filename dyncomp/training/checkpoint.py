"""Checkpoints: written by Orbax in the background, trusted only through our own digests.

::

    <workdir>/checkpoints/<step>/      complete once dyncomp.json is there
        arrays/...                     Orbax's files: a flat dict "params/..." -> array
        config.gin  loop.json          the run's config; what the loop had summed up but not yet logged
        dyncomp.json                   format, step, digest of every file and of every array's bytes
"""

import concurrent.futures
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dyncomp.core.errors import DyncompError
from dyncomp.training import integrity
from dyncomp.training.integrity import DamageError
from dyncomp.training.state import TrainState, paths

FOLDER = "checkpoints"


def steps_in(workdir: Path) -> list[int]:
    """Steps that have a manifest, oldest first (damaged or not)."""
    root = workdir / FOLDER
    found = root.iterdir() if root.exists() else ()
    return sorted(
        int(p.name) for p in found if p.name.isdigit() and (p / integrity.MANIFEST).exists()
    )


class Checkpointer:
    """Saves and restores the states of one run.

    Args:
      workdir: of the run.
      max_to_keep: newest steps that stay; an older one goes only after a newer one is complete.
      config_text: saved with every step.
    """

    def __init__(self, workdir: Path, *, max_to_keep: int = 2, config_text: str = ""):
        self.root = Path(workdir).absolute() / FOLDER
        self.max_to_keep, self.config_text = max_to_keep, config_text
        self.orbax = ocp.StandardCheckpointer()
        self.worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: concurrent.futures.Future[None] | None = None

    def save(self, state: TrainState, extra: Mapping[str, Any] | None = None) -> None:
        """Starts saving; the arrays are copied before this returns, the rest happens in the background.

        Raises:
          DyncompError: the previous save failed (a full disk, say); earlier steps are untouched.
        """
        self.wait()
        step = int(state.step)
        # Copies: the next train step overwrites the donated buffers while Orbax still writes.
        leaves = {path: np.array(leaf) for path, leaf in flat(state).items()}
        folder = self.root / str(step)
        if (folder / integrity.MANIFEST).exists():
            return
        records = {path: integrity.leaf_record(leaf) for path, leaf in leaves.items()}
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            (folder / "config.gin").write_text(self.config_text)
            (folder / "loop.json").write_text(json.dumps(dict(extra or {})))
            self.orbax.save(folder / "arrays", leaves)
        except OSError as error:
            raise self._failure(step, error) from error
        self.pending = self.worker.submit(self._complete, folder, step, records)

    def _complete(self, folder: Path, step: int, records: Mapping[str, Any]) -> None:
        self.orbax.wait_until_finished()
        integrity.write_manifest(folder, records, {"step": step})
        kept = steps_in(self.root.parent)[-self.max_to_keep :]
        for path in self.root.iterdir():
            if not path.name.isdigit() or int(path.name) not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def wait(self) -> None:
        """Blocks until the last save is complete; raises what went wrong with it."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        try:
            pending.result()
        except Exception as error:  # Orbax wraps the store's errors in several kinds
            raise self._failure(None, error) from error

    def poll(self) -> None:
        """Raises what went wrong in the background, if anything did; does not wait."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def _failure(self, step: int | None, error: BaseException) -> DyncompError:
        good = steps_in(self.root.parent)
        last = f"step {good[-1]} is safe" if good else "nothing was saved before"
        reason = next(
            (line for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        what = "the last checkpoint" if step is None else f"step {step}"
        return DyncompError(
            f"could not save {what} under {self.root}: {reason[:200]}; {last}; free space and run again"
        )

    def abandon(self) -> None:
        """`close` while another error is on its way: a failure of the last save is not raised over it."""
        try:
            self.close()
        except DyncompError:
            pass

    def drop_after(self, step: int) -> None:
        """Removes later steps: they were passed over as damaged and will be written anew."""
        for later in (s for s in steps_in(self.root.parent) if s > step):
            shutil.rmtree(self.root / str(later), ignore_errors=True)

    def close(self) -> None:
        """Waits and frees the background threads."""
        try:
            self.wait()
        finally:
            self.worker.shutdown()
            self.orbax.close()

    def restore(
        self, like: Callable[[int], TrainState], say: Callable[[str], None]
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest undamaged state.

        Args:
          like: a step to the (abstract) state of that step: tree, shapes, dtypes, shardings. Stages differ in it.
          say: told one line about each damaged step that is passed over.

        Returns:
          (state, what was passed as ``extra``), or None when nothing was ever saved.

        Raises:
          DyncompError: the checkpoint is of another model, or every step is damaged.
        """
        steps = steps_in(self.root.parent)
        for step in reversed(steps):
            try:
                return self._restore(self.root / str(step), like(step))
            except DamageError as damage:
                say(f"checkpoint {self.root / str(step)}: {damage}; trying the one before")
        if steps:
            raise DyncompError(
                f"every checkpoint under {self.root} is damaged; restore a copy or delete the folder to start anew"
            )
        return None

    def _restore(self, folder: Path, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        manifest = integrity.read_manifest(folder)
        integrity.verify_files(folder, manifest)
        wanted = flat(like)
        check_same_model(manifest, wanted, folder)
        found = read_arrays(self.orbax, folder, manifest, wanted)
        leaves = [found[path] for path in wanted]
        state = jax.tree.unflatten(jax.tree.structure(like), leaves)
        return state, json.loads((folder / "loop.json").read_text())


def read_arrays(
    orbax: Any, folder: Path, manifest: Mapping[str, Any], wanted: Mapping[str, Any]
) -> dict[str, Any]:
    """Arrays of a verified folder, verified again after reading."""
    target = {path: _abstract(leaf) for path, leaf in wanted.items()}
    try:
        found = orbax.restore(folder / "arrays", target)
    except (
        Exception
    ) as error:  # the files are intact, so whatever failed is the store or the library
        raise DamageError(f"arrays cannot be read ({str(error).splitlines()[0][:120]})") from error
    integrity.verify_leaves(found, manifest)
    return found


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def flat(state: Any) -> dict[str, Any]:
    """``{"params/a/b": leaf}`` of a state, in flattening order."""
    return dict(zip(paths(state), jax.tree.leaves(state), strict=True))


def check_same_model(manifest: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Refuses a checkpoint of another model, naming what differs first."""
    if manifest["format"] != integrity.FORMAT:
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
    """All arrays of the newest undamaged step, on the host, whatever model they belong to.

    Raises:
      DyncompError: there is none.
    """
    orbax = ocp.StandardCheckpointer()
    for step in reversed(steps_in(workdir)):
        folder = Path(workdir).absolute() / FOLDER / str(step)
        try:
            manifest = integrity.read_manifest(folder)
            integrity.verify_files(folder, manifest)
            here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            wanted = {
                path: jax.ShapeDtypeStruct(tuple(r["shape"]), r["dtype"], sharding=here)
                for path, r in manifest["leaves"].items()
            }
            return {
                k: np.asarray(v) for k, v in read_arrays(orbax, folder, manifest, wanted).items()
            }
        except DamageError:
            continue
    raise DyncompError(f"no readable checkpoint under {workdir}: train there first")
