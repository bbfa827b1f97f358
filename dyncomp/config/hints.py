"""Does a value fit an annotation? References are judged without calling anything."""

import collections.abc
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union

import typing_extensions
from beartype import BeartypeConf
from beartype.door import is_bearable

_CONF = BeartypeConf(is_pep484_tower=True)
_FACTORY = Callable[..., Any]


@functools.cache
def parameters(target: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """What a class or function can be given by name (a Linen module's ``parent`` and ``name`` are its owner's)."""
    try:
        found = dict(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return {"kwargs": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}
    if is_linen(target):
        found.pop("parent", None)
        found.pop("name", None)
    return found


def accepts(target: Callable[..., Any], argument: str) -> bool:
    """Whether ``target`` takes a keyword argument of this name."""
    found = parameters(target)
    if any(p.kind is p.VAR_KEYWORD for p in found.values()):
        return True
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return argument in found and found[argument].kind in kinds


def required(target: Callable[..., Any]) -> list[str]:
    """Names of the arguments that have no default."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [
        name
        for name, p in parameters(target).items()
        if p.kind in kinds and p.default is inspect.Parameter.empty
    ]


@functools.cache
def hints(target: Callable[..., Any]) -> Mapping[str, Any]:
    """Annotations of a class's fields or a function's arguments; empty where they can't be resolved."""
    plain = inspect.unwrap(target)
    sources = [plain, plain.__init__] if inspect.isclass(plain) else [plain]
    found: dict[str, Any] = {}
    for source in sources:
        try:
            found |= typing.get_type_hints(source)
        except (NameError, TypeError, AttributeError):
            continue
    if inspect.isclass(plain):
        found.pop("return", None)
    return found


def is_linen(target: Any) -> bool:
    """Whether this is a Linen module class."""
    return inspect.isclass(target) and any(
        c.__name__ == "Module" and c.__module__.startswith("flax.linen") for c in target.__mro__
    )


def mismatch_literal(value: Any, hint: Any) -> str | None:
    """Why a literal (without references) does not fit, as ``message; fix`` words, or None."""
    if isinstance(value, bool) and not _admits_bool(hint):
        return f"{value!r} is no {describe(hint)}"
    try:
        fits = is_bearable(value, hint, conf=_CONF)
    except Exception:  # an annotation that beartype does not know judges nothing
        return None
    return None if fits else f"{value!r} is no {describe(hint)}"


def mismatch_instance(target: Any, hint: Any) -> bool:
    """Whether what ``target()`` returns can't be what ``hint`` asks for (False when unknown)."""
    result = target if inspect.isclass(target) else hints(target).get("return", Any)
    if hint == _FACTORY:
        return inspect.isclass(target)
    return not any(_subclass(r, h) for r in options(result) for h in options(hint))


def mismatch_factory(target: Any, hint: Any) -> bool:
    """Whether ``target`` itself (a class or function) can't be what ``hint`` asks for."""
    return not any(_callable_fits(target, h) for h in options(hint))


def wants_callable(hint: Any) -> bool:
    """Whether the annotation asks for a factory."""
    return any(_origin(h) in (collections.abc.Callable, type) for h in options(hint))


def options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the hint alone."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return tuple(o for arg in typing.get_args(hint) for o in options(arg))
    if isinstance(hint, typing.TypeVar):
        return options(hint.__bound__) if hint.__bound__ is not None else (Any,)
    if typing.get_origin(hint) is typing.Annotated:
        return options(typing.get_args(hint)[0])
    return (hint,)


def container(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Container class and element annotations: ``dict[str, int]`` gives ``(dict, (str, int))``."""
    return (Any if hint in (Any, object) else _origin(hint)), typing.get_args(hint)


def elements(inner: tuple[Any, ...], count: int) -> list[Any]:
    """One annotation per element of a sequence of fitting `arity`: ``tuple[int, ...]`` repeats."""
    if not inner:
        return [Any] * count
    if len(inner) == 1 or inner[1] is Ellipsis:
        return [inner[0]] * count
    return list(inner)


def arity(kind: Any, inner: tuple[Any, ...]) -> int | None:
    """How many elements a container must have: ``tuple[int, str]`` takes two, ``tuple[int, ...]`` any number."""
    return len(inner) if kind is tuple and inner and Ellipsis not in inner else None


def describe(hint: Any) -> str:
    """An annotation for people: ``float``, ``"scan" or "unroll"``."""
    if hint is type(None):
        return "None"
    if typing.get_origin(hint) is Literal:
        return " or ".join(repr(a) for a in typing.get_args(hint))
    if len(options(hint)) > 1:
        return " or ".join(describe(o) for o in options(hint))
    return hint.__name__ if inspect.isclass(hint) and not typing.get_args(hint) else str(hint)


def _origin(hint: Any) -> Any:
    return typing.get_origin(hint) or hint


def _admits_bool(hint: Any) -> bool:
    strangers = (int, float, complex, str, bytes, list, tuple, dict, type(None))
    for option in options(hint):
        if option in (bool, Any, object) or not inspect.isclass(option):
            return True
        if not issubclass(option, strangers):
            return True
    return False


def _subclass(result: Any, hint: Any) -> bool:
    result, hint = _origin(result), _origin(hint)
    if hint in (Any, object) or not inspect.isclass(result):
        return True
    if hint is None or hint is Literal:
        return False
    if hint is collections.abc.Callable:
        return any("__call__" in c.__dict__ for c in result.__mro__) and not is_linen(result)
    if not inspect.isclass(hint):
        return True
    if typing_extensions.is_protocol(hint):
        return all(_has(result, m) for m in typing_extensions.get_protocol_members(hint))
    if "jaxtyping" in getattr(hint, "__module__", ""):
        return True
    return issubclass(result, hint)


def _has(cls: type, member: str) -> bool:
    return hasattr(cls, member) or any(
        member in getattr(c, "__annotations__", {}) for c in cls.__mro__
    )


def _callable_fits(target: Any, hint: Any) -> bool:
    origin = _origin(hint)
    if origin in (Any, object, collections.abc.Callable):
        return callable(target)
    if origin is type:
        bound = (typing.get_args(hint) or (object,))[0]
        return inspect.isclass(target) and _subclass(target, bound)
    if inspect.isclass(origin) and typing_extensions.is_protocol(origin):
        members = typing_extensions.get_protocol_members(origin)
        return not inspect.isclass(target) and set(members) <= {"__call__"}
    return False
