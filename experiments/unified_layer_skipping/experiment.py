"""Unified layer skipping (arXiv 2404.06954) on a twelve-layer byte-level language model of Python source.

One network a seed. Every keep set is evaluated on it as it is, then tuned for as many steps from the same weights.
Quality is cross-entropy of the response, the last 65 targets of each validation window; nothing was tuned on it.
"""

import functools
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dyncomp import config
from dyncomp.decoding import FullDepth, Generator, KeepLayers
from dyncomp.evidence.seed import load_module
from dyncomp.models import apply
from dyncomp.tasks.loader import sequential
from dyncomp.tasks.objectives import at_answers, token_nll
from dyncomp.training import Run
from dyncomp.training.evaluate import Evaluator
from dyncomp.training.loop import train
from dyncomp.training.restore import load

SLUG = "unified_layer_skipping"
TITLE = "Unified layer skipping: the same few layers for every generated token"
COMPUTE = "blocks"
RULES = ("even", "pruned", "bottom", "top", "random")
SKIPPED = [*(f"{rule}_{s}" for s in (2, 3) for rule in RULES), "even_6"]
DECODED = ("full", "even_2", "even_3", "even_6")
ARMS = ["base", "full", *SKIPPED, *(f"untuned_{arm}" for arm in SKIPPED)]
TRIALS = dict.fromkeys(ARMS, 1)  # nothing was tuned, on either side
METRICS = {
    "nats": {"text": "validation cross-entropy of the response, nats per byte", "minimize": True},
    "blocks": {"text": "blocks that a response token runs, of 12", "minimize": True},
    "closed": {"text": "share of the gap to full depth, equally tuned, that tuning closes"},
    "flops": {"text": "needed FLOPs of a decode step over full depth's, head included"},
    "step_ms": {"text": "milliseconds a decode step, batch 1, one thread"},
    "step_ms_8": {"text": "milliseconds a decode step, batch 8, one thread"},
}
BATCHES, PROMPT, NEW, REPEATS = 30, 64, 48, 7
SHORT = ["DEPTH=4", "D_MODEL=16", "HIDDEN=24", "BATCH=4", "PREFIX=8", "tasks.CodeLM.context=16"]
QUICK = [*SHORT, "STEPS=3", "TUNE_STEPS=2"]


class Seed:
    """Trains and evaluates all arms of one seed."""

    def __init__(self, seed: int, quick: bool, workdir: Path):
        self.quick, self.workdir = quick, workdir
        suite = config.load(SLUG, QUICK if quick else [])
        change = {"seed": seed, "capture": False, "final_eval_batches": 1}
        self.runs = {name: run.replace(**change) for name, run in suite.runs.items()}
        for name in ("random_2", "random_3"):
            run = self.runs[name]
            self.runs[name] = run.replace(model=run.model.clone(seed=seed))
        if quick:  # one arm stands for all
            same = {name: self.runs["even_2"] for name in self.runs if name not in ("base", "full")}
            self.runs |= same
        self.programs: dict[int, Evaluator] = {}
        self.known: dict[int, Any] = {}
        self.base = self.trained("base")

    @property
    def batches(self) -> int:
        """Validation batches."""
        return 1 if self.quick else BATCHES

    def trained(self, name: str) -> Any:
        """Variables of a run after training."""
        run, folder = self.runs[name], self.workdir / name
        if id(run) not in self.known:
            train(run, folder, progress=False)
            self.known[id(run)] = load(folder, run).variables
        return self.known[id(run)]

    def nats(self, name: str, variables: Any) -> float:
        """Loss of the response under an arm's layers."""
        run = self.runs[name]
        evaluator = self.programs.setdefault(id(run), Evaluator(run))
        return evaluator(variables, "validation", self.batches)["quality"]["nll"]

    def blocks(self, name: str) -> int:
        """Blocks that a response token runs."""
        return len(self.runs[name].model.kept_layers())


def quality(seed: Seed) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Loss of all arms before and after tuning, and the tuned variables of arms that are decoded."""
    full = seed.trained("full")
    depth, kept = seed.blocks("full"), {"full": full}
    found = {
        "base": {"nats": seed.nats("full", seed.base), "blocks": depth},
        "full": {"nats": seed.nats("full", full), "blocks": depth},
    }
    for name in SKIPPED:
        variables, blocks = seed.trained(name), seed.blocks(name)
        before, after = seed.nats(name, seed.base), seed.nats(name, variables)
        gaps = before - found["base"]["nats"], after - found["full"]["nats"]
        found[f"untuned_{name}"] = {"nats": before, "blocks": blocks}
        found[name] = {"nats": after, "blocks": blocks, "closed": 1 - gaps[1] / gaps[0]}
        kept |= {name: variables} if name in DECODED else {}
    return found, kept


def prompts_of(run: Run, count: int, length: int) -> list[list[int]]:
    """Beginnings of validation windows."""
    rows = next(sequential(run.task.source("validation"), count, 1))["inputs"]
    return [row[:length].tolist() for row in rows]


def decoding(seed: Seed, kept: dict[str, Any]) -> dict[str, dict[str, float]]:
    """FLOPs and time of decode steps, by the decode loop."""
    length, new = (8, 4) if seed.quick else (PROMPT, NEW)
    prompts = prompts_of(seed.runs["base"], 8, length)
    generators, found = {}, {}
    for name, variables in kept.items():
        model = seed.runs[name].model
        layers = model.kept_layers()
        policy = FullDepth() if name == "full" else KeepLayers(layers)
        generators[name] = one = Generator(model.template(), variables, policy)
        each = []
        for prompt in prompts:
            one.generate([prompt], new)
            each.append(one.ledger.total("needed"))
        wanted = step_flops(model, len(layers), length, new)
        errors = [abs(flops - wanted) for flops in each]
        found[name] = {"flops": each[0], "flops_error": max(errors)}
    for batch, metric in ((1, "step_ms"), (8, "step_ms_8")):
        for name, value in times(generators, prompts[:batch], new, seed.quick).items():
            found[name][metric] = value
    whole = found["full"]["flops"]
    return {name: {**one, "flops": one["flops"] / whole} for name, one in found.items()}


def step_flops(model: Any, layers: int, prompt: int, new: int) -> int:
    """By hand: all steps after the first token, which the prompt's pass gives; step i looks at prompt + i + 1 slots."""
    net = model.template()
    block = net.groups[0].blocks[0](parent=None)
    d, hidden = net.d_model, block.ffn(parent=None).hidden
    weights = layers * (4 * d * d + 3 * d * hidden) + d * net.vocab_size
    seen = sum(prompt + step + 1 for step in range(new - 1))
    return 2 * weights * (new - 1) + layers * 4 * d * seen


def times(
    generators: dict[str, Generator], prompts: list[list[int]], new: int, quick: bool
) -> dict[str, float]:
    """Median milliseconds a step; the arms take turns. The prompt's pass is left out by a run of one token."""
    spent: dict[str, list[float]] = {name: [] for name in generators}
    for turn in range(2 if quick else REPEATS):
        for name, one in generators.items():
            seconds = []
            for count in (1, new):
                start = time.perf_counter()
                one.generate(prompts, count, capacity=256)
                seconds.append(time.perf_counter() - start)
            if turn:  # the first compiles
                spent[name].append(1e3 * (seconds[1] - seconds[0]) / (new - 1))
    return {name: float(np.median(values)) for name, values in spent.items()}


def first_change(seed: Seed) -> float:
    """Largest difference that a keep set makes to the first response token's logits."""
    run = seed.runs["base"]
    batch = next(sequential(run.task.source("validation"), run.batch_size, 1))
    call = lambda model: jax.jit(functools.partial(apply, model))(seed.base, batch["inputs"])[0]
    names = ("even_2", "even_3", "bottom_3")
    first = [np.asarray(call(seed.runs[name].model)[:, 0]) for name in names]
    return float(max(np.abs(other - first[0]).max() for other in first[1:]))


def look(seed: Seed, kept: dict[str, Any]) -> dict[str, Any]:
    """A piece of validation text: blocks that each byte runs, and what a third of the blocks costs it."""
    model, run = seed.runs["even_3"].model, seed.runs["base"]
    batch = next(sequential(run.task.source("validation"), 6, 1))

    @functools.partial(jax.jit, static_argnums=0)
    def call(model: Any, variables: Any) -> Any:
        logits, aux = apply(model, variables, batch["inputs"], capture=("plan",))
        return token_nll(logits, at_answers(batch, logits)["targets"]), aux.plans["depth"]

    own, depth = call(model, kept["even_3"])
    full, _ = call(seed.runs["full"].model, kept["full"])
    # The loss at a position belongs to the next byte; the prompt's bytes have none.
    cost = np.zeros(batch["inputs"].shape)
    cost[:, 1 - own.shape[1] :] = np.asarray(own - full)[:, :-1]
    rows = np.broadcast_to(depth, batch["inputs"].shape)
    return {"text": batch["inputs"].ravel().tolist(), "depth": rows.ravel().tolist(),
            "cost": cost.ravel().round(4).tolist(), "window": batch["inputs"].shape[1]}  # fmt: skip


def run_seed(seed: int, quick: bool, workdir: Path) -> dict[str, Any]:
    """All arms of one seed: arm -> metric -> value; ``_figures`` holds what the pictures show."""
    made = Seed(seed, quick, workdir)
    found, kept = quality(made)
    for name, figures in decoding(made, kept).items():
        found[name] |= figures
    found["even_2"]["first_change"] = first_change(made)
    return {**found, "_figures": look(made, kept)}


def figures(results: dict[str, Any], outdir: Path) -> None:
    """Writes the pictures of the page; drawing is in ``pictures.py``."""
    load_module(Path(__file__).with_name("pictures.py")).draw(results, outdir)
