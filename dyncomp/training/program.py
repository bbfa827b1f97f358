"""A run's parts with abstract shapes: compiled or tried out without data or memory."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dyncomp.core.aux import flatten
from dyncomp.core.errors import DyncompError
from dyncomp.parallel.aot import Program
from dyncomp.training import optimizers
from dyncomp.training.evaluate import set_controls
from dyncomp.training.run import Run
from dyncomp.training.state import init_variables, new_state
from dyncomp.training.step import forward, loss_of, train_step


def program_of(run: Run) -> Program:
    """The first stage's step; nothing is computed."""
    stage = run.plan()[0]
    tx = optimizers.freeze(stage.optimizer.build(stage.steps), stage.trainable)
    batch, boxed = _abstract(run)
    make = lambda inputs: _state(run, inputs, tx)
    state = jax.eval_shape(make, _first(batch))
    part = {
        name: jax.ShapeDtypeStruct((leaf.shape[0] // run.accumulate, *leaf.shape[1:]), leaf.dtype)
        for name, leaf in batch.items()
    }
    loss = loss_of(run, stage)
    return Program(train_step(run, stage, tx), state, boxed, batch, loss, part, stage.trainable)


def try_out(run: Run) -> None:
    """Traces a run's initialisation, forward pass, metrics, objectives and optimizers, and prices its events.

    Nothing is computed, and no data are read where the task knows their shapes.

    Raises:
      DyncompError: parts that do not fit together, or a swept control that the model does not have.
    """
    try:
        _try_out(run)
    except DyncompError:
        raise
    except Exception as error:  # whatever a part says when it is called in a way it does not know
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DyncompError(f"the parts do not fit together: {lines[0]}") from error


def _try_out(run: Run) -> None:
    batch, boxed = _abstract(run)
    variables = nn.meta.unbox(boxed)
    events: set[str] = set()

    def once(variables: Any, batch: Any) -> None:
        set_controls(variables, dict.fromkeys(run.sweep, 0.0))
        output, aux = forward(run)(variables, batch)
        run.task.metrics(output, batch)
        for stage in run.plan():
            stage.objective(output, aux, batch, jnp.int32(0))  # type: ignore[misc]
            tx = optimizers.freeze(stage.optimizer.build(stage.steps), stage.trainable)
            tx.init(variables["params"])
        events.update(flatten(aux.events))

    # One trace that returns nothing: results with shapes in the place of arrays fit no annotation.
    jax.eval_shape(once, variables, batch)
    if free := sorted(events - set(flatten(run.model.cost(batch["inputs"].shape)))):
        raise DyncompError(f"the model's cost() has no price of {free[0]!r}: add it")


def _abstract(run: Run) -> tuple[dict[str, Any], Any]:
    """(batch, boxed variables), both abstract."""
    batch = {
        name: jax.ShapeDtypeStruct((run.batch_size, *leaf.shape), leaf.dtype)
        for name, leaf in run.task.spec().items()
    }
    init = lambda inputs: init_variables(run.model, inputs, run.seed)
    return batch, jax.eval_shape(init, _first(batch))


def _first(batch: dict[str, Any]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *batch["inputs"].shape[1:]), batch["inputs"].dtype)


def _state(run: Run, inputs: Any, tx: Any) -> Any:
    variables = nn.meta.unbox(init_variables(run.model, inputs, run.seed))
    return new_state(variables, tx, run.ema is not None)
