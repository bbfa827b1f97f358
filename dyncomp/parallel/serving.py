"""Prefill and decode of language models with abstract shapes: what ``dyncomp compile --what`` compiles.

The steps are those of the decode loop (`dyncomp.decoding.Steps`), at full depth and greedy. Parameters keep the dtype
that the config gives them (``dtypes.DTypes.param``) and lie as the table of rules says; caches are split over sequences
and heads of keys and values.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dyncomp.core.errors import DyncompError
from dyncomp.core.sharding import axis_rules, to_spec
from dyncomp.core.typing import PyTree
from dyncomp.decoding.steps import Steps
from dyncomp.models import DecoderLM, unstack
from dyncomp.models.layout import STACKED
from dyncomp.parallel.shardings import (
    Names,
    batch_sharding,
    held_bytes,
    logical_names,
    placed,
    replicated,
)

What = Literal["prefill", "decode"]


@dataclasses.dataclass(frozen=True)
class Serving:
    """One step of serving a batch.

    Attributes:
      what: which.
      step: (variables, *arguments) -> results.
      variables: abstract, separate, unboxed.
      names: logical names of the parameters.
      arguments: abstract, what changes from step to step; the first of a decode step is donated.
      model: what runs.
      inputs: shape [b t] of the tokens that are read.
    """

    what: What
    step: Callable[..., Any]
    variables: PyTree
    names: Names
    arguments: tuple[Any, ...]
    model: DecoderLM
    inputs: tuple[int, int]


def serving_of(run: Any, what: What, batch: int, length: int) -> Serving:
    """The step of a run's model.

    Args:
      run: `dyncomp.training.Run`.
      what: "prefill" reads prompts of ``length`` tokens into a cache of as many slots; "decode" reads one token a
        sequence with a cache of ``length`` slots.
      batch: sequences.

    Raises:
      DyncompError: the model does not decode, or does not take so many tokens.
    """
    model = run.model.template() if hasattr(run.model, "template") else run.model
    if not isinstance(model, DecoderLM):
        raise DyncompError(
            f"--what {what} needs a models.DecoderLM, not {type(model).__name__}; leave it out for a train step"
        )
    if batch < 1 or length < 2:
        raise DyncompError(f"--batch {batch} --length {length}: use 1 or more and 2 or more")
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    boxed = jax.eval_shape(model.init, jax.random.key(0), tokens)
    variables = jax.eval_shape(unstack, nn.meta.unbox(boxed))
    model = model.clone(layers="unroll")
    model._check_length(length)
    steps, key = Steps(model), jax.eval_shape(jax.random.key, 0)
    shape = (batch, length)
    prompt = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool_)

    def prefill(variables: Any, tokens: Any, mask: Any, key: Any) -> Any:
        return steps.prefill(variables, tokens, mask, length, None, key)

    def decode(variables: Any, stand: Any, key: Any) -> Any:
        return steps.decode(variables, stand, None, key)

    names = separate_names(logical_names(boxed))
    if what == "prefill":
        return Serving(what, prefill, variables, names, (*prompt, key), model, shape)
    stand, *_ = jax.eval_shape(prefill, variables, *prompt, key)
    return Serving(what, decode, variables, names, (stand, key), model, (batch, 1))


def separate_names(names: Names) -> Names:
    """Names of stacked parameters, for separate ones (`models.unstack`)."""
    found = {}
    for path, (axes, shape) in names.items():
        if STACKED not in path:
            found[path] = axes, shape
            continue
        at = path.index(STACKED)
        for layer in range(shape[0]):
            own = (*path[:at], f"{STACKED}_{layer}", *path[at + 1 :])
            found[own] = axes[1:], shape[1:]
    return found


def argument_shardings(serving: Serving, mesh: Mesh) -> tuple[Any, ...]:
    """Where arguments lie, under the rules that are set: sequences over the axes that split a batch, heads over theirs.

    Args:
      mesh: its batch axes divide the batch.
    """
    batch = serving.inputs[0]
    heads = to_spec(("kv_heads",))[0]
    parts = functools.reduce(lambda n, a: n * mesh.shape[a], [heads] if heads else [], 1)

    def place(leaf: Any) -> NamedSharding | None:
        if not leaf.shape or leaf.shape[0] != batch:
            return replicated(mesh)
        split = leaf.ndim == 4 and leaf.shape[1] % parts == 0
        spec = batch_sharding(mesh).spec
        return NamedSharding(mesh, PartitionSpec(*spec, heads) if split else spec)

    return jax.tree.map(place, serving.arguments)


def serving_bytes(serving: Serving, mesh: Mesh, rules: Any) -> int:
    """Bytes of parameters and arguments on one device: mostly parameters and, decoding, the cache.

    Raises:
      DyncompError: the mesh does not divide a parameter.
    """
    with axis_rules(rules):
        arguments = argument_shardings(serving, mesh)
    variables = placed(serving.names, serving.variables, mesh, rules)
    pairs = zip(jax.tree.leaves(serving.arguments), jax.tree.leaves(arguments), strict=True)
    held = [
        (leaf, place)
        for leaf, place in pairs
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    ]
    leaves, places = zip(*held, strict=True)
    return held_bytes(serving.variables, variables) + held_bytes(leaves, places)


def lower(serving: Serving, mesh: Mesh, rules: Any) -> jax.stages.Lowered:
    """The step, lowered for a mesh; call it while tracing for that mesh (`rules.traced_for`)."""
    with axis_rules(rules):
        arguments = argument_shardings(serving, mesh)
    variables = placed(serving.names, serving.variables, mesh, rules)
    out = (arguments[0], None, None) if serving.what == "decode" else None
    step = jax.jit(
        serving.step,
        in_shardings=(variables, *arguments),
        out_shardings=out,
        donate_argnums=(1,) if serving.what == "decode" else (),
    )
    return step.lower(serving.variables, *serving.arguments)
