"""Builds, places and compiles what the loop runs: states and steps of each stage, on one device or a mesh."""

import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import SingleDeviceSharding

from dyncomp.parallel.counts import rows_of_every_expert
from dyncomp.parallel.mesh import MeshSpec, check_batch
from dyncomp.parallel.rules import make_rules, use
from dyncomp.parallel.shardings import (
    make_global_batch,
    process_rows,
    replicated,
    shardings_for,
)
from dyncomp.parallel.topology import compile_step
from dyncomp.training import optimizers
from dyncomp.training.run import Run
from dyncomp.training.state import TrainState, init_variables, new_state
from dyncomp.training.step import forward, train_step


class Engine:
    """One run on this program's devices.

    Args:
      run: the run; its mesh decides where things live. Without one, several processes split the batch.

    Attributes:
      rows: of each global batch, those that this process reads.
    """

    def __init__(self, run: Run):
        self.run, self.stages = run, run.plan()
        spec = run.mesh or (MeshSpec() if jax.process_count() > 1 else None)
        self.mesh = spec.build() if spec else None
        self.rules = make_rules(spec.rules) if spec else None
        if self.mesh is not None:
            check_batch(run.batch_size // run.accumulate, self.mesh)
        self.rows = process_rows(run.batch_size, self.mesh)
        spec = run.task.spec()["inputs"]
        self.inputs = np.zeros((1, *spec.shape), spec.dtype)
        self.abstracts: dict[int, TrainState] = {}

    def context(self) -> Any:
        """Tracing and running happen inside this."""
        return use(self.mesh, self.rules)

    @functools.cached_property
    def _boxed(self) -> Any:
        return jax.eval_shape(lambda x: init_variables(self.run.model, x, 0), self.inputs)

    def _tx(self, index: int) -> Any:
        stage = self.stages[index]
        return optimizers.freeze(stage.optimizer.build(stage.steps), stage.trainable)

    def _make(self, index: int, inputs: Any, seed: Any) -> TrainState:
        variables = nn.meta.unbox(init_variables(self.run.model, inputs, seed))
        state = new_state(variables, self._tx(index), self.run.ema is not None)
        controller = self.stages[index].controller
        return state if controller is None else state.replace(controller=controller.init(state))

    def _placed(self, abstract: Any) -> Any:
        """The shardings of an abstract state."""
        if self.mesh is None:
            here = SingleDeviceSharding(jax.local_devices()[0])
            return jax.tree.map(lambda _: here, abstract)
        return shardings_for(self._boxed, abstract, self.mesh, self.rules)[0]

    def rows_of_every_expert(self) -> dict[str, int]:
        """Event path -> rows a step if every expert ran on every token; traces the model."""
        like, batch = self._abstract(0), self.run.batch_size // self.run.accumulate
        variables = {"params": like.params, "controls": like.controls}
        inputs = jax.ShapeDtypeStruct((batch, *self.inputs.shape[1:]), self.inputs.dtype)
        with self.context():
            every = rows_of_every_expert(self.run.model, variables, inputs)
        return {path: self.run.accumulate * rows for path, rows in every.items()}

    def like(self, step: int) -> TrainState:
        """The abstract state of a step, with shardings; nothing is computed."""
        return self._abstract(self.run.stage_at(step)[0])

    def _abstract(self, index: int) -> TrainState:
        if index not in self.abstracts:  # tracing a model takes longer than a controller's call may
            make = functools.partial(self._make, index)
            abstract = jax.eval_shape(make, self.inputs, np.int32(0))
            place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
            self.abstracts[index] = jax.tree.map(place, abstract, self._placed(abstract))
        return self.abstracts[index]

    def fresh(self) -> TrainState:
        """Step 0: a pure function of the run's seed."""
        where = jax.tree.map(lambda leaf: leaf.sharding, self._abstract(0))
        make = jax.jit(functools.partial(self._make, 0), out_shardings=where)
        return make(self.inputs, np.int32(self.run.seed))

    def enter(self, index: int, state: TrainState) -> TrainState:
        """The state at the start of stage ``index``: a new optimizer state and controller memory."""
        opt_state = jax.jit(self._tx(index).init)(state.params)
        state = state.replace(opt_state=opt_state, controller=None)
        controller = self.stages[index].controller
        if controller is not None:
            state = state.replace(controller=controller.init(state))
        return self.settle(index, state)

    def settle(self, index: int, state: TrainState) -> TrainState:
        """Every leaf in a buffer of its own at its place: what a controller returns may share some, or be numpy."""
        where = jax.tree.map(lambda leaf: leaf.sharding, self._abstract(index))
        return jax.device_put(jax.tree.map(jnp.array, state), where)

    def batch(self, batch: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
        """A batch where the step takes it, from this process's `rows`."""
        if self.mesh is None:
            return batch
        return make_global_batch(batch, self.mesh, self.run.batch_size)

    def compile(self, index: int, batch: Mapping[str, Any]) -> tuple[Any, float]:
        """(compiled step, seconds) of a stage; the step is (state, batch, seed) and takes the state's memory over."""
        step = train_step(self.run, self.stages[index], self._tx(index))
        like = self._abstract(index)
        out = (jax.tree.map(lambda leaf: leaf.sharding, like), replicated(self.mesh))
        began = time.perf_counter()
        jitted = jax.jit(step, donate_argnums=0, out_shardings=out)
        lowered = jitted.lower(like, dict(batch), np.int32(0))
        compiled = compile_step(lowered, self.mesh)
        return compiled, time.perf_counter() - began

    @functools.cached_property
    def forward(self) -> Any:
        """(variables, batch) -> (output, aux), compiled once; every process gets all of both."""
        return jax.jit(forward(self.run), out_shardings=replicated(self.mesh))
