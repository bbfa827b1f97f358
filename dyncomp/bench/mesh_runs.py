"""What `dyncomp bench meshes` trains: three tiny models on the first examples of real data.

A dense and a top-p language model and a vision transformer with exits: eight heads, eight experts and widths that eight
devices divide. Optimizers and objectives are those of shipped configs (`SHIPPED`).
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dyncomp import attention, config, exits, experts, models, routers, tasks
from dyncomp.core.dtypes import DTypes, FloatName
from dyncomp.core.plans import RoutePlan
from dyncomp.core.typing import Array, Float
from dyncomp.parallel.mesh import MeshSpec
from dyncomp.parallel.search import meshes
from dyncomp.tasks.base import Source, Split, Task
from dyncomp.training import Run
from dyncomp.training.optimizers import Optimizer

KINDS = ("dense", "moe", "exits")
QUICK_KINDS = ("moe",)
DEVICES, STEPS, BATCH, CONTEXT, EXAMPLES = 8, 50, 8, 8, 128
D, HIDDEN, HEADS, DEPTH = 32, 32, 8, 2
EXPERTS, P, MAX_P = 8, 0.2, 0.2
SHIPPED = {
    "dense": ("harder_tasks_more_experts", "dense"),
    "moe": ("harder_tasks_more_experts", "top_p"),
    "exits": ("dynn_robustness", "joint"),
}
SEQUENCE = {"seq": "tensor"}
"""Rules that split the activations' sequence over the tensor axis."""


def make_run(kind: str, dtype: FloatName, *, folder: str = "", seed: int = 0, **fields: Any) -> Run:
    """The run of a kind; optimizer and objective are those of its shipped config, over `STEPS` steps in all.

    Args:
      folder: where every process writes down which examples it reads; "" for nowhere.
      **fields: of `Run`.
    """
    slug, member = SHIPPED[kind]
    shipped = config.load(slug).runs[member]
    task = tasks.Digits() if kind == "exits" else tasks.CodeLM(context=CONTEXT, max_bytes=100_000)
    words: dict[str, Any] = {"steps": STEPS, "batch_size": BATCH, "log_every": 1, "capture": False}
    return Run(
        model=_model(kind, DTypes(param=dtype, compute=dtype, accum=dtype)),
        task=Excerpt(task, folder),
        objective=shipped.objective,
        optimizer=Recorded(shipped.optimizer),
        seed=seed,
        **{**words, **fields},
    )


def _model(kind: str, dtypes: DTypes) -> Any:
    causal = kind != "exits"
    mixer = functools.partial(attention.Attention, heads=HEADS, causal=causal)
    ffn = {
        "dense": functools.partial(experts.SwiGLU, hidden=HIDDEN),
        "moe": functools.partial(
            experts.MoE, router=_router(), num_experts=EXPERTS, hidden=HIDDEN // 2
        ),
        "exits": functools.partial(experts.MLP, hidden=HIDDEN),
    }[kind]
    groups = [models.Group([functools.partial(models.Block, mixer=mixer, ffn=ffn)], DEPTH)]
    if causal:
        return models.DecoderLM(vocab_size=256, d_model=D, groups=groups, dtypes=dtypes)
    backbone = functools.partial(
        models.VisionTransformer, classes=10, patch=4, d_model=D, groups=groups
    )
    return models.ExitingClassifier(
        backbone=backbone, rule=exits.ConfidenceRule(threshold=0.9), dtypes=dtypes
    )


def _router() -> Any:
    return functools.partial(Replayed, p=P, max_p=MAX_P, rows=BATCH * CONTEXT)


def shapes(kind: str, quick: bool) -> dict[str, MeshSpec]:
    """Name -> every mesh of `DEVICES` devices; with ``quick`` one of three axes.

    Experts are split on each (expert parallel); where they are not, a mesh does to them what it does to a dense unit.
    Sequences are split on every mesh of the dense model and on one of experts; images have five positions.
    """
    found, experts = {}, kind == "moe"
    length = 1 if kind == "exits" else CONTEXT
    for sizes in meshes(DEVICES, BATCH, experts, length):
        if experts and (sizes["expert"] == 1 or sizes["sequence"] > sizes["data"]):
            continue
        name = " ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
        found[name] = MeshSpec(**sizes, rules=None)
        if kind == "dense" and sizes["tensor"] * sizes["data"] == DEVICES > sizes["data"]:
            found[f"{name} seq"] = MeshSpec(**sizes, rules=SEQUENCE)
    mixed = next(name for name in found if name.count("=") == 3)
    return {mixed: found[mixed]} if quick else found


class Replayed(routers.TopP):
    """Top-p that takes the experts it is told while the control ``replay`` is 1; gates stay its own.

    Attributes:
      rows: n of a whole batch. The control ``told`` is int32 [n k]: an expert, or -1 for a slot that is not used.
    """

    rows: int = 1

    def choose(self, logits: Float[Array, "n e"], mask: Array | None, train: bool) -> RoutePlan:
        """What was told, or the nucleus."""
        own = super().choose(logits, mask, train)
        blank = lambda: jnp.full((self.rows, self.slots), -1, jnp.int32)
        told = self.variable("controls", "told", blank).value[: logits.shape[0]]
        replay = self.variable("controls", "replay", lambda: jnp.int32(0)).value > 0
        experts = jnp.where(replay, jnp.maximum(told, 0), own.experts)
        keep = jnp.where(replay, told >= 0, own.keep)
        gates = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), experts, axis=-1)
        return RoutePlan(experts, jnp.where(keep, gates, 0.0), keep, own.priority)


def told(plan: RoutePlan) -> Array:
    """A captured plan as the control of that name, int32 [l n k]."""
    return jnp.where(plan.keep, plan.experts, -1).astype(jnp.int32)


class Kept(NamedTuple):
    """State of `Recorded`: the first step's gradients, and the inner state."""

    steps: Any
    first: Any
    inner: Any


@dataclasses.dataclass(frozen=True)
class Recorded:
    """An optimizer that remembers the gradients of its first step, and is `STEPS` long whatever the run's length."""

    inner: Optimizer

    def build(self, steps: int) -> optax.GradientTransformation:
        """The inner transformation; ``steps`` may be where a part of the run ends."""
        del steps
        tx = self.inner.build(STEPS)
        init = lambda params: Kept(
            jnp.int32(0), jax.tree.map(jnp.zeros_like, params), tx.init(params)
        )

        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            pick = lambda old, new: jnp.where(state.steps == 0, new, old)
            first = jax.tree.map(pick, state.first, updates)
            updates, inner = tx.update(updates, state.inner, params)
            return updates, Kept(state.steps + 1, first, inner)

        return optax.GradientTransformation(init, update)


@dataclasses.dataclass(frozen=True)
class Excerpt(Task):
    """The first `EXAMPLES` training examples of a task, in every split; training reads leave a trace.

    Attributes:
      task: whose.
      folder: each process appends the indices it reads to ``read.I.jsonl`` there; "" for no trace.
    """

    task: Task
    folder: str = ""

    headline = property(lambda self: self.task.headline)  # pyrefly: ignore
    minimize = property(lambda self: self.task.minimize)  # pyrefly: ignore

    def source(self, split: Split) -> Source:
        """The excerpt."""
        traced = split == "train" and self.folder
        trace = Path(self.folder) / f"read.{jax.process_index()}.jsonl" if traced else None
        return _Excerpted(self.task.source("train"), trace)

    def objective(self) -> Any:
        """The task's."""
        return self.task.objective()

    def spec(self) -> dict[str, Any]:
        """The task's."""
        return self.task.spec()

    def metrics(self, output: Any, batch: Any) -> Any:
        """The task's."""
        return self.task.metrics(output, batch)


@dataclasses.dataclass(frozen=True)
class _Excerpted:
    source: Source
    trace: Path | None

    def __len__(self) -> int:
        return EXAMPLES

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Reads, and says so."""
        if self.trace:
            with self.trace.open("a") as stream:
                stream.write(f"{indices.tolist()}\n")
        return self.source.batch(indices)
