"""Dynamic logits fusion (arXiv 2406.15480) on byte-level models: its alphas against fixed and random ones.

Six networks a seed, one forward pass each over the same held-out windows; every arm is an evaluation of their logits.
Fixed alphas are tuned on calibration windows of the domain, everything is reported on validation windows.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp import config
from dyncomp.core.ledger import Ledger
from dyncomp.decoding import alpha_grid, fused_logits, fused_text_logits, logit_shifts
from dyncomp.evidence.seed import load_module
from dyncomp.models import apply
from dyncomp.tasks.loader import sequential
from dyncomp.training.loop import train
from dyncomp.training.restore import load

SLUG = "dynamic_logits_fusion"
TITLE = "Dynamic logits fusion: small experts steer a large model, token by token"
COMPUTE = "passes"
DOMAINS = ("code", "headers")
FIXED = {"half": 0.5, "proxy": 1.0, "strong": 1.5}
KINDS = [
    *("base", "large", "expert", "bound", *FIXED, "best_fixed", "dynamic", "random", "shuffled"),
    *("from_fused", "from_base", "fine_grid", "two_experts", "wrong_expert"),
]
ARMS = [f"{kind}_{domain}" for domain in DOMAINS for kind in KINDS]
TRIALS = {arm: 21 if arm.startswith("best_fixed") else 1 for arm in ARMS}
METRICS = {
    "bits": {"text": "validation bits per byte of the domain", "minimize": True},
    "passes": {"text": "needed FLOPs of a token, over the large model's", "minimize": True},
    "alpha": {"text": "mean alpha"},
    "agreement": {
        "text": "share of positions whose chosen expert is the domain's, mean over domains"
    },
    "above_worst": {"text": "bits above alpha = 1 with the worse of both experts"},
    "gap_closed": {
        "text": "share of the gap from the large model to its own fine-tuning that is closed"
    },
    "changed": {"text": "absolute difference from the grid of 0.1, bits"},
}
BATCHES, CALIBRATION = 16, 8
QUICK = ["STEPS=4", "TUNE_STEPS=2", "BATCH=2", "CONTEXT=16"]
GRID, FINE = alpha_grid(), alpha_grid(steps=100)


class Models:
    """The trained networks of one seed."""

    def __init__(self, seed: int, quick: bool, workdir: Path):
        suite = config.load(SLUG, QUICK if quick else [])
        change = {"seed": seed, "capture": False, "final_eval_batches": 1, "eval_every": 0}
        self.runs = {name: run.replace(**change) for name, run in suite.runs.items()}
        self.batches = (1, 1) if quick else (BATCHES, CALIBRATION)
        self.calls = {}
        for name, run in self.runs.items():
            train(run, workdir / name, progress=False)
            variables = load(workdir / name, run).variables
            call = jax.jit(lambda v, x, model=run.model: apply(model, v, x)[0])
            self.calls[name] = lambda x, call=call, variables=variables: call(variables, x)

    def logits(self, domain: str, split: str, count: int) -> tuple[dict[str, Any], np.ndarray]:
        """Every model's logits [s t v] on windows of a domain, and the bytes that follow [s t]."""
        source = self.runs[f"expert_{domain}"].task.source(split)
        batches = list(sequential(source, self.runs["base"].batch_size, count))
        found = {
            name: np.concatenate([jax.device_get(call(batch["inputs"])) for batch in batches])
            for name, call in self.calls.items()
        }
        return found, np.concatenate([batch["targets"] for batch in batches])

    def passes(self) -> tuple[float, float]:
        """FLOPs of a token: a small model's and the large model's (projections, FFN and head of one position)."""
        costs = []
        for name in ("base", "large"):
            model = self.runs[name].model
            blank = np.zeros((1, 1), np.int32)
            shapes = jax.eval_shape(model.init, jax.random.key(0), blank)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            _, aux = apply(model, zeros, blank)
            costs.append(Ledger(model.cost((1, 1))).record(jax.device_get(aux.events)).total())
        return costs[0], costs[1]


def bits(logits: Any, targets: np.ndarray) -> float:
    """Mean bits per byte."""
    log_p = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32), axis=-1)
    own = jnp.take_along_axis(log_p, jnp.asarray(targets)[..., None], axis=-1)
    return float(-jnp.mean(own) / jnp.log(2.0))


def fuse_each(found: dict[str, Any], names: list[str], alphas: np.ndarray) -> Any:
    """Fused logits with alphas [e s t] given."""
    s, t, v = found["large"].shape
    flat = lambda x: jnp.asarray(x).reshape(-1, v)
    shifts = logit_shifts(flat(found["base"]), jnp.stack([flat(found[n]) for n in names]))
    weights = jnp.asarray(alphas).reshape(len(names), -1)
    return fused_logits(flat(found["large"]), shifts, weights).reshape(s, t, v)


def dynamic(found: dict[str, Any], names: list[str], grid: Any = GRID, **options: Any) -> Any:
    """(fused logits, plan of every position), window by window to bound memory."""
    call = jax.jit(lambda *x: fused_text_logits(*x, jnp.asarray(grid), **options))
    parts = []
    for i in range(len(found["large"])):
        row = slice(i, i + 1)
        own = np.stack([found[n][row] for n in names])
        parts.append(jax.device_get(call(found["large"][row], found["base"][row], own)))
    return np.concatenate([p[0] for p in parts]), jax.tree.map(
        lambda *x: np.concatenate(x), *[p[1] for p in parts]
    )


def domain_arms(
    models: Models, domain: str, rng: np.random.Generator
) -> tuple[dict[str, Any], Any]:
    """All arms of a domain, and its plans for pictures."""
    found, targets = models.logits(domain, "validation", models.batches[0])
    tuning, tuned_on = models.logits(domain, "calibration", models.batches[1])
    own, other = f"expert_{domain}", f"expert_{DOMAINS[1 - DOMAINS.index(domain)]}"
    full = lambda alpha, like=targets: np.full((1, *like.shape), alpha, np.float32)
    fixed = lambda alpha: bits(fuse_each(found, [own], full(alpha)), targets)
    curve = [bits(fuse_each(tuning, [own], full(a, tuned_on)), tuned_on) for a in GRID.tolist()]
    chosen = float(GRID[int(np.argmin(curve))])
    logits, plan = dynamic(found, [own])
    permuted = rng.permutation(plan.alpha.ravel()).reshape(1, *plan.alpha.shape)
    drawn = rng.choice(plan.alpha.ravel(), size=(1, *plan.alpha.shape))
    arms: dict[str, Any] = {
        "base": {"bits": bits(found["base"], targets)},
        "large": {"bits": bits(found["large"], targets)},
        "expert": {"bits": bits(found[own], targets)},
        "bound": {"bits": bits(found[f"large_{domain}"], targets)},
        **{kind: {"bits": fixed(a), "alpha": a} for kind, a in FIXED.items()},
        "best_fixed": {"bits": fixed(chosen), "alpha": chosen},
        "dynamic": {"bits": bits(logits, targets), "alpha": float(plan.alpha.mean())},
        "random": {"bits": bits(fuse_each(found, [own], drawn), targets)},
        "shuffled": {"bits": bits(fuse_each(found, [own], permuted), targets)},
    }
    for kind, options in {"from_fused": {"terms": "from_fused"}, "from_base": {"terms": "from_base"},
                          "fine_grid": {"grid": FINE}}.items():  # fmt: skip
        other_logits, other_plan = dynamic(found, [own], **options)
        arms[kind] = {"bits": bits(other_logits, targets), "alpha": float(other_plan.alpha.mean())}
    arms["fine_grid"]["changed"] = abs(arms["fine_grid"]["bits"] - arms["dynamic"]["bits"])
    gap = arms["large"]["bits"] - arms["bound"]["bits"]
    arms["dynamic"]["gap_closed"] = (arms["large"]["bits"] - arms["dynamic"]["bits"]) / gap
    both, plans = dynamic(found, [own, other])
    share = float((plans.expert == 0).mean())
    arms["two_experts"] = {"bits": bits(both, targets), "agreement": share}
    arms["wrong_expert"] = {"bits": bits(fuse_each(found, [other], full(1.0)), targets)}
    small, large = models.passes()
    extra = {"base": small, "expert": small, "large": large, "bound": large,
             "two_experts": large + 3 * small}  # fmt: skip
    for kind, figures in arms.items():
        figures["passes"] = extra.get(kind, large + 2 * small) / large
    shown = {
        "curve": [fixed(alpha) for alpha in GRID.tolist()],
        "histogram": [float((plan.alpha == a).mean()) for a in GRID],
        "text": models.runs[own].task.describe(targets[:4])["bytes"].tolist(),
        "alpha": plan.alpha[:4].ravel().tolist(),
    }
    return arms, shown


def run_seed(seed: int, quick: bool, workdir: Path) -> dict[str, Any]:
    """All arms of one seed: arm -> metric -> value; ``_figures`` holds what the pictures show."""
    models, results, shown = Models(seed, quick, workdir), {}, {}
    for place, domain in enumerate(DOMAINS):
        rng = np.random.default_rng((seed, place))
        arms, shown[domain] = domain_arms(models, domain, rng)
        results |= {f"{kind}_{domain}": figures for kind, figures in arms.items()}
    agreement = np.mean([results[f"two_experts_{d}"]["agreement"] for d in DOMAINS])
    for domain in DOMAINS:
        results[f"two_experts_{domain}"]["agreement"] = float(agreement)
        singles = [results[f"{kind}_{domain}"]["bits"] for kind in ("proxy", "wrong_expert")]
        results[f"two_experts_{domain}"]["above_worst"] = (
            results[f"two_experts_{domain}"]["bits"] - max(singles)
        )  # fmt: skip
    return {**results, "_figures": shown}


def figures(results: dict[str, Any], outdir: Path) -> None:
    """Writes the pictures of the page; drawing is in ``pictures.py``."""
    load_module(Path(__file__).with_name("pictures.py")).draw(results, outdir)
