"""``dyncomp``: parses the command line, runs one command, turns known errors into one line."""

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import dyncomp
from dyncomp.cli.output import split_overrides
from dyncomp.core.errors import DyncompError, Preempted
from dyncomp.core.heap import keep_freed_memory

COMMANDS = (
    "list_systems",
    "config_text",
    "run",
    "evaluate",
    "generate",
    "train_exits",
    "reproduce",
    "sweep",
    "launch",
    "bench",
    "compile_run",
    "report",
)


def parser() -> argparse.ArgumentParser:
    """The whole grammar of the command line, without the ``--gin.NAME=VALUE`` overrides."""
    top = argparse.ArgumentParser(
        prog="dyncomp",
        description="Networks that decide, input by input, what to compute.",
        epilog="Values of a config are overridden anywhere by --gin.NAME=VALUE. "
        "Example: dyncomp run quickstart --gin.STEPS=100",
    )
    top.add_argument("--version", action="version", version=f"dyncomp {dyncomp.__version__}")
    top.add_argument("--debug", action="store_true", help="show the stack trace of an error")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"dyncomp.cli.{name}").add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: arguments without the program's name; default, the process's.

    Returns:
      Exit code: 0 success, 1 an error told in one line, 2 wrong usage, 75 stopped by a signal after saving.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    rest, overrides = split_overrides(words)
    debug = "--debug" in rest
    args = parser().parse_args([a for a in rest if a != "--debug"])
    args.overrides, args.words = overrides, words
    quiet_tpu_compiler()
    if argv is None:  # a process of its own
        keep_freed_memory()
    try:
        return args.function(args) or 0
    except Preempted as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (DyncompError, OSError) as error:
        if debug:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130


def quiet_tpu_compiler() -> None:
    """Names the CPU where the TPU compiler is installed but no accelerator is: libtpu would look for a TPU, loudly."""
    devices = (*Path("/dev").glob("accel*"), Path("/dev/vfio"), Path("/dev/nvidiactl"))
    if importlib.util.find_spec("libtpu") and not any(device.exists() for device in devices):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def one_line(error: Exception) -> str:
    """The message of an error as one line; an operating system's error names its file."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
