"""Information pathways (arXiv 2306.01705): training with a random quarter of the attention, on bytes of Python source.

Every arm trains for the same steps on the same batches, then for as many dense steps; each is evaluated dense and as an
ensemble of sampled passes, before and after. Sigma is chosen on calibration windows, everything is reported on
validation windows. The images are a second, smaller question.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from dyncomp import config
from dyncomp.attention.attention import PAIR_BLOCK
from dyncomp.core.aux import flatten
from dyncomp.evidence.seed import load_module
from dyncomp.models import apply, ensemble_nll
from dyncomp.parallel.counts import executed_at_most
from dyncomp.tasks.loader import sequential
from dyncomp.tasks.objectives import token_nll
from dyncomp.training.evaluate import Evaluator
from dyncomp.training.loop import train
from dyncomp.training.restore import load

SLUG = "information_pathways"
TITLE = "Information pathways: training with a random share of the attention"
COMPUTE = "attention"
SWEEP = ("windows", "sigma_2", "sigma_5", "sigma_16")
SAMPLED = (*SWEEP, "unbiased", "sigma_5_heads", "unbiased_heads")
IMAGES = tuple(
    f"image_{arm}" for arm in ("dense", "half", "quarter", "dropout_half", "dropout_quarter")
)
ARMS = [*SAMPLED, "best", "dense", "dense_short", *IMAGES]
TRIALS = {**dict.fromkeys(ARMS, 1), "best": 3}  # of the three sigmas, on calibration windows
METRICS = {
    "nats": {"text": "validation cross-entropy, dense evaluation after the dense phase", "minimize": True},
    "nats_before": {"text": "the same before it", "minimize": True},
    "gain": {"text": "what the dense phase takes off the dense evaluation"},
    "sampled_before": {"text": "one sampled pass, before the dense phase", "minimize": True},
    **{f"ensemble_{s}": {"text": f"mean probability of {s} sampled passes, after", "minimize": True}
       for s in (1, 2, 4, 8, 16)},
    "last_doubling": {"text": "what 16 passes take off the loss of 8"},
    "ensemble_16_before": {"text": "16 sampled passes, before the dense phase", "minimize": True},
    "attention": {"text": "attention entries computed in training, over the dense arm's", "minimize": True},
    "flops": {"text": "executed forward FLOPs of training, over the dense arm's", "minimize": True},
    "accuracy": {"text": "images: validation accuracy after the dense phase"},
    "accuracy_before": {"text": "images: the same before it"},
}  # fmt: skip
BATCHES, IMAGE_BATCHES, SIZES = 30, 80, (1, 2, 4, 8, 16)
QUICK = [
    "D_MODEL=16", "HIDDEN=24", "HEADS=2", "KV_HEADS=2", "DEPTH=1", "CONTEXT=32", "BATCH=2", "STEPS=3",
    "TUNE_STEPS=2", "IMAGE_DEPTH=1", "IMAGE_STEPS=3", "IMAGE_TUNE_STEPS=2", "IMAGE_BATCH=4",
]  # fmt: skip


class Seed:
    """Trains and evaluates the arms of one seed."""

    def __init__(self, seed: int, quick: bool, workdir: Path):
        self.seed, self.quick, self.workdir = seed, quick, workdir
        change = {"capture": False, "final_eval_batches": 1, "eval_every": 0}
        suite = config.load(SLUG, QUICK if quick else [])
        self.runs = {
            name: run.replace(**change, seed=seed + (1000 if name.endswith("_tuned") else 0))
            for name, run in suite.runs.items()
        }
        self._add_short()
        self.programs: dict[str, Evaluator] = {}
        self.batches = 1 if quick else BATCHES

    def _add_short(self) -> None:
        """Dense attention with as many attention entries in training as a sampled arm."""
        run, tuned = self.runs["dense"], self.runs["dense_tuned"]
        start = tuned.init_from
        assert start is not None
        self.runs["dense_short"] = run.replace(steps=max(run.steps // 4, 1))
        sibling = type(start)(sibling="dense_short", strict=True)
        self.runs["dense_short_tuned"] = tuned.replace(init_from=sibling)

    def trained(self, name: str) -> Any:
        """Variables of a run after training."""
        run, folder = self.runs[name], self.workdir / name
        train(run, folder, progress=False)
        return load(folder, run).variables

    def quality(self, name: str, variables: Any, split: Any = "validation") -> dict[str, float]:
        """Dense evaluation of variables of arm ``name``."""
        kind = "image" if name.startswith("image") else "text"
        plain = self.runs["image_dense" if kind == "image" else "dense"]
        evaluator = self.programs.setdefault(kind, Evaluator(plain))
        limit = self.batches if kind == "text" or self.quick else IMAGE_BATCHES
        return evaluator(variables, split, limit)["quality"]

    def ensembles(self, name: str, variables: Any) -> np.ndarray:
        """Loss of the ensembles of 1 .. 16 sampled passes."""
        run, count = self.runs[name], SIZES[-1]

        @jax.jit
        def call(variables: Any, batch: Any, keys: Any) -> Any:
            def one(key: Any) -> Any:
                logits, _ = apply(run.model, variables, batch["inputs"], rngs={"dropout": key})
                return token_nll(logits, batch["targets"])

            return ensemble_nll(jax.lax.map(one, keys)).mean(axis=(1, 2))

        found = []
        source = run.task.source("validation")
        for index, batch in enumerate(sequential(source, run.batch_size, self.batches)):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(self.seed), index), count)
            found.append(np.asarray(call(variables, batch, keys)))
        return np.mean(found, axis=0)

    def spent(self, name: str) -> tuple[float, float]:
        """(attention entries of a head, forward FLOPs) executed in a run's training, from the ledger."""
        run = self.runs[name]
        inputs = next(sequential(run.task.source("train"), run.batch_size, 1))["inputs"]
        found = executed_at_most(run.model, load(self.workdir / name, run).variables, inputs)
        counts = {path: n for path, n in found.items() if n is not None}
        assert counts.keys() == found.keys(), "a count that depends on what is drawn"
        prices = flatten(run.model.cost(inputs.shape))
        units = {"pairs": 1, "pair_blocks": PAIR_BLOCK}
        pairs = sum(n * units.get(path.rsplit("/", 1)[-1], 0) for path, n in counts.items())
        flops = sum(n * prices[path].flops for path, n in counts.items())
        return float(run.steps * pairs), float(run.steps * flops)


def text_arm(made: Seed, name: str) -> dict[str, Any]:
    """All figures of an arm on text; ``curve`` are the ensembles after the dense phase."""
    before, after = made.trained(name), made.trained(f"{name}_tuned")
    found = {
        "nats_before": made.quality(name, before)["nll"],
        "nats": made.quality(name, after)["nll"],
        "calibration": made.quality(name, after, "calibration")["nll"],
    }
    found["gain"] = found["nats_before"] - found["nats"]
    if name in SAMPLED:
        early, late = made.ensembles(name, before), made.ensembles(name, after)
        found |= {f"ensemble_{size}": float(late[size - 1]) for size in SIZES}
        found |= {"sampled_before": float(early[0]), "ensemble_16_before": float(early[15])}
        found |= {
            "averaging": float(late[15] - late[0]),
            "last_doubling": float(late[7] - late[15]),
            "over_dense": float(late[15]) - found["nats"],
            "one_over_dense": float(late[0]) - found["nats"],
            "early_ensemble_over_dense": float(early[15]) - found["nats"],
            "curve": late.tolist(),
        }
    first, second = made.spent(name), made.spent(f"{name}_tuned")
    return {**found, "share": first[0] / made.runs[name].steps, "attention": first[0] + second[0],
            "flops": first[1] + second[1]}  # fmt: skip


def image_arm(made: Seed, name: str) -> dict[str, float]:
    """Accuracy and loss of an arm on images."""
    before, after = (made.quality(name, made.trained(n)) for n in (name, f"{name}_tuned"))
    return {"accuracy_before": before["accuracy"], "accuracy": after["accuracy"],
            "nats_before": before["nll"], "nats": after["nll"]}  # fmt: skip


def relative(found: dict[str, Any]) -> None:
    """Compute of the arms on text over that of the dense arm; ``share`` is of a sampled step."""
    whole = {key: found["dense"][key] for key in ("share", "attention", "flops")}
    for name in (*SAMPLED, "dense_short", "dense"):
        found[name] |= {key: found[name][key] / value for key, value in whole.items()}


def run_seed(seed: int, quick: bool, workdir: Path) -> dict[str, Any]:
    """All arms of one seed: arm -> metric -> value; ``_figures`` holds what the pictures show."""
    made = Seed(seed, quick, workdir)
    texts = ("sigma_5", "dense") if quick else (*SAMPLED, "dense", "dense_short")
    found: dict[str, Any] = {name: text_arm(made, name) for name in texts}
    found |= {name: image_arm(made, name) for name in (IMAGES[1:2] if quick else IMAGES)}
    if quick:  # one arm stands for all of its kind
        found |= {name: dict(found["sigma_5"]) for name in SAMPLED}
        found |= {name: dict(found["image_half"]) for name in IMAGES}
        found["dense_short"] = dict(found["dense"])
    relative(found)
    curves = {name: found[name].pop("curve") for name in SAMPLED}
    chosen = min(SWEEP[1:], key=lambda name: found[name]["calibration"])
    found["best"] = dict(found[chosen])
    shown = {"curves": curves, "dense": found["dense"]["nats"], "chosen": chosen, **look(made)}
    return {**found, "_figures": shown}


def look(made: Seed) -> dict[str, Any]:
    """Keys that a late query reads in each layer of four draws, on a window of validation text."""
    # What is drawn depends on neither weights nor text: one arm's weights do for all.
    variables = load(made.workdir / "sigma_5", made.runs["sigma_5"]).variables
    batch = next(sequential(made.runs["dense"].task.source("validation"), 1, 1))
    query = 9 * batch["inputs"].shape[1] // 10
    seen: dict[str, Any] = {}
    for name in ("windows", "sigma_5", "unbiased"):
        model, rows = made.runs[name].model, []

        @jax.jit
        def call(key: Any, model: Any = model) -> Any:
            rngs = {"dropout": key}
            _, aux = apply(model, variables, batch["inputs"], rngs=rngs, capture=("plan",))
            plan = aux.plans["group_0"]["block_0"]["mixer"]["sampled"]
            return jax.vmap(lambda one: one.table())(plan)

        for draw in range(4):
            tables = np.asarray(call(jax.random.key(draw)))[:, 0]  # [l t t]
            rows.append(tables[:, query].astype(int).tolist())
        seen[name] = rows
    return {"text": batch["inputs"][0].tolist(), "query": query, "seen": seen}


def figures(results: dict[str, Any], outdir: Path) -> None:
    """Writes the pictures of the page; drawing is in ``pictures.py``."""
    load_module(Path(__file__).with_name("pictures.py")).draw(results, outdir)
