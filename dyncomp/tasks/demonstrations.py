"""Behaviour cloning: windows of demonstrated episodes, made in a small world or read from files."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.core.metrics import Mean
from dyncomp.core.rng import fold
from dyncomp.core.typing import Array, Key
from dyncomp.exits.action_loss import ActionObjective
from dyncomp.tasks.base import SPLITS, Split, Task, check_split
from dyncomp.tasks.pick_place import PADDING, PickPlace, World, rollout


@dataclasses.dataclass(frozen=True, eq=False)
class WindowSource:
    """Windows of episodes that lie one behind the other; a window may reach past the end, where its mask is 0.

    Attributes:
      observations, actions: [n m] and [n a], all steps of all episodes.
      starts: int64 [w], the first step of each window.
      ends: int64 [w], the end of its episode.
      window: steps.
    """

    observations: np.ndarray
    actions: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    window: int

    @classmethod
    def of(cls, observations: Any, actions: Any, lengths: Any, window: int) -> "WindowSource":
        """One window for each step of each episode."""
        ends = np.cumsum(lengths)
        return cls(observations, actions, np.arange(ends[-1]), np.repeat(ends, lengths), window)

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """``inputs`` float32 [b t m], ``targets`` float32 [b t a], ``mask`` float32 [b t]."""
        steps = self.starts[indices][:, None] + np.arange(self.window)
        last = self.ends[indices][:, None] - 1
        rows = np.minimum(steps, last)
        return {
            "inputs": self.observations[rows],
            "targets": self.actions[rows],
            "mask": (steps <= last).astype(np.float32),
        }


@dataclasses.dataclass(frozen=True)
class ActionTask(Task):
    """Base: an observation to an action, whose last number is the gripper (-1 or 1)."""

    headline: ClassVar[str] = "error"

    def objective(self) -> ActionObjective:
        """Huber loss and cross-entropy of all heads."""
        return ActionObjective()

    def metrics(self, output: Any, batch: Mapping[str, Any]) -> dict[str, Mean]:
        """error: mean absolute error of the pose; gripper: how often it is right; exit: mean index."""
        mask, wanted = jnp.asarray(batch["mask"]), jnp.asarray(batch["targets"])
        said = output["emitted"]
        error = jnp.mean(jnp.abs(said[..., :-1] - wanted[..., :-1]), axis=-1)
        right = (said[..., -1] > 0) == (wanted[..., -1] > 0)
        exits = output["exit"].astype(jnp.float32)
        return {
            "error": Mean.of(error, mask),
            "gripper": Mean.of(right, mask),
            "exit": Mean.of(exits, mask),
        }


@dataclasses.dataclass(frozen=True)
class PickPlaceDemonstrations(ActionTask):
    """Expert episodes in `PickPlace`, disturbed while they are made: the answers are what the expert would do.

    Attributes:
      env: the world.
      window: steps of an example.
      episodes: of the training split; every other split has ``held_out``.
      steps: longest episode.
      noise: standard deviation that is added to executed velocities.
      slips: how often the gripper does the opposite.
    """

    env: PickPlace = PickPlace()  # noqa: RUF009
    window: int = 8
    episodes: int = 400
    held_out: int = 100
    steps: int = 24
    noise: float = 0.25
    slips: float = 0.04

    def source(self, split: Split) -> WindowSource:
        """Examples of a split; every split starts from worlds of its own."""
        check_split(split)
        return _demonstrations(self, split)

    def worlds(self, split: Split, count: int) -> World:
        """Start states [count ...]; the same ones whatever ``episodes`` is."""
        keys = jax.random.split(fold(SPLITS.index(split), 0, "worlds"), count)
        return jax.jit(jax.vmap(self.env.reset))(keys)

    def spec(self) -> dict[str, Any]:
        """Shapes from the options alone."""
        return window_spec(self.window, self.env.size, 3)

    def describe(self, inputs: np.ndarray) -> dict[str, np.ndarray]:
        """The table at every control step, [b t h w 3]."""
        side = self.env.side
        pixels = inputs[..., : 3 * side**2]
        return {"images": pixels.reshape(*inputs.shape[:2], side, side, 3)}


def window_spec(window: int, observation: int, action: int) -> dict[str, Any]:
    """Shape and dtype of one example."""
    floats = lambda *shape: jax.ShapeDtypeStruct((window, *shape), jnp.float32)
    return {"inputs": floats(observation), "targets": floats(action), "mask": floats()}


@functools.lru_cache(maxsize=8)
def _demonstrations(task: PickPlaceDemonstrations, split: Split) -> WindowSource:
    count = task.episodes if split == "train" else task.held_out
    key = fold(SPLITS.index(split), 1, "noise")
    seen, told, alive = map(np.asarray, _shown(task, task.worlds(split, count), key))
    rows = alive.T  # episodes one behind the other
    return WindowSource.of(
        seen.swapaxes(0, 1)[rows], told.swapaxes(0, 1)[rows], rows.sum(axis=1), task.window
    )


@functools.partial(jax.jit, static_argnames="task")
def _shown(
    task: PickPlaceDemonstrations, worlds: World, key: Key[Array, ""]
) -> tuple[Array, Array, Array]:
    """(observations [t n m], what the expert says [t n 3], alive [t n]) of disturbed expert episodes."""
    count = worlds.done.shape[0]

    def policy(carry: Any, worlds: World, t: Array) -> tuple[Any, Array, Array]:
        told = jax.vmap(task.env.expert)(worlds)
        shake, slip = jax.random.split(jax.random.fold_in(key, t))
        push = task.noise * jax.random.normal(shake, (count, 2))
        turned = jnp.where(jax.random.bernoulli(slip, task.slips, (count,)), -1.0, 1.0)
        return carry, jnp.concatenate([told[:, :2] + push, (told[:, 2] * turned)[:, None]], 1), told

    found = rollout(task.env, worlds, policy, None, task.steps)
    seen = jax.lax.map(jax.vmap(task.env.observe), found.worlds)
    return seen, found.told, found.alive


@dataclasses.dataclass(frozen=True)
class RecordedEpisodes(ActionTask):
    """Episodes in files: ``path/<split>/*.npz``, one each, of a robot or a simulator.

    A file holds ``camera_0``, ``camera_1``, .. uint8 [n h w 3], ``words`` int32 [l] (token numbers), and ``actions``
    float32 [n a], the gripper last, -1 or 1. Pixels come as they are over 255; a policy's encoder normalises.

    Attributes:
      path: the folder.
      cameras: height and width of each.
      words: places for the sentence; a longer one is refused.
      action: a.
      window: steps of an example.
    """

    path: str
    cameras: tuple[tuple[int, int], ...] = ((224, 224), (224, 224))
    words: int = 32
    action: int = 7
    window: int = 12

    def spec(self) -> dict[str, Any]:
        """Shapes from the options alone."""
        pixels = sum(3 * height * width for height, width in self.cameras)
        return window_spec(self.window, pixels + self.words, self.action)

    def source(self, split: Split) -> WindowSource:
        """Examples of a split, in memory.

        Raises:
          DyncompError: no files, an array that is missing or of another shape, or a sentence that is too long.
        """
        check_split(split)
        files = sorted(Path(self.path, split).glob("*.npz"))
        if not files:
            raise DyncompError(
                f"no .npz files under {Path(self.path, split)}: set RecordedEpisodes.path"
            )
        episodes = [self._episode(file) for file in files]
        observations, actions = (np.concatenate(part) for part in zip(*episodes, strict=True))
        return WindowSource.of(observations, actions, [len(a) for _, a in episodes], self.window)

    def _episode(self, file: Path) -> tuple[np.ndarray, np.ndarray]:
        found = np.load(file)
        names = [f"camera_{i}" for i in range(len(self.cameras))]
        if missing := [n for n in (*names, "words", "actions") if n not in found.files]:
            raise DyncompError(f"{file}: no array {missing[0]!r}; see RecordedEpisodes")
        actions, words = found["actions"].astype(np.float32), found["words"]
        n = len(actions)
        wanted = [(n, height, width, 3) for height, width in self.cameras]
        shapes = [found[name].shape for name in names]
        if shapes != wanted or actions.shape != (n, self.action) or len(words) > self.words:
            raise DyncompError(
                f"{file}: cameras {shapes}, actions {actions.shape}, {len(words)} words; wanted {wanted},"
                f" {(n, self.action)} and at most {self.words} words"
            )
        pixels = [found[name].reshape(n, -1).astype(np.float32) / 255 for name in names]
        padded = np.full((n, self.words), PADDING, np.float32)
        padded[:, : len(words)] = words
        return np.concatenate([*pixels, padded], axis=1), actions
