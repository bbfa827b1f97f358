"""What a traced forward pass leaves for its backward pass, each array once however often it is named."""

from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend.core import Literal

SAME = {"copy", "expand_dims", "name", "reshape", "sharding_constraint", "squeeze"}
"""Operations whose result holds its operand's elements, in order and of one dtype."""

EMPTY = object()
"""Stands for what has no elements yet: the residuals of a form that was not taken."""

CALLS = {"checkpoint", "closed_call", "jit", "pjit", "remat2"}
"""Operations that run the program they hold, as it is."""


def stacked(jaxpr: Any) -> Iterator[list[Any]]:
    """Of a function that returns residuals: those that scans stack, shapes of equal elements together.

    Three products of one array name it three times. What only another platform's form of an operation keeps is left
    out: forms for TPUs, or for all platforms that have none of their own, are what counts.
    """
    wanted = {var for var in jaxpr.outvars if not isinstance(var, Literal)}
    outer = origins(jaxpr, jaxpr.invars)
    for eqn in (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"):
        body = eqn.params["jaxpr"].jaxpr
        given = [_key(outer, var) for var in eqn.invars]
        own = origins(body, [EMPTY if key is EMPTY else object() for key in given])
        groups: dict[Any, list[Any]] = {}
        for inside, var in zip(body.outvars, eqn.outvars, strict=True):
            if var.aval.ndim == inside.aval.ndim:
                continue  # carried, not stacked
            if var in wanted and (key := _key(own, inside)) is not EMPTY:
                groups.setdefault(key, []).append(var.aval)
        yield from groups.values()


def origins(jaxpr: Any, given: Sequence[Any]) -> dict[Any, Any]:
    """Variable -> one that stands for all that hold the same elements; ``given`` stand for the inputs."""
    found = dict(zip(jaxpr.invars, given, strict=True))
    for eqn in jaxpr.eqns:
        operands = [_key(found, var) for var in eqn.invars]
        for var, key in zip(eqn.outvars, _results(eqn, operands), strict=True):
            found[var] = key
    return found


def _results(eqn: Any, operands: list[Any]) -> list[Any]:
    """What stands for each result of an operation."""
    name = eqn.primitive.name
    if name in SAME:
        return operands[:1]
    if name == "empty2" or (name == "broadcast_in_dim" and operands[0] is EMPTY):
        return [EMPTY]
    if platforms := eqn.params.get("branches_platforms"):
        mine = next((i for i, names in enumerate(platforms) if "tpu" in (names or ())), None)
        mine = platforms.index(None) if mine is None else mine
        return _of_call(eqn.params["branches"][mine].jaxpr, operands[1:])
    if name in CALLS:
        held = eqn.params["jaxpr"]
        return _of_call(getattr(held, "jaxpr", held), operands)
    return list(eqn.outvars)


def _of_call(jaxpr: Any, operands: list[Any]) -> list[Any]:
    own = origins(jaxpr, operands)
    return [_key(own, var) for var in jaxpr.outvars]


def _key(found: dict[Any, Any], var: Any) -> Any:
    return object() if isinstance(var, Literal) else found.get(var, var)
