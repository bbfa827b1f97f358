"""Segments written for one example, batched here: branches that would run every example to the end are refused."""

import functools
from collections.abc import Callable, Iterator, Sequence
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
    found: list[str] = []
    _follow(jaxpr, [True] * len(jaxpr.invars), found)
    if found:
        raise DyncompError(
            f"{getattr(where, '__name__', where)}: {BRANCHES[found[0]]} on one example, under vmap, runs every example"
            " to the end; end the segment there and give it targets"
        )


def _follow(jaxpr: Any, given: Sequence[bool], found: list[str]) -> list[bool]:
    """Which results follow from the inputs that ``given`` marks; names of branches that do are added to ``found``."""
    known = {v for v, hit in zip(jaxpr.invars, given, strict=True) if hit}
    for equation in jaxpr.eqns:
        reads = [_in(v, known) for v in equation.invars]
        if any(reads):
            hits = RULES.get(equation.primitive.name, _call)(equation, reads, found)
            known |= {v for v, hit in zip(equation.outvars, hits, strict=True) if hit}
    return [_in(v, known) for v in jaxpr.outvars]


def _call(equation: Any, reads: list[bool], found: list[str]) -> list[bool]:
    """Any other operation: through what it holds, where that has its inputs and results; else all follow from all."""
    everything, each = [True] * len(equation.outvars), []
    for inner in _inner(equation):
        alike = len(inner.invars) == len(reads)
        hits = _follow(inner, reads if alike else [True] * len(inner.invars), found)
        each.append(hits if alike and len(hits) == len(everything) else everything)
    return _either(each) if each else everything


def _cond(equation: Any, reads: list[bool], found: list[str]) -> list[bool]:
    """A branch: the first operand chooses, the others are what each branch takes."""
    if reads[0]:
        found.append("cond")
    each = [_follow(one.jaxpr, reads[1:], found) for one in equation.params["branches"]]
    return [reads[0] or hit for hit in _either(each)]


def _while(equation: Any, reads: list[bool], found: list[str]) -> list[bool]:
    """An open loop: carries that follow in some trip, to a fixed point, then its condition."""
    counts = equation.params["cond_nconsts"], equation.params["body_nconsts"]
    cond, body = equation.params["cond_jaxpr"].jaxpr, equation.params["body_jaxpr"].jaxpr
    fixed, carry = reads[counts[0] : sum(counts)], reads[sum(counts) :]
    while (grown := _either([carry, _follow(body, [*fixed, *carry], found)])) != carry:
        carry = grown
    depends = _follow(cond, [*reads[: counts[0]], *carry], found)[0]
    if depends:
        found.append("while")
    return [depends or hit for hit in carry]


def _scan(equation: Any, reads: list[bool], found: list[str]) -> list[bool]:
    """A loop of fixed length, to a fixed point of what it carries.

    What is stacked has one more axis outside. Carries are the last of the other inputs: releases of jax name their
    number differently.
    """
    body, given = equation.params["jaxpr"].jaxpr, list(reads)
    same = lambda outer, inner: [
        n for n, (v, o) in enumerate(zip(outer, inner, strict=True)) if v.aval.ndim == o.aval.ndim
    ]
    results = same(equation.outvars, body.outvars)
    carries = same(equation.invars, body.invars)
    carries = carries[len(carries) - len(results) :]
    while True:
        hits = _follow(body, given, found)
        new = [a for a, b in zip(carries, results, strict=True) if hits[b] and not given[a]]
        if not new:
            return hits
        for each in new:
            given[each] = True


RULES = {"cond": _cond, "while": _while, "scan": _scan}


def _either(rows: Sequence[Sequence[bool]]) -> list[bool]:
    return [any(column) for column in zip(*rows, strict=True)]


def _in(variable: Any, known: set[Any]) -> bool:
    return not hasattr(variable, "val") and variable in known  # a literal is not hashable


def _inner(equation: Any) -> Iterator[Any]:
    for value in equation.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            closed = getattr(one, "jaxpr", one)
            if hasattr(closed, "eqns"):
                yield closed
