"""Builds what a config describes, with no state outside the result.

A factory (``@X``) becomes ``functools.partial(X, **bindings)`` with its bindings resolved now, in the scope of the
reference; an evaluated reference (``@X()``) is called now. So two configs never mix and a built object needs no config.
"""

import functools
from collections.abc import Callable
from typing import Any

from dyncomp.config.program import Program, name_of
from dyncomp.config.source import Ref
from dyncomp.core.errors import DyncompError


def build(program: Program, root: Callable[..., Any]) -> Any:
    """Calls ``root`` with its bindings.

    Raises:
      DyncompError: the root or a part refused its values (the message says which).
    """
    return _call(program, root, "")


def _call(program: Program, target: Callable[..., Any], scope: str) -> Any:
    arguments = _arguments(program, target, scope)
    try:
        return target(**arguments)
    except DyncompError:
        raise
    except (TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DyncompError(f"{name_of(target)}: {reason}") from error


def _arguments(program: Program, target: Any, scope: str) -> dict[str, Any]:
    bound = program.bound(target, scope)
    return {name: _value(program, b.value, scope) for name, (_, b) in bound.items()}


def _value(program: Program, value: Any, scope: str) -> Any:
    value = program.expand(value)
    if isinstance(value, Ref):
        target, inner = program.target(value), value.scope or scope
        if value.evaluate:
            return _call(program, target, inner)
        arguments = _arguments(program, target, inner)
        return functools.partial(target, **arguments) if arguments else target
    if isinstance(value, dict):
        return {_value(program, k, scope): _value(program, v, scope) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_value(program, item, scope) for item in value)
    return value
