"""A run's train step with abstract shapes, for compiling without data or memory."""

import jax
from flax import linen as nn

from dyncomp.parallel.aot import Program
from dyncomp.training import optimizers
from dyncomp.training.run import Run
from dyncomp.training.state import init_variables, new_state
from dyncomp.training.step import train_step


def program_of(run: Run) -> Program:
    """The first stage's step; nothing is computed."""
    stage = run.plan()[0]
    tx = optimizers.freeze(stage.optimizer.build(stage.steps), stage.trainable)
    batch = {
        name: jax.ShapeDtypeStruct((run.batch_size, *leaf.shape), leaf.dtype)
        for name, leaf in run.task.spec().items()
    }

    first = jax.ShapeDtypeStruct((1, *batch["inputs"].shape[1:]), batch["inputs"].dtype)
    init = lambda inputs: init_variables(run.model, inputs, run.seed)
    boxed = jax.eval_shape(init, first)
    make = lambda inputs: new_state(nn.meta.unbox(init(inputs)), tx, run.ema is not None)
    return Program(train_step(run, stage, tx), jax.eval_shape(make, first), boxed, batch)
