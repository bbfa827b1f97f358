"""Big or small modules (Duo-LLM, arXiv 2410.10846): oracles over layer choices, learned routers, random routes.

One network is trained with random choices. Everything else looks at that network: every fixed route is run on 256
validation sequences, half A chooses the best fixed routes, all figures are of half B.
"""

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp import config
from dyncomp.evidence.seed import load_module
from dyncomp.models import apply
from dyncomp.tasks.loader import sequential
from dyncomp.tasks.objectives import token_nll
from dyncomp.tasks.token_classes import CLASSES, byte_classes
from dyncomp.training import InitFrom, Run
from dyncomp.training.loop import train
from dyncomp.training.restore import load

SLUG = "duo_llm"
TITLE = "Duo-LLM: a big or a small module for every token and layer"
COMPUTE = "big"
BUDGETS = (1, 2, 3, 4, 5)
SHARES = {"025": 0.25, "050": 0.5}
ARMS = [
    "all_small", "all_big", "dense", "token_random",
    *(f"{kind}_b{b}" for kind in ("mean", "best", "seq", "tok") for b in BUDGETS),
    *(f"{kind}_{share}" for kind in ("learned", "shuffled") for share in SHARES),
    "skip_all_big", "skip_oracle",
]  # fmt: skip
TRIALS = dict.fromkeys(ARMS, 1)  # nothing was tuned
METRICS = {
    "nats": {"text": "validation cross-entropy, nats per byte (half B)", "minimize": True},
    "big": {"text": "mean big modules per token, of 6 layers", "minimize": True},
    "position": {"text": "mean layer of the oracle's big modules"},
}
LAYERS, FIXED, DRAWS = 6, 20, 20
BATCHES, SKIP_BATCHES = 16, 2
SCOPES = {"routed": "routed", "dense": "dense", "given": "routed/given", "random": "routed/random"}
RUNS = ", ".join(f"'{name}': @{scope}/training.Run()" for name, scope in SCOPES.items())
WITH_CONTROLS = [
    f"training.Suite.runs={{{RUNS}}}",
    "routed/given/experts.Ladder.router=@routers.Given",
    "routed/random/experts.Ladder.router=@routers.Random",
    "routers.Random.histogram=(1.0,)",
]
SKIP = ["experts.Ladder.widths=(%HIDDEN, %SMALL, 0)"]
QUICK = ["tasks.CodeLM.context=32", "D_MODEL=16"]


class Network:
    """A trained network and the ways to send tokens through it."""

    def __init__(self, runs: dict[str, Run], workdir: Path, batches: int):
        self.runs, self.run = runs, runs["routed"]
        self.variables = load(workdir, self.run).variables
        self.batches = list(sequential(self.run.task.source("validation"), 16, batches))
        self._told = jax.jit(self._nll_told)

    def _nll_told(self, variables: Any, batch: Any, choice: Any) -> Any:
        spread = {"group_0": {"layers": {"block_0": {"ffn": {"router": {"choice": choice}}}}}}
        model = self.runs["given"].model
        output, _ = apply(
            model, {"params": variables["params"], "controls": spread}, batch["inputs"]
        )
        return token_nll(output, batch["targets"])

    def told(self, choice: np.ndarray) -> np.ndarray:
        """Loss of every token [s t] where layer l uses alternative ``choice[l]``."""
        choice = jnp.asarray(choice, jnp.int32)
        return np.concatenate(
            [jax.device_get(self._told(self.variables, b, choice)) for b in self.batches]
        )

    def told_each(self, choices: list[np.ndarray]) -> np.ndarray:
        """The same with one choice [l n] a token and batch."""
        pairs = zip(self.batches, choices, strict=True)
        found = [self._told(self.variables, b, jnp.asarray(c, jnp.int32)) for b, c in pairs]
        return np.concatenate(jax.device_get(found))

    def at_random(self, seed: int) -> np.ndarray:
        """Loss of every token with independent, uniform choices."""
        model = self.runs["random"].model

        @jax.jit
        def call(variables, batch, key):
            own = {"params": variables["params"]}
            output, _ = apply(model, own, batch["inputs"], train=True, rngs={"router": key})
            return token_nll(output, batch["targets"])

        keys = jax.random.split(jax.random.key(seed), len(self.batches))
        return np.concatenate(
            [
                jax.device_get(call(self.variables, b, k))
                for b, k in zip(self.batches, keys, strict=True)
            ]
        )


def runs_of(seed: int, quick: bool, *extra: str) -> dict[str, Run]:
    """The config's runs and the two controls'."""
    change = {"seed": seed, "capture": False, "final_eval_batches": 2, "eval_every": 0}
    short = ["EXPLORE=6", "ROUTE=4", *QUICK] if quick else []
    suite = config.load(SLUG, [*WITH_CONTROLS, *extra, *short])
    return {name: run.replace(**change) for name, run in suite.runs.items()}


def base(runs: dict[str, Run], workdir: Path) -> Run:
    """Trains the network with random choices only."""
    run = runs["routed"].replace(stages=runs["routed"].stages[:1])
    train(run, workdir, progress=False)
    return run


def learned(seed: int, share: float, start: Path, workdir: Path, quick: bool) -> Network:
    """Trains routers on the frozen network of ``start``."""
    extra = [f"BUDGET={share}", "routers.Annealed.explore_steps=0"]
    runs = runs_of(seed, quick, *extra)
    run = runs["routed"].replace(
        stages=runs["routed"].stages[1:], init_from=InitFrom(path=str(start), exclude="router")
    )
    train(run, workdir, progress=False)
    return Network({**runs, "routed": run}, workdir, 2 if quick else BATCHES)


def decisions(net: Network) -> tuple[np.ndarray, list[np.ndarray]]:
    """Loss [s t] of the learned router in evaluation, and its choice [l n] of every batch."""

    @jax.jit
    def call(variables, batch):
        output, aux = apply(net.run.model, variables, batch["inputs"], capture=("plan",))
        plan = aux.plans["group_0"]["block_0"]["ffn"]["route"]
        return token_nll(output, batch["targets"]), jnp.argmax(plan.weights, axis=-1)

    found = [jax.device_get(call(net.variables, batch)) for batch in net.batches]
    return np.concatenate([nll for nll, _ in found]), [choice for _, choice in found]


def half_b(nll: np.ndarray) -> float:
    """Mean over the second half of the sequences."""
    return float(nll[len(nll) // 2 :].mean())


def fixed_routes(net: Network, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of all fixed routes, of the best ones and of both oracles; and data for pictures."""
    routes = np.asarray(list(itertools.product((0, 1), repeat=LAYERS)))  # 0 is the big module
    nll = np.stack([net.told(route) for route in routes])  # [r s t]
    count = LAYERS - routes.sum(axis=1)
    half = nll.shape[1] // 2
    a, b = nll[:, :half], nll[:, half:]
    small, big = b[count == 0][0], b[count == LAYERS][0]
    found = {
        "all_small": {"nats": small.mean(), "big": 0},
        "all_big": {"nats": big.mean(), "big": LAYERS},
    }
    rng, equal, order = np.random.default_rng(seed), {}, []
    for budget in BUDGETS:
        own = np.flatnonzero(count == budget)
        tried = rng.permutation(own)[:FIXED]
        best = tried[a[tried].mean(axis=(1, 2)).argmin()]
        sequence, token = b[own].mean(axis=2), b[own].min(axis=0)
        chosen = routes[own][sequence.argmin(axis=0)]
        place = [np.flatnonzero(route == 0).mean() for route in chosen]
        draws = [
            sequence[rng.permutation(len(own))[:LAYERS]].min(axis=0).mean() for _ in range(DRAWS)
        ]
        equal[budget] = float(np.mean(draws))
        values = {
            "mean": b[own].mean(),
            "best": b[best].mean(),
            "seq": sequence.min(axis=0).mean(),
            "tok": token.mean(),
        }
        for kind, value in values.items():
            found[f"{kind}_b{budget}"] = {"nats": value, "big": budget}
        found[f"seq_b{budget}"]["position"] = float(np.mean(place))
        order.append(
            (
                values["tok"] - values["seq"],
                values["seq"] - values["best"],
                values["best"] - values["mean"],
            )
        )
    gaps = np.asarray(order)
    found["best_b3"]["worst_best_gap"] = float(gaps[:, 2].max())
    found["tok_b3"]["worst_order"] = float(gaps[:, :2].max())
    best = min(found[f"seq_b{x}"]["nats"] for x in BUDGETS)
    found["seq_b3"] |= {
        "above_best": found["seq_b3"]["nats"] - best,
        "above_best_equal": equal[3] - min(equal.values()),
    }
    found["tok_b3"] |= difficulty(small, b[count == 3].min(axis=0))
    heat = [[float(np.mean(routes[count == x][b[count == x].mean(axis=2).argmin(axis=0)][:, layer] == 0))
             for layer in range(LAYERS)] for x in BUDGETS]  # fmt: skip
    return found, {"heat": heat, "equal": [equal[x] for x in BUDGETS]}


def difficulty(small: np.ndarray, oracle: np.ndarray) -> dict[str, float]:
    """Where extra compute helps: the gain of early over late tokens, and hard tokens without any gain."""
    gain = small - oracle
    quarter = small.shape[1] // 4
    hard = small >= np.quantile(small, 0.9)
    return {
        "early_gain": float(gain[:, :quarter].mean() - gain[:, -quarter:].mean()),
        "hopeless": float((gain[hard] < 0.05 * small[hard]).mean()),
    }


def skips(seed: int, workdir: Path, quick: bool) -> dict[str, dict[str, float]]:
    """A network trained with big, small and none: its best routes that skip two FFNs."""
    runs = runs_of(seed, quick, *SKIP)
    net = Network({**runs, "routed": base(runs, workdir)}, workdir, 1 if quick else SKIP_BATCHES)
    routes = np.asarray([r for r in itertools.product((0, 1, 2), repeat=LAYERS) if r.count(2) == 2])
    routes = routes[: 8 if quick else None]
    nll = np.stack([net.told(route).mean(axis=1) for route in routes])  # [r s]
    chosen = routes[nll.argmin(axis=0)]
    exits = (chosen[:, -2:] == 2).all(axis=1)
    everything = net.told(np.zeros(LAYERS, int))
    return {
        "skip_all_big": {"nats": float(everything.mean()), "big": LAYERS},
        "skip_oracle": {"nats": float(nll.min(axis=0).mean()), "big": float((chosen == 0).sum(axis=1).mean()),
                        "exit_like": float(exits.mean())},
    }  # fmt: skip


def run_seed(seed: int, quick: bool, workdir: Path) -> dict[str, Any]:
    """All arms of one seed: arm -> metric -> value; ``_figures`` holds what the pictures show."""
    runs = runs_of(seed, quick)
    net = Network(
        {**runs, "routed": base(runs, workdir / "base")}, workdir / "base", 2 if quick else BATCHES
    )
    results, shown = fixed_routes(net, seed)
    results["token_random"] = {"nats": half_b(net.at_random(seed)), "big": LAYERS / 2}
    train(runs["dense"], workdir / "dense", progress=False)
    results["dense"] = {"nats": dense_loss(runs["dense"], workdir / "dense", net), "big": LAYERS}
    rng = np.random.default_rng(seed)
    for name, share in SHARES.items():
        routed = learned(seed, share, workdir / "base", workdir / f"learned_{name}", quick)
        nll, choices = decisions(routed)
        big = float(np.mean([(c == 0).mean() for c in choices[len(choices) // 2 :]])) * LAYERS
        results[f"learned_{name}"] = {"nats": half_b(nll), "big": big}
        shuffled = [rng.permuted(choice, axis=1) for choice in choices]
        results[f"shuffled_{name}"] = {"nats": half_b(routed.told_each(shuffled)), "big": big}
        shown |= {f"text_{name}": text(routed, choices)}
    results |= skips(seed, workdir / "skip", quick)
    return {**results, "_figures": shown}


def dense_loss(run: Run, workdir: Path, net: Network) -> float:
    """Loss of the dense network on half B."""
    variables = load(workdir, run).variables
    call = jax.jit(lambda v, b: token_nll(apply(run.model, v, b["inputs"])[0], b["targets"]))
    return half_b(np.concatenate([jax.device_get(call(variables, b)) for b in net.batches]))


def text(net: Network, choices: list[np.ndarray]) -> dict[str, Any]:
    """Learned choices by layer and by kind of byte, and on a piece of text."""
    values = np.concatenate([batch["inputs"].ravel() for batch in net.batches])
    big = (np.concatenate(choices, axis=1) == 0).astype(np.float64)
    classes, each = byte_classes(bytes(values.astype(np.uint8))), big.sum(axis=0)
    kinds = {
        n: float(each[classes == i].mean()) for i, n in enumerate(CLASSES) if (classes == i).any()
    }
    return {"layers": big.mean(axis=1).tolist(), "classes": kinds,
            "text": values[:768].tolist(), "big": each[:768].tolist()}  # fmt: skip


def figures(results: dict[str, Any], outdir: Path) -> None:
    """Writes the pictures of the page; drawing is in ``pictures.py``."""
    load_module(Path(__file__).with_name("pictures.py")).draw(results, outdir)
