"""A config as one flat text that builds the same object, and the list of what was overridden."""

import dataclasses
import inspect
from typing import Any

from dyncomp.config import hints
from dyncomp.config.errors import shorten
from dyncomp.config.program import Key, Program, Symbol
from dyncomp.config.source import Binding, Ref


@dataclasses.dataclass(frozen=True, kw_only=True)
class Override:
    """A binding that replaced another.

    Attributes:
      name: what is bound.
      value, place: what holds, and ``file:line`` of it.
      replaced, replaced_place: what it replaced.
    """

    name: str
    value: str
    place: str
    replaced: str
    replaced_place: str


def overrides(program: Program) -> list[Override]:
    """Every binding that another file or the command line replaced."""
    found = []
    for bindings in program.all.values():
        for earlier, later in zip(bindings, bindings[1:], strict=False):
            name = later.macro or f"{later.selector}.{later.argument}"
            values = str(plain(later.value)), str(plain(earlier.value))
            places = _place(later), _place(earlier)
            found.append(
                Override(
                    name=f"{later.scope}/{name}" if later.scope and later.argument else name,
                    value=values[0],
                    place=places[0],
                    replaced=values[1],
                    replaced_place=places[1],
                )
            )
    return sorted(found, key=lambda o: o.name)


def flatten(program: Program, root: Any) -> str:
    """The operative config: imports, every binding that building ``root`` uses, defaults as comments.

    Macros are written out. Reading the text back builds an equal object.
    """
    reached = {k: b for k, b in program.reached(root).items() if k[1] != "macro"}
    writer = _Writer(program)
    groups: dict[tuple[str, int], list[str]] = {}
    for key, binding in reached.items():
        groups.setdefault((key[0], key[1]), []).append(writer.binding(key, binding))
    blocks = {}
    for (scope, target_id), lines in groups.items():
        name = writer.name(scope, program.symbols[target_id])
        comments = [f"# {name}.{d}" for d in _defaults(program, target_id, scope)]
        blocks[name] = "\n".join(sorted(lines) + comments)
    body = [blocks[name] for name in sorted(blocks)]
    head = ["from __gin__ import dynamic_registration", *writer.imports()]
    return "\n".join(head) + "\n\n" + "\n\n".join(body) + "\n"


def plain(value: Any) -> Any:
    """A value whose ``repr`` is config syntax: references print as they are written."""
    if isinstance(value, dict):
        return {plain(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    return value if isinstance(value, str | int | float | bool | type(None)) else _Raw(str(value))


class _Raw(str):
    """Text that prints without quotes."""

    def __repr__(self) -> str:
        return str(self)


class _Writer:
    """Names objects by imports that do not collide."""

    def __init__(self, program: Program):
        self.program = program
        self.aliases: dict[str, str] = {}

    def name(self, scope: str, symbol: Symbol) -> str:
        alias = self._alias(symbol.module)
        return f"{scope}/{alias}.{symbol.path}" if scope else f"{alias}.{symbol.path}"

    def binding(self, key: Key, binding: Binding) -> str:
        name = self.name(key[0], self.program.symbols[key[1]])
        return f"{name}.{key[2]} = {self._value(self.program.expand(binding.value))!r}"

    def imports(self) -> list[str]:
        lines = []
        for module, alias in sorted(self.aliases.items()):
            parent, _, last = module.rpartition(".")
            suffix = "" if alias == last else f" as {alias}"
            lines.append(
                f"from {parent} import {last}{suffix}" if parent else f"import {last}{suffix}"
            )
        return lines

    def _alias(self, module: str) -> str:
        if module not in self.aliases:
            base = alias = module.rpartition(".")[2]
            count = 2
            while alias in self.aliases.values() or alias == "gin":
                alias, count = f"{base}_{count}", count + 1
            self.aliases[module] = alias
        return self.aliases[module]

    def _value(self, value: Any) -> Any:
        if isinstance(value, Ref):
            symbol = self.program.symbols[id(self.program.target(value))]
            return _Raw(f"@{self.name(value.scope, symbol)}{'()' if value.evaluate else ''}")
        if isinstance(value, dict):
            return {self._value(k): self._value(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._value(item) for item in value)
        return value


def _defaults(program: Program, target_id: Any, scope: str) -> list[str]:
    target = program.symbols[target_id].target
    bound = program.bound(target, scope)
    return [
        f"{name} = {p.default!r} (default)"
        for name, p in hints.parameters(target).items()
        if name not in bound
        and p.default is not inspect.Parameter.empty
        and isinstance(p.default, str | int | float | bool | tuple | type(None))
    ]


def _place(binding: Binding) -> str:
    file, line = binding.place
    return f"{shorten(file)}:{line}"
