"""Where a run's checkpoints lie, for programs that must not wait for JAX to be imported too."""

from pathlib import Path

CHECKPOINTS = "checkpoints"
"""Folder of the steps, below a run's work directory."""
MANIFEST = "dyncomp.json"
"""Written last: a step that has it is complete."""


def steps_in(workdir: Path) -> list[int]:
    """Steps that have a manifest, oldest first (damaged or not)."""
    root = workdir / CHECKPOINTS
    found = root.iterdir() if root.exists() else ()
    return sorted(int(p.name) for p in found if p.name.isdigit() and (p / MANIFEST).exists())


def newest_step(workdir: Path) -> Path | None:
    """Folder of the step completed last in a work directory, of a run or of a suite."""
    found = workdir.glob(f"**/{CHECKPOINTS}/*/{MANIFEST}")
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    return newest.parent if newest else None
