"""The compiled train step and evaluation step."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dyncomp.core import rng
from dyncomp.core.aux import Aux
from dyncomp.models.layout import apply
from dyncomp.training.optimizers import hold
from dyncomp.training.run import Run, Stage
from dyncomp.training.state import TrainState

Step = Callable[[TrainState, Mapping[str, Any], Any], tuple[TrainState, dict[str, Any]]]


def train_step(run: Run, stage: Stage, tx: optax.GradientTransformation) -> Step:
    """(state, batch, seed) -> (state, {"metrics": ..., "events": ..., "grad_norm": ...}), to be jitted.

    Thresholds, budgets (``state.controls``) and the seed are arguments: changing them recompiles nothing.
    """

    def step(state: TrainState, batch: Mapping[str, Any], seed: Any):
        keys = rng.streams(seed, state.step)
        grads, (out, controls) = _gradients(run, stage, state, batch, keys)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = _average(state.ema, params, run.ema)
        new = state.replace(
            step=state.step + 1, params=params, opt_state=opt_state, ema=ema, controls=controls
        )
        elements = jnp.sum(batch["mask"] > 0, dtype=jnp.int32)
        return new, {**out, "grad_norm": optax.tree.norm(grads), "elements": elements}

    return step


def _average(ema: Any, params: Any, decay: float | None) -> Any:
    if decay is None:
        return None
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)


def loss_of(run: Run, stage: Stage) -> Callable[..., tuple[Any, Any]]:
    """(params, controls, batch, step, keys) -> (loss, (what is reported, next controls))."""
    objective = stage.objective
    assert objective is not None

    def loss_fn(params: Any, controls: Any, batch: Any, step: Any, keys: Any):
        variables = {"params": hold(params, stage.trainable), "controls": controls}
        (output, aux), updates = apply(
            run.model, variables, batch["inputs"], train=True, rngs=keys, mutable=["controls"]
        )
        loss, metrics = objective(output, aux, batch, step)
        # Modules may move their controls (a balancing bias): what comes back is the next step's.
        controls = updates.get("controls", controls)
        return loss, ({"loss": loss, "metrics": metrics, "events": aux.events}, controls)

    return loss_fn


def _gradients(run: Run, stage: Stage, state: TrainState, batch: Any, keys: Any):
    whole = loss_of(run, stage)

    def loss_fn(params: Any, batch: Any, keys: Any):
        return whole(params, state.controls, batch, state.step, keys)

    grad = jax.grad(loss_fn, has_aux=True)
    if run.accumulate == 1:
        return grad(state.params, batch, keys)
    return _accumulated(grad, state.params, batch, keys, run.accumulate)


def _accumulated(grad: Any, params: Any, batch: Any, keys: Any, parts: int):
    """Gradients of equal parts of the batch, weighted by how many elements each part's mask counts."""
    # Part i takes every parts-th example, so that each device keeps its own examples under a mesh.
    strided = lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
    split = jax.tree.map(strided, batch)
    counted = jnp.sum(split["mask"].reshape(parts, -1), axis=1)
    weights = counted / jnp.maximum(jnp.sum(counted), 1.0)

    def body(total: Any, xs: Any):
        index, weight, part = xs
        own = {name: jax.random.fold_in(key, index) for name, key in keys.items()}
        grads, (out, controls) = grad(params, part, own)
        total = jax.tree.map(lambda a, g: a + (weight * g).astype(a.dtype), total, grads)
        return total, ({**out, "loss": out["loss"] * weight}, controls)

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, (outs, moved) = jax.lax.scan(body, zeros, (jnp.arange(parts), weights, split))
    controls = jax.tree.map(_middle, moved)
    return grads, (jax.tree.map(lambda x: jnp.sum(x, axis=0), outs), controls)


def _middle(values: Any) -> Any:
    """Mean over the parts of what each part made of a control; integers are not moved by training."""
    whole = jnp.issubdtype(values.dtype, jnp.integer)
    return values[0] if whole else jnp.mean(values, axis=0)


def eval_step(run: Run) -> Callable[[Any, Mapping[str, Any]], dict[str, Any]]:
    """(variables, batch) -> {"metrics": ..., "events": ...}, to be jitted; controls are in the variables."""

    def step(variables: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        output, aux = apply(run.model, variables, batch["inputs"], mask=batch["mask"])
        return {"metrics": run.task.metrics(output, batch), "events": aux.events}

    return step


def forward(run: Run, capture: tuple[str, ...] = ()) -> Callable[[Any, Any], tuple[Any, Aux]]:
    """(variables, batch) -> (output, aux), to be jitted: for controllers and pictures."""

    def call(variables: Any, batch: Mapping[str, Any]) -> tuple[Any, Aux]:
        return apply(run.model, variables, batch["inputs"], mask=batch["mask"], capture=capture)

    return call
