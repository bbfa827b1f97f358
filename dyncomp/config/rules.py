"""Every reason to refuse a config, each with file, line and fix."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dyncomp.config import hints
from dyncomp.config.errors import Problem
from dyncomp.config.program import Program, ResolveError, link, name_of
from dyncomp.config.source import COMMAND_LINE, Binding, Macro, Ref, Source, references


def problems(top: Source, root: Any) -> list[Problem]:
    """All problems of a parsed config, in the order of files and lines; empty when it is sound.

    Args:
      top: the outermost source, from `dyncomp.config.source`.
      root: the class that the config builds.
    """
    sources = top.closure()
    found = [p for source in sources for p in source.problems]
    program = link(top)
    for source in sources:
        found += _names(program, source)
        found += _order(source)
    found += _duplicates(program)
    if not found:
        found += _types(program, sources)
    if not found:
        found += _reach(program, root)
    order = {source.name: n for n, source in enumerate(sources)}
    return sorted(set(found), key=lambda p: (order.get(p.file, 0), p.line, p.message))


def _at(binding: Binding, message: str, fix: str) -> Problem:
    file, line = binding.place
    return Problem(file=file, line=line, message=message, fix=fix)


def _names(program: Program, source: Source) -> Iterator[Problem]:
    for name, statement in source.imports.items():
        line = statement.location.line_num
        file = source.name
        if name == "gin":
            yield Problem(file=file, line=line, message="'gin' is reserved", fix="use an alias")
        elif source.name != COMMAND_LINE:
            yield from _resolvable(program, source, line, name, importing=True)
    for selector, line in source.blocks:
        yield from _resolvable(program, source, line, selector)
    for binding in source.bindings:
        if binding.macro is None:
            yield from _argument(program, binding)
        for item in references(binding.value):
            yield from _reference(program, binding, item)


def _resolvable(
    program: Program, source: Source, line: int, selector: str, *, importing: bool = False
) -> Iterator[Problem]:
    try:
        program.resolve(source, selector)
    except ResolveError as error:
        if importing and "neither" in str(error):
            return
        yield Problem(file=source.name, line=line, message=str(error), fix=error.fix)


def _argument(program: Program, binding: Binding) -> Iterator[Problem]:
    try:
        target = program.resolve(binding.source, binding.selector)
    except ResolveError as error:
        yield _at(binding, str(error), error.fix)
        return
    if hints.accepts(target, binding.argument):
        return
    known = list(hints.parameters(target))
    close = difflib.get_close_matches(binding.argument, known, n=1)
    fix = f"did you mean {close[0]}?" if close else f"it takes {', '.join(known) or 'nothing'}"
    yield _at(binding, f"{binding.selector} has no parameter {binding.argument!r}", fix)


def _reference(program: Program, binding: Binding, item: Ref | Macro) -> Iterator[Problem]:
    try:
        if isinstance(item, Ref):
            program.target(item)
        else:
            program.macro(item.name)
    except ResolveError as error:
        yield _at(binding, str(error), error.fix)


def _order(source: Source) -> Iterator[Problem]:
    last = max((line for line, _ in source.includes), default=0)
    for binding in source.bindings:
        if binding.line < last:
            message = "a binding stands before an include"
            yield _at(binding, message, "move the includes above all bindings")


def _duplicates(program: Program) -> Iterator[Problem]:
    for bindings in program.all.values():
        for n, later in enumerate(bindings):
            for earlier in bindings[:n]:
                if later.source is earlier.source or earlier.source not in later.source.closure():
                    name = later.macro or f"{later.selector}.{later.argument}"
                    file, line = earlier.place
                    fix = f"remove it, or the one at {Problem(file=file, line=line, message='', fix='').where}"
                    yield _at(later, f"{name} is bound twice", fix)


def _types(program: Program, sources: Iterable[Source]) -> Iterator[Problem]:
    for source in sources:
        for binding in source.bindings:
            if binding.macro is not None:
                continue
            target = program.resolve(binding.source, binding.selector)
            hint = hints.hints(target).get(binding.argument, Any)
            try:
                value = program.expand(binding.value)
            except ResolveError as error:
                yield _at(binding, str(error), error.fix)
                continue
            complaint = mismatch(program, value, hint)
            if complaint:
                name = f"{binding.selector}.{binding.argument}"
                yield _at(binding, f"{name}: {complaint[0]}", complaint[1])


def mismatch(program: Program, value: Any, hint: Any) -> tuple[str, str] | None:
    """Why a value (macros expanded) does not fit an annotation, as (message, fix); None when it does."""
    if isinstance(value, Ref):
        return _mismatch_ref(program, value, hint)
    if not (isinstance(value, dict | list | tuple) and value):
        complaint = hints.mismatch_literal(value, hint)
        return (complaint, f"write {hints.describe(hint)}") if complaint else None
    complaints = [_mismatch_container(program, value, option) for option in hints.options(hint)]
    return None if None in complaints else complaints[0]


def _mismatch_ref(program: Program, ref: Ref, hint: Any) -> tuple[str, str] | None:
    target, name = program.target(ref), str(ref)
    if ref.evaluate:
        if not hints.mismatch_instance(target, hint):
            return None
        if hints.wants_callable(hint):
            return f"{name} is an instance, a factory is wanted", f"write {name[:-2]}, not {name}"
        return f"{name} is no {hints.describe(hint)}", f"refer to a {hints.describe(hint)}"
    if not hints.mismatch_factory(target, hint):
        return None
    if not hints.mismatch_instance(target, hint):
        return f"{name} is a factory, an instance is wanted", f"write {name}(), not {name}"
    return f"{name} is no {hints.describe(hint)}", f"refer to a {hints.describe(hint)}"


def _mismatch_container(program: Program, value: Any, hint: Any) -> tuple[str, str] | None:
    kind, inner = hints.container(hint)
    if kind is not Any and not (isinstance(kind, type) and isinstance(value, kind)):
        return (
            f"a {type(value).__name__} is no {hints.describe(hint)}",
            f"write {hints.describe(hint)}",
        )
    wanted = hints.arity(kind, inner)
    if wanted not in (None, len(value)):
        message = f"{len(value)} elements are no {hints.describe(hint)}"
        return message, f"write {wanted} elements"
    if isinstance(value, Mapping):
        keys, values = inner if len(inner) == 2 else (Any, Any)
        pairs = [(k, keys) for k in value] + [(v, values) for v in value.values()]
    else:
        pairs = list(zip(value, hints.elements(inner, len(value)), strict=True))
    complaints = (mismatch(program, item, item_hint) for item, item_hint in pairs)
    return next((c for c in complaints if c), None)


def _reach(program: Program, root: Any) -> Iterator[Problem]:
    try:
        reached, visits = program.reached(root), program.visits(root)
    except ResolveError as error:
        yield Problem(file=program.top.name, line=1, message=str(error), fix=error.fix)
        return
    tops = [program.top]
    if program.top.name == COMMAND_LINE:
        tops += [included for _, included in program.top.includes]
    for key, bindings in program.all.items():
        for binding in bindings:
            if key not in reached and binding.source in tops:
                name = binding.macro or f"{binding.selector}.{binding.argument}"
                fix = f"remove it, or refer to it from {name_of(root)}"
                yield _at(binding, f"{name} is bound but nothing uses it", fix)
    yield from _scopes(program, reached, visits)
    yield from _missing(program, root, visits)


def _scopes(
    program: Program, reached: Mapping[Any, Binding], visits: list[tuple[Any, str]]
) -> Iterator[Problem]:
    """References into a scope in which nothing is bound: most likely a misspelt one."""
    known = sorted({scope for scope, _, _ in reached})
    for target, scope in visits:
        for _, binding in program.bound(target, scope).values():
            for ref in program.flat(binding.value):
                if ref.scope and ref.scope not in known:
                    close = difflib.get_close_matches(ref.scope, known, n=1)
                    fix = (
                        f"did you mean {close[0]}?" if close else "bind something, or leave it out"
                    )
                    yield _at(binding, f"{ref}: nothing is bound in scope {ref.scope!r}", fix)


def _missing(program: Program, root: Any, visits: list[tuple[Any, str]]) -> Iterator[Problem]:
    """Arguments without a default that nothing binds, for what the config itself calls."""
    called = {(id(root), ""): (program.top.name, 1)}
    for target, scope in visits:
        for _, binding in program.bound(target, scope).values():
            for ref in program.flat(binding.value):
                if ref.evaluate:
                    called[id(program.target(ref)), ref.scope or scope] = binding.place
    for target, scope in visits:
        if (id(target), scope) not in called:
            continue
        file, line = called[id(target), scope]
        for name in hints.required(target):
            if name not in program.bound(target, scope):
                where = f"{scope}/{name_of(target)}" if scope else name_of(target)
                message, fix = f"{where}.{name} has no value", f"bind {where}.{name} = VALUE"
                yield Problem(file=file, line=line, message=message, fix=fix)
