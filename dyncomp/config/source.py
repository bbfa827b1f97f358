"""Reads config files into statements with their places; nothing is imported or evaluated here.

The grammar is gin's, parsed by gin's own parser. Evaluation (`dyncomp.config.build`) is ours: gin keeps bindings in
a process-wide table that factories look up when they are called, so two configs in one process would mix.
"""

import dataclasses
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gin import config_parser

from dyncomp.config.catalog import shipped
from dyncomp.config.errors import Problem

COMMAND_LINE = "command line"
TEXT = "text"
GIN = "__gin__.dynamic_registration"


@dataclasses.dataclass(frozen=True)
class Ref:
    """``@scope/selector`` or, evaluated, ``@scope/selector()``; names are those of ``source``."""

    scope: str
    selector: str
    evaluate: bool
    source: "Source" = dataclasses.field(repr=False, compare=False)

    def __str__(self) -> str:
        scope = f"{self.scope}/" if self.scope else ""
        return f"@{scope}{self.selector}{'()' if self.evaluate else ''}"


@dataclasses.dataclass(frozen=True)
class Macro:
    """``%name``."""

    name: str

    def __str__(self) -> str:
        return f"%{self.name}"


@dataclasses.dataclass(frozen=True, eq=False)
class _Key:
    """The key of a dict as parsed: unlike any other, so that gin's parser does not drop one that stands twice."""

    value: Any


class _Parser(config_parser.ConfigParser):
    """gin's parser, which keeps every pair of a dict."""

    def _parse_dict_item(self) -> tuple[_Key, Any]:
        key, value = super()._parse_dict_item()
        return _Key(key), value


@dataclasses.dataclass(frozen=True)
class Binding:
    """``scope/selector.argument = value``; a macro's definition has no argument."""

    scope: str
    selector: str
    argument: str
    value: Any
    source: "Source" = dataclasses.field(repr=False)
    line: int

    @property
    def place(self) -> tuple[str, int]:
        """File and line."""
        return self.source.name, self.line

    @property
    def macro(self) -> str | None:
        """The macro's full name when this defines one."""
        if self.argument:
            return None
        return f"{self.scope}/{self.selector}" if self.scope else self.selector


@dataclasses.dataclass(eq=False)
class Source:
    """One file (or the command line) as parsed.

    Attributes:
      name: path, or ``command line``, or ``text``.
      imports: names the file's imports bind, with the statement.
      bindings: in order.
      includes: line and file of each include.
      problems: what stopped the parser.
      registers: whether it says ``from __gin__ import dynamic_registration``, as gin wants it.
    """

    name: str
    imports: dict[str, config_parser.ImportStatement] = dataclasses.field(default_factory=dict)
    bindings: list[Binding] = dataclasses.field(default_factory=list)
    blocks: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    includes: list[tuple[int, "Source"]] = dataclasses.field(default_factory=list)
    problems: list[Problem] = dataclasses.field(default_factory=list)
    registers: bool = False

    def problem(self, line: int, message: str, fix: str) -> None:
        """Notes a problem of this file."""
        self.problems.append(Problem(file=self.name, line=line, message=message, fix=fix))

    def closure(self) -> list["Source"]:
        """This file and all it includes, each once."""
        seen: list[Source] = []

        def visit(source: Source) -> None:
            if source not in seen:
                seen.append(source)
                for _, included in source.includes:
                    visit(included)

        visit(self)
        return seen


class _Delegate(config_parser.ParserDelegate):
    """Keeps references and macros as they are written."""

    def __init__(self, source: Source):
        self.source = source

    # pyrefly: ignore[bad-override]
    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Ref:
        """Called for every ``@name``."""
        scope, _, selector = scoped_configurable_name.rpartition("/")
        return Ref(scope, selector, evaluate, self.source)

    # pyrefly: ignore[bad-override]
    def macro(self, macro_name: str) -> Macro:
        """Called for every ``%name``."""
        return Macro(macro_name)


def read(path: Path) -> Source:
    """Reads a config file and all that it includes."""
    return _Reader().file(path)


def read_text(text: str, name: str = TEXT) -> Source:
    """Reads a config given as a string; includes are looked up among the shipped configs and here."""
    return _Reader().text(text, name, Path.cwd())


def on_command_line(top: Source, overrides: list[str]) -> Source:
    """A source that includes ``top`` and binds each ``NAME=VALUE`` of ``overrides`` after it.

    It knows every name that ``top`` and its includes import.
    """
    line = Source(COMMAND_LINE, includes=[(0, top)])
    for source in reversed(top.closure()):
        line.imports.update(source.imports)
    for number, override in enumerate(overrides, start=1):
        if "=" not in override:
            line.problem(number, f"override {override!r} has no '='", "write --gin.NAME=VALUE")
            continue
        key, value = override.split("=", 1)
        parsed = read_text(f"{key.strip()} = {value.strip()}\n", COMMAND_LINE)
        for found in parsed.problems:
            fix = "text values need quotes, as in --gin.NAME=\"'value'\""
            line.problem(number, f"override {override!r}: {found.message}", fix)
        for binding in parsed.bindings:
            moved = _rebase(binding.value, line)
            line.bindings.append(
                dataclasses.replace(binding, source=line, line=number, value=moved)
            )
    return line


def references(value: Any) -> Iterator[Ref | Macro]:
    """Every reference and macro inside a value."""
    if isinstance(value, Ref | Macro):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from references(key)
            yield from references(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from references(item)


def _dicts(value: Any, source: Source, line: int) -> Any:
    """A parsed value with plain keys; a key that stands twice is a problem of the source."""
    if isinstance(value, list | tuple):
        return type(value)(_dicts(item, source, line) for item in value)
    if not isinstance(value, dict):
        return value
    found: dict[Any, Any] = {}
    for key, item in value.items():
        if key.value in found:
            source.problem(line, f"key {key.value!r} stands twice", "remove one of the two")
        found[key.value] = _dicts(item, source, line)
    return found


def _rebase(value: Any, source: Source) -> Any:
    if isinstance(value, Ref):
        return dataclasses.replace(value, source=source)
    if isinstance(value, dict):
        return {_rebase(k, source): _rebase(v, source) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_rebase(item, source) for item in value)
    return value


class _Reader:
    """Reads each file once, however often it is included."""

    def __init__(self):
        self.read: dict[Path, Source] = {}
        self.open: list[Path] = []

    def file(self, path: Path) -> Source:
        path = path.resolve()
        if path not in self.read:
            self.read[path] = source = Source(str(path))
            self.open.append(path)
            self._parse(source, path.read_text(), path.parent)
            self.open.pop()
        return self.read[path]

    def text(self, text: str, name: str, folder: Path) -> Source:
        source = Source(name)
        self._parse(source, text, folder)
        return source

    def _parse(self, source: Source, text: str, folder: Path) -> None:
        line = 1
        try:
            for statement in _Parser(text, _Delegate(source)):
                line = statement.location.line_num
                self._statement(source, statement, line, folder)
        except SyntaxError as error:
            reason = str(error.msg).splitlines()[0].strip()
            source.problem(error.lineno or line, f"syntax error: {reason}", "write NAME = VALUE")
        except tokenize.TokenError as error:
            reason, (line, _) = error.args
            source.problem(line, f"syntax error up to here: {reason}", "close what was opened")
        except (ValueError, TypeError) as error:
            reason = str(error).splitlines()[0]
            source.problem(line, f"syntax error below this line: {reason}", "write NAME = VALUE")

    def _statement(self, source: Source, statement: Any, line: int, folder: Path) -> None:
        match statement:
            case config_parser.BindingStatement(scope, selector, argument, value):
                value = _dicts(value, source, line)
                source.bindings.append(Binding(scope, selector, argument, value, source, line))
            case config_parser.BlockDeclaration():
                source.blocks.append((statement.selector, line))
            case config_parser.ImportStatement():
                self._import(source, statement, line)
            case config_parser.IncludeStatement(filename):
                self._include(source, filename, line, folder)

    def _import(self, source: Source, statement: Any, line: int) -> None:
        name = statement.bound_name()
        if statement.module.startswith("__gin__."):
            if statement.module != GIN:
                message = f"gin has no feature {name!r}"
                source.problem(line, message, f"write from __gin__ import {GIN.split('.')[1]}")
            elif source.registers:
                source.problem(line, f"{name!r} is imported twice", "remove one import")
            source.registers = True
        elif name in source.imports:
            source.problem(line, f"{name!r} is imported twice", "remove one import")
        else:
            source.imports[name] = statement

    def _include(self, source: Source, filename: str, line: int, folder: Path) -> None:
        for base in (folder, shipped()):
            path = (base / filename).resolve()
            if path in self.open:
                source.problem(line, f"{filename!r} includes itself", "remove one of the includes")
                return
            if path.is_file():
                if str(path) in (included.name for _, included in source.includes):
                    source.problem(line, f"{filename!r} is included twice", "remove one include")
                    return
                source.includes.append((line, self.file(path)))
                return
        fix = "paths are relative to this file or to configs/"
        source.problem(line, f"included file {filename!r} does not exist", fix)
