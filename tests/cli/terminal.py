"""A terminal: commands in this process or in one of their own, and a config small enough to train in a blink."""

import contextlib
import dataclasses
import io
import subprocess
import sys

from dyncomp.cli.main import main

CONFIG = """\
# title: A tiny mixture
# family: tests
from __gin__ import dynamic_registration
from dyncomp import experts
from dyncomp import models
from dyncomp import routers
from dyncomp import tasks
from dyncomp import training

include 'layer.gin'

VOCAB = 256
D_MODEL = 8
DEPTH = 2
HEADS = 2
KV_HEADS = 2
HIDDEN = 16
STEPS = 4

training.Suite.runs = {{'top_p': @top_p/training.Run(), 'dense': @dense/training.Run()}}
top_p/models.Block.ffn = @experts.MoE
top_p/experts.MoE.router = @routers.TopP
top_p/training.Run.sweep = {{'p': (0.2, 0.6)}}
dense/training.Run.seed = 1
experts.MoE.num_experts = 4
experts.MoE.hidden = 8

training.Run.model = @models.DecoderLM()
training.Run.task = @tasks.TextFiles()
tasks.TextFiles.path = '{corpus}'
tasks.TextFiles.context = 16
training.Run.optimizer = @training.AdamW()
training.AdamW.learning_rate = 1e-3
training.Run.steps = %STEPS
training.Run.batch_size = 4
training.Run.log_every = 2
training.Run.save_every = 2
training.Run.final_eval_batches = 2
"""
LAYER = """\
from __gin__ import dynamic_registration
from dyncomp import routers

include 'base/decoder_lm.gin'

# Four experts are nearly alike at first, so that some tokens reach this mass with one and others need two.
routers.TopP.p = 0.265
"""
ONE = "--gin.training.Suite.select='top_p'"
"""Trains only the first run of the suite."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a command left in the terminal."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a failure."""
        (line,) = self.err.splitlines()
        assert self.code == 1 and line.startswith("error: "), self
        return line


def cli(*arguments) -> Result:
    """Runs ``dyncomp`` in this process, in a terminal of 80 columns."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as stop:
            code = stop.code
    return Result(code, out.getvalue(), err.getvalue())


def command(*arguments) -> list[str]:
    """The same as a command line."""
    return [sys.executable, "-m", "dyncomp", *map(str, arguments)]


def spawn(*arguments) -> Result:
    """Runs it as a process."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True)
    return Result(done.returncode, done.stdout, done.stderr)
