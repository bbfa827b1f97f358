"""A parsed config with every name resolved: which binding wins, and what the root reaches.

Scopes work as gin's do: ``a/b/X.y = 1`` holds for ``X`` built in scope ``a/b``, the longest matching prefix wins, a
reference without a scope is built in the scope of whoever refers to it, a scoped one in its own.
"""

import dataclasses
import difflib
import importlib
from collections.abc import Iterator
from typing import Any

from dyncomp.config.source import Binding, Macro, Ref, Source

Key = tuple[str, Any, str]
"""(scope, target's id or macro, argument)."""


class ResolveError(Exception):
    """A name that leads nowhere; ``fix`` says what to write."""

    def __init__(self, message: str, fix: str):
        super().__init__(message)
        self.fix = fix


@dataclasses.dataclass(frozen=True)
class Symbol:
    """An importable object and how a config names it."""

    target: Any
    module: str
    path: str


@dataclasses.dataclass
class Program:
    """The bindings of a config and all it includes.

    Attributes:
      top: the outermost source (the command line, where there are overrides).
      winners: key -> the binding that holds.
      all: key -> every binding, innermost include first.
    """

    top: Source
    winners: dict[Key, Binding] = dataclasses.field(default_factory=dict)
    all: dict[Key, list[Binding]] = dataclasses.field(default_factory=dict)
    symbols: dict[int, Symbol] = dataclasses.field(default_factory=dict)

    def resolve(self, source: Source, selector: str) -> Any:
        """The class or function that ``selector`` names in ``source``."""
        first, *rest = selector.split(".")
        if first not in source.imports:
            close = difflib.get_close_matches(first, source.imports, n=1)
            fix = (
                f"did you mean {close[0]}?" if close else f"import it: from dyncomp import {first}"
            )
            raise ResolveError(f"unknown name {first!r}", fix)
        statement = source.imports[first]
        plain = not statement.is_from and not statement.alias
        module = statement.module.split(".")[0] if plain else statement.module
        target = _import(statement.module, module)
        for part in rest:
            if not hasattr(target, part):
                close = difflib.get_close_matches(part, dir(target), n=1)
                fix = f"did you mean {close[0]}?" if close else "check the spelling"
                raise ResolveError(f"{selector!r}: nothing called {part!r} there", fix)
            target = getattr(target, part)
        if not callable(target):
            raise ResolveError(f"{selector!r} is neither a class nor a function", "name one")
        self.symbols.setdefault(id(target), Symbol(target, *_split(module, rest)))
        return target

    def key(self, binding: Binding) -> Key:
        """What a binding binds."""
        if binding.macro is not None:
            return ("", "macro", binding.macro)
        return (binding.scope, id(self.resolve(binding.source, binding.selector)), binding.argument)

    def macro(self, name: str) -> Binding:
        """The definition of ``%name``."""
        found = self.winners.get(("", "macro", name))
        if found is None:
            names = [key[2] for key in self.winners if key[1] == "macro"]
            close = difflib.get_close_matches(name, names, n=1)
            fix = f"did you mean %{close[0]}?" if close else f"define it: {name} = VALUE"
            if name == "gin.REQUIRED":
                raise ResolveError(
                    "a value is required here", "bind it, in this file or on the command line"
                )
            raise ResolveError(f"macro %{name} is not defined", fix)
        return found

    def bound(self, target: Any, scope: str) -> dict[str, tuple[Key, Binding]]:
        """Arguments bound for ``target`` when it is built in ``scope``."""
        found: dict[str, tuple[Key, Binding]] = {}
        for prefix in _prefixes(scope):
            for key, binding in self.winners.items():
                if key[0] == prefix and key[1] == id(target):
                    found[key[2]] = (key, binding)
        return found

    def target(self, ref: Ref) -> Any:
        """What a reference names."""
        return self.resolve(ref.source, ref.selector)

    def reached(self, root: Any) -> dict[Key, Binding]:
        """Every winning binding that building ``root`` uses, macros included.

        Raises:
          ResolveError: an unknown name, an undefined macro, or objects that refer to each other in a circle.
        """
        found: dict[Key, Binding] = {}
        self._visit(root, "", found, ())
        return found

    def visits(self, root: Any) -> list[tuple[Any, str]]:
        """Every (target, scope) that building ``root`` passes."""
        seen: dict[tuple[int, str], Any] = {}
        self._visit(root, "", {}, (), seen)
        return [(target, scope) for (_, scope), target in seen.items()]

    def _visit(
        self,
        target: Any,
        scope: str,
        found: dict[Key, Binding],
        path: tuple,
        seen: dict | None = None,
    ) -> None:
        if (id(target), scope) in path:
            raise ResolveError(f"{name_of(target)} is built from itself", "remove the circle")
        if seen is not None:
            seen[id(target), scope] = target
        path = (*path, (id(target), scope))
        for key, binding in self.bound(target, scope).values():
            found[key] = binding
            for item in self.flat(binding.value, found):
                self._visit(self.target(item), item.scope or scope, found, path, seen)

    def flat(self, value: Any, found: dict[Key, Binding] | None = None) -> Iterator[Ref]:
        """References inside a value, those behind macros included."""
        yield from _flat(self, value, {} if found is None else found, ())

    def expand(self, value: Any, depth: int = 0) -> Any:
        """The value with every macro replaced by what it stands for."""
        if isinstance(value, Macro):
            if depth > 100:
                raise ResolveError(f"macro {value} is defined by itself", "remove the circle")
            return self.expand(self.macro(value.name).value, depth + 1)
        if isinstance(value, dict):
            return {self.expand(k, depth): self.expand(v, depth) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.expand(item, depth) for item in value)
        return value


def name_of(target: Any) -> str:
    """A class's or function's plain name."""
    return getattr(target, "__name__", str(target))


def _flat(program: Program, value: Any, found: dict, seen: tuple) -> Iterator[Ref]:
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, Macro):
        binding = program.macro(value.name)
        if value.name in seen:
            raise ResolveError(f"macro {value} is defined by itself", "remove the circle")
        found["", "macro", value.name] = binding
        yield from _flat(program, binding.value, found, (*seen, value.name))
    elif isinstance(value, dict):
        for item in (*value.keys(), *value.values()):
            yield from _flat(program, item, found, seen)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _flat(program, item, found, seen)


def _prefixes(scope: str) -> list[str]:
    parts = scope.split("/") if scope else []
    return ["/".join(parts[:n]) for n in range(len(parts) + 1)]


def _import(module: str, start: str) -> Any:
    try:
        importlib.import_module(module)
        return importlib.import_module(start)
    except ImportError as error:
        raise ResolveError(f"can't import {module!r}: {error}", "check the import line") from error


def _split(module: str, rest: list[str]) -> tuple[str, str]:
    """The deepest importable module and the path inside it."""
    for cut in range(len(rest) - 1, 0, -1):
        name = ".".join([module, *rest[:cut]])
        try:
            importlib.import_module(name)
        except ImportError:
            continue
        return name, ".".join(rest[cut:])
    return module, ".".join(rest)


def link(top: Source) -> Program:
    """Decides which binding wins: a file overrides what it includes. Unresolvable ones are left out."""
    program = Program(top)
    for source in _innermost_first(top):
        for binding in source.bindings:
            try:
                key = program.key(binding)
            except ResolveError:
                continue
            program.all.setdefault(key, []).append(binding)
            program.winners[key] = binding
    return program


def _innermost_first(top: Source) -> list[Source]:
    order: list[Source] = []

    def visit(source: Source) -> None:
        for _, included in source.includes:
            visit(included)
        if source not in order:
            order.append(source)

    visit(top)
    return order
