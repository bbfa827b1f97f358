"""What only building a config shows: values that an object refuses, parts that do not fit together."""

from collections.abc import Callable, Iterator
from typing import Any

from dyncomp.config.build import build
from dyncomp.config.errors import Problem
from dyncomp.config.program import Program, name_of
from dyncomp.core.errors import DyncompError

FIX = "correct what is bound for it"


def problems(program: Program, root: Callable[..., Any]) -> list[Problem]:
    """Problems of building ``root`` and of tracing its runs; the config has passed the rules."""
    try:
        built = build(program, root)
    except DyncompError as error:
        return [_problem(program, root, str(error))]
    return [_problem(program, root, message) for message in _complaints(built)]


def _complaints(built: Any) -> Iterator[str]:
    from dyncomp.training.program import try_out
    from dyncomp.training.run import Run
    from dyncomp.training.suite import Suite

    runs = built.runs if isinstance(built, Suite) else {"": built} if isinstance(built, Run) else {}
    for name, run in runs.items():
        try:
            run.task.spec()
        except DyncompError:
            continue  # the data that tell the shapes are not on this machine
        try:
            try_out(run)
        except DyncompError as error:
            yield f"{name}: {error}" if name else str(error)


def _problem(program: Program, root: Callable[..., Any], message: str) -> Problem:
    """The message at the place of the root's first binding."""
    places = [binding.place for _, binding in program.bound(root, "").values()]
    file, line = places[0] if places else (program.top.name, 1)
    return Problem(file=file, line=line, message=f"{name_of(root)}: {message}", fix=FIX)
