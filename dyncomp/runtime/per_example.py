"""Segments written for one example, batched here: branches that would run every example to the end are refused."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

from dyncomp.core.errors import DyncompError

BRANCHES = {"cond": "lax.cond or lax.switch", "while": "lax.while_loop"}


def per_example(run: Callable[..., Any]) -> Callable[..., Any]:
    """A segment's ``run`` for batches from one for a single example.

    `jax.vmap` makes of a branch on the example a selection among all branches, and of a loop one that runs until the
    slowest has ended: nothing is saved, and gathers of weights become copies. A decision belongs between segments.

    Args:
      run: ``(weights, carry, threshold) -> (carry, output, route, score)``, no leaf with a batch axis.

    Raises:
      DyncompError: when traced, if ``run`` has a branch or an open loop that depends on the example.
    """

    @functools.wraps(run)
    def batched(weights: Any, carry: Any, threshold: Any) -> Any:
        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), carry)
        refuse_branches(lambda carry: run(weights, carry, threshold), one, where=run)
        return jax.vmap(run, in_axes=(None, 0, None))(weights, carry, threshold)

    return batched


def refuse_branches(fn: Callable[[Any], Any], example: Any, where: Callable[..., Any]) -> None:
    """Raises where ``fn`` of one example has a branch or an open loop whose predicate depends on it.

    Args:
      fn: of one pytree.
      example: shapes and dtypes of it.
      where: whose name the message tells.

    Raises:
      DyncompError: it has.
    """
    jaxpr = jax.make_jaxpr(fn)(example).jaxpr
    for name in _dependent(jaxpr, set(jaxpr.invars)):
        raise DyncompError(
            f"{getattr(where, '__name__', where)}: {BRANCHES[name]} on one example, under vmap, runs every example to"
            " the end; end the segment there and give it targets"
        )


def _dependent(jaxpr: Any, known: set[Any]) -> Iterator[str]:
    """Names of branches and loops whose predicate follows from variables in ``known``."""
    known = set(known)
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        reads = {v for v in equation.invars if _in(v, known)}
        if not reads:
            continue
        if name == "cond" and equation.invars[0] in reads:
            yield name
        if name == "while" and _loop_depends(equation, reads):
            yield name
        for inner in _inner(equation):
            alike = len(inner.invars) == len(
                equation.invars
            )  # else which is which is not told: take all
            pairs = zip(inner.invars, equation.invars if alike else inner.invars, strict=True)
            yield from _dependent(inner, {v for v, o in pairs if not alike or _in(o, reads)})
        known |= set(equation.outvars)


def _loop_depends(equation: Any, reads: set[Any]) -> bool:
    """Whether a loop's condition can follow from the example: the carries that it reads, walked to a fixed point."""
    counts = equation.params["cond_nconsts"], equation.params["body_nconsts"]
    cond, body = equation.params["cond_jaxpr"].jaxpr, equation.params["body_jaxpr"].jaxpr
    operands = equation.invars
    tainted = {n for n, v in enumerate(operands[sum(counts) :]) if _in(v, reads)}
    fixed = [_in(v, reads) for v in operands[counts[0] : sum(counts)]]
    while True:
        own = {v for v, hit in zip(body.invars[: counts[1]], fixed, strict=True) if hit}
        own |= {body.invars[counts[1] + n] for n in tainted}
        reached = _reached(body, own)
        grown = tainted | {n for n, v in enumerate(body.outvars) if _in(v, reached)}
        if grown == tainted:
            break
        tainted = grown
    start = {v for v, o in zip(cond.invars, operands[: counts[0]], strict=False) if _in(o, reads)}
    start |= {cond.invars[counts[0] + n] for n in tainted}
    return _in(cond.outvars[0], _reached(cond, start))


def _reached(jaxpr: Any, known: set[Any]) -> set[Any]:
    """Variables that follow from ``known``."""
    known = set(known)
    for equation in jaxpr.eqns:
        if any(_in(v, known) for v in equation.invars):
            known |= set(equation.outvars)
    return known


def _in(variable: Any, known: set[Any]) -> bool:
    return not hasattr(variable, "val") and variable in known  # a literal is not hashable


def _inner(equation: Any) -> Iterator[Any]:
    for value in equation.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            closed = getattr(one, "jaxpr", one)
            if hasattr(closed, "eqns"):
                yield closed
