"""Entropy adaptive decoding (arXiv 2502.06833) on byte-level models: its choices against random ones, on given text.

Two networks a seed, one forward pass each over the same held-out windows of 256 bytes; every arm is a choice between
their predictions. Thresholds are set on calibration windows, everything is reported on validation windows. The last
arms write: the decode drivers themselves, greedily after the same prompts, switching against speculative decoding.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp import config
from dyncomp.decoding import (
    EntropySwitch,
    OtherModel,
    PeriodicSwitch,
    SpeculativeGenerator,
    SwitchingGenerator,
    choose_on_text,
    entropy_bits,
    parameter_share,
    run_lengths,
    shuffled_runs,
    switches,
    tokens_read,
)
from dyncomp.evidence.seed import load_module
from dyncomp.models import apply
from dyncomp.tasks.loader import sequential
from dyncomp.tasks.objectives import token_nll
from dyncomp.training.loop import train
from dyncomp.training.restore import load

SLUG = "entropy_adaptive_decoding"
TITLE = "Entropy adaptive decoding: a small or a large model for every token"
COMPUTE = "large_share"
SHARES = {"75": 0.75, "62": 0.62, "50": 0.5, "25": 0.25}
VARIANTS = {"window1": (1, 10), "window16": (16, 10), "dwell1": (5, 1)}
TAUS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
ARMS = [
    "small", "large",
    *(f"{kind}_{share}" for share in SHARES for kind in ("entropy", "random", "periodic", "oracle")),
    *(f"{variant}_62" for variant in VARIANTS), *(f"{variant}_random_62" for variant in VARIANTS),
    *(f"tau_{int(10 * tau)}" for tau in TAUS),
    *(f"written_{share}" for share in SHARES), "speculative", "speculative_fixed",
]  # fmt: skip
TRIALS = dict.fromkeys(ARMS, 1)  # a threshold is set to a share of the large model, not to quality
METRICS = {
    "nats": {"text": "validation cross-entropy of who runs, nats per byte", "minimize": True},
    "large_share": {"text": "passes of the large model a written byte", "minimize": True},
    "cost": {"text": "parameters times steps, relative to the large model (no catch-up)"},
    "flops": {"text": "tokens read times parameters, relative to the large model (catch-up, refused drafts included)"},
    "switches": {"text": "changes of model in a window"},
    "corr_gap": {"text": "correlation of the small model's entropy with the gap in loss"},
    "corr_loss": {"text": "correlation of the small model's entropy with its own loss"},
    "same": {"text": "share of written bytes until the first that the large model alone writes otherwise"},
    "differs": {"text": "one minus that", "minimize": True},
}  # fmt: skip
BATCHES, CALIBRATION, DRAWS = 40, 20, 20
PROMPTS, PROMPT, WRITTEN = 16, 32, 64
QUICK = ["STEPS=4", "BATCH=2", "CONTEXT=48"]
SCAN = np.linspace(0.0, 8.0, 161, dtype=np.float32)


class Pair:
    """The trained networks of one seed and what they say about given text."""

    def __init__(self, seed: int, quick: bool, workdir: Path):
        suite = config.load(SLUG, QUICK if quick else [])
        change = {"seed": seed, "capture": False, "final_eval_batches": 1, "eval_every": 0}
        self.runs = {name: suite.runs[name].replace(**change) for name in ("small", "large")}
        self.variables = {}
        for name, run in self.runs.items():
            train(run, workdir / name, progress=False)
            self.variables[name] = load(workdir / name, run).variables

    def read(self, split: str, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Loss and entropy [2 s t] of the small and the large model, and the inputs [s t]."""
        batches = list(
            sequential(self.runs["small"].task.source(split), self.runs["small"].batch_size, count)
        )
        found = []
        for name, run in self.runs.items():

            @jax.jit
            def call(variables, batch, model=run.model):
                logits, _ = apply(model, variables, batch["inputs"])
                return token_nll(logits, batch["targets"]), entropy_bits(logits)

            parts = [jax.device_get(call(self.variables[name], batch)) for batch in batches]
            found.append([np.concatenate(part) for part in zip(*parts, strict=True)])
        loss, entropy = (np.stack(part) for part in zip(*found, strict=True))
        return loss, entropy, np.concatenate([batch["inputs"] for batch in batches])

    def sizes(self) -> tuple[int, int]:
        """Parameters of the small and the large model."""
        count = lambda name: sum(x.size for x in jax.tree.leaves(self.variables[name]["params"]))
        return count("small"), count("large")


def traces(switch: Any, entropy: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Choices [c s t] at each threshold."""
    small, large = jnp.asarray(entropy)
    call = jax.jit(lambda t: choose_on_text(switch, small, large, t))
    return np.stack([jax.device_get(call(jnp.float32(t))) for t in thresholds])


def threshold_for(switch: Any, entropy: np.ndarray, share: float) -> float:
    """Of a grid, the threshold whose share of the large model is nearest, on calibration windows."""
    found = traces(switch, entropy, SCAN).mean(axis=(1, 2))
    return float(SCAN[int(np.argmin(np.abs(found - share)))])


class Judge:
    """Figures of a trace of choices on the validation windows."""

    def __init__(self, loss: np.ndarray, sizes: tuple[int, int]):
        self.loss, self.sizes = loss, sizes

    def __call__(self, models: np.ndarray) -> dict[str, float]:
        """``models`` [s t]."""
        small, large = self.sizes
        read = tokens_read(models)
        work = np.where(models == 1, large, small) * read
        return {
            "nats": float(np.where(models == 1, self.loss[1], self.loss[0]).mean()),
            "large_share": float(models.mean()),
            "cost": parameter_share(models, small, large),
            "flops": float(work.sum() / (large * models.size)),
            "switches": float(switches(models).mean()),
        }

    def shuffled(self, rng: np.random.Generator, models: np.ndarray) -> dict[str, float]:
        """Mean over draws with the same runs in another order."""
        draws = [self(shuffled_runs(rng, models)) for _ in range(DRAWS)]
        return {key: float(np.mean([draw[key] for draw in draws])) for key in draws[0]}

    def oracle(self, share: float) -> dict[str, float]:
        """The large model where it gains most, with no dwell; reads the label: a bound."""
        gap = self.loss[0] - self.loss[1]
        return self((gap > np.quantile(gap, 1 - share)).astype(np.int32))


def periodic(models: np.ndarray) -> np.ndarray:
    """Choices with runs of the mean lengths of ``models``."""
    small, large = (max(round(float(np.mean(runs or (1,)))), 1) for runs in run_lengths(models))
    blank = jnp.zeros(models.shape)
    switch = PeriodicSwitch(large=large, small=small)
    return np.asarray(choose_on_text(switch, blank, blank, jnp.float32(0)))


class Writers:
    """The decode drivers, each writing after the same prompts; judged against the large model's own text."""

    def __init__(self, pair: Pair, quick: bool):
        nets = {name: (run.model, pair.variables[name]) for name, run in pair.runs.items()}
        self.switching = SwitchingGenerator(nets["small"], nets["large"])
        self.speculating = {
            "speculative": SpeculativeGenerator(*nets["large"], OtherModel(*nets["small"])),
            "speculative_fixed": SpeculativeGenerator(
                *nets["large"], OtherModel(*nets["small"]), adaptive=False
            ),
        }
        self.sizes, self.new = pair.sizes(), 8 if quick else WRITTEN
        source = pair.runs["small"].task.source("validation")
        batches = sequential(source, pair.runs["small"].batch_size, 1 if quick else PROMPTS)
        rows = [row[:PROMPT].tolist() for batch in batches for row in batch["inputs"][:1]]
        self.alone = [(row, self._switch(row, -1.0).tokens) for row in rows]

    def _switch(self, row: list[int], threshold: float) -> Any:
        return self.switching.generate([row], self.new, threshold=threshold)[0]

    def _figures(self, same: list, passes: list, work: list) -> dict[str, float]:
        small, large = self.sizes
        steps, read = np.mean(passes, axis=0) / self.new, np.mean(work, axis=0) / self.new
        price = lambda counts: float(counts[0] * small / large + counts[1])
        return {
            "same": float(np.mean(same)),
            "large_share": float(steps[1]),
            "cost": price(steps),
            "flops": price(read),
        }

    def switched(self, threshold: float) -> dict[str, float]:
        """By entropy."""
        same, passes, work = [], [], []
        for row, own in self.alone:
            one = self._switch(row, threshold)
            models, read = np.asarray(one.models), np.asarray(one.read)
            same.append(np.cumprod(np.equal(one.tokens, own)).mean())
            passes.append([np.sum(models == m) for m in (0, 1)])
            work.append([np.sum(read[models == m]) for m in (0, 1)])
        return self._figures(same, passes, work)

    def speculated(self, name: str) -> dict[str, float]:
        """By drafts of the small model that the large one verifies; the first byte is the large model's pass."""
        same, passes, work = [], [], []
        for row, own in self.alone:
            (one,) = self.speculating[name].generate([row], self.new)
            drafts, accepted = np.asarray(one.drafted), np.asarray(one.accepted)
            turns = np.maximum(
                drafts, 1
            )  # the small model catches up even where nothing is drafted
            unread = np.sum(
                (accepted == drafts)[:-1]
            )  # a last draft that was kept is read in the next round
            same.append(np.cumprod(np.equal(one.tokens, own)).mean())
            passes.append([turns.sum(), 1 + len(drafts)])
            work.append([turns.sum() + unread, 1 + np.sum(1 + drafts)])
        return {**self._figures(same, passes, work), "differs": 1.0 - float(np.mean(same))}


def run_seed(seed: int, quick: bool, workdir: Path) -> dict[str, Any]:
    """All arms of one seed: arm -> metric -> value; ``_figures`` holds what the pictures show."""
    pair = Pair(seed, quick, workdir)
    loss, entropy, inputs = pair.read("validation", 1 if quick else BATCHES)
    _, tuning, _ = pair.read("calibration", 1 if quick else CALIBRATION)
    judge, rng, switch = Judge(loss, pair.sizes()), np.random.default_rng(seed), EntropySwitch()
    whole = np.ones(loss.shape[1:], np.int32)
    correlate = lambda y: float(np.corrcoef(entropy[0].ravel(), y.ravel())[0, 1])
    results = {
        "small": {
            **judge(0 * whole),
            "corr_gap": correlate(loss[0] - loss[1]),
            "corr_loss": correlate(loss[0]),
        },
        "large": judge(whole),
    }
    kept, chosen = {}, {}
    for name, share in SHARES.items():
        kept[name] = threshold_for(switch, tuning, share)
        models = chosen[name] = traces(switch, entropy, np.asarray([kept[name]]))[0]
        results[f"entropy_{name}"] = judge(models)
        results[f"random_{name}"] = judge.shuffled(rng, models)
        results[f"periodic_{name}"] = judge(periodic(models))
        results[f"oracle_{name}"] = judge.oracle(float(models.mean()))
    for name, (window, dwell) in VARIANTS.items():
        variant = EntropySwitch(window=window, min_dwell=dwell)
        at = threshold_for(variant, tuning, SHARES["62"])
        models = traces(variant, entropy, np.asarray([at]))[0]
        results[f"{name}_62"] = judge(models)
        results[f"{name}_random_62"] = judge.shuffled(rng, models)
    for tau, models in zip(TAUS, traces(switch, entropy, np.asarray(TAUS)), strict=True):
        results[f"tau_{int(10 * tau)}"] = judge(models)
    writers = Writers(pair, quick)
    results |= {f"written_{share}": writers.switched(kept[share]) for share in SHARES}
    results |= {name: writers.speculated(name) for name in writers.speculating}
    pictures = {"text": inputs[:3].ravel().tolist(), "large": chosen["50"][:3].ravel().tolist(),
                "entropy": entropy[0][:3].ravel().tolist()}  # fmt: skip
    return {**results, "_figures": pictures}


def figures(results: dict[str, Any], outdir: Path) -> None:
    """Writes the pictures of the page; drawing is in ``pictures.py``."""
    load_module(Path(__file__).with_name("pictures.py")).draw(results, outdir)
