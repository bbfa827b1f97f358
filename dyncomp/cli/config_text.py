"""``dyncomp config show`` and ``dyncomp config check``."""

import argparse
import dataclasses
import sys
from typing import Any

from dyncomp.cli.output import command, json_flag, print_json, table


def add(commands: Any) -> None:
    """Adds both commands."""
    about = "Show a resolved config, or check one."
    parent = command(commands, "config", _show, about, "dyncomp config check quickstart")
    actions = parent.add_subparsers(dest="action", metavar="ACTION", required=True)
    about = "Print every value a config uses and which bindings were overridden."
    example = "dyncomp config show quickstart --gin.STEPS=10"
    _arguments(command(actions, "show", _show, about, example), "?")
    about = (
        "List every problem of configs, with file, line and fix; exit code 1 when there are any."
    )
    _arguments(command(actions, "check", _check, about, "dyncomp config check quickstart"), "*")


def _arguments(parser: argparse.ArgumentParser, count: str) -> None:
    if count == "?":
        parser.add_argument("config", help="a shipped name or a path")
    else:
        parser.add_argument(
            "configs", nargs="*", help="shipped names or paths (default: all shipped)"
        )
    json_flag(parser)


def _show(args: argparse.Namespace) -> None:
    from dyncomp import config

    shown = config.show(args.config, args.overrides)
    if args.json:
        overrides = [dataclasses.asdict(o) for o in shown.overrides]
        print_json({"config": shown.text, "overrides": overrides})
        return
    print(shown.text)
    if shown.overrides:
        rows = [(o.name, o.value, o.place, o.replaced, o.replaced_place) for o in shown.overrides]
        table("Overridden", ("name", "value", "at", "instead of", "at"), rows)


def _check(args: argparse.Namespace) -> int:
    from dyncomp import config

    found = {c: config.check(c, args.overrides) for c in args.configs or config.slugs()}
    if args.json:
        print_json({c: [dataclasses.asdict(p) for p in ps] for c, ps in found.items()})
    for name, problems in found.items() if not args.json else ():
        if not problems:
            print(f"{name}: ok")
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
    return int(any(found.values()))
