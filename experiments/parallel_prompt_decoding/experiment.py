"""Parallel prompt decoding (arXiv 2405.18628) on a byte-level model of Python source.

One frozen model a seed. Prompt tokens and heads learn side by side from its greedy continuations of given text, and
accuracies are of such continuations. All figures of trees are of text that the model writes greedily after held-out
prompts: the ranks of the written bytes among the guesses at every position decide every pass of every tree
(`decoding.replay`). Trees are built from texts of the calibration split.

The arm ``fastest`` is the budget of least measured time a byte, plain decoding (budget 0) among them. The stored
results chose among trees only, also where those were slower than plain decoding: there ``speedup`` is below 1.
"""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp import config
from dyncomp.decoding import (
    Generator,
    Learner,
    TreeFamily,
    TreeGenerator,
    best_budget,
    best_family,
    guess_ranks,
    guessers_ranks,
    head_guesses,
    prompt_guesses,
    random_family,
    rank_accuracy,
    read_branches,
    read_text,
    replay,
    static_family,
    train_guessers,
)
from dyncomp.decoding.net import Net, separate
from dyncomp.decoding.reading import begin, read
from dyncomp.evidence.seed import load_module
from dyncomp.tasks.loader import Loader
from dyncomp.training.loop import train
from dyncomp.training.restore import load

SLUG = "parallel_prompt_decoding"
TITLE = "Parallel prompt decoding: trained prompt tokens guess ahead, a tree verifies in one pass"
COMPUTE = "computed"
K, BUDGET = 3, 32
BUDGETS = (4, 8, 16, BUDGET, 60)
GUESSERS = ("trained", "random", "text", "heads")
TREES = ("random_tree", "static", "released", "fastest")
DISTANCES = range(2, K + 2)
ARMS = ["greedy", *GUESSERS, *TREES, *(f"{name}_{n}" for name in GUESSERS for n in DISTANCES)]
TRIALS = dict.fromkeys(
    ARMS, 1
)  # learning rates are those of the sources; trees come from calibration texts
METRICS = {
    "tokens": {"text": "bytes that a pass writes, the model's own included"},
    "accepted": {"text": "guesses that a pass accepts"},
    "computed": {"text": "tokens that a pass computes, prompt tokens included", "minimize": True},
    "per_byte": {"text": "tokens computed for a written byte", "minimize": True},
    "saved": {"text": "share of greedy decoding's passes that is saved"},
    "predicted": {"text": "bytes a pass, as expected from calibration texts"},
    "top1": {"text": "share of greedy continuations of given text that the best guess gets right"},
    "top10": {"text": "share that the ten best guesses hold"},
    "unequal": {"text": "written bytes that differ from greedy decoding's", "minimize": True},
    "parameters": {"text": "parameters beside the model, relative to its own", "minimize": True},
    "byte_ms": {"text": "milliseconds a byte, batch 1, one thread, prompt included", "minimize": True},
    "speedup": {"text": "greedy passes' time over these passes', driver left out"},
    "budget": {"text": "candidates and prompt tokens of a pass, at most"},
}  # fmt: skip
TRAIN, BATCH, CUTS, LENGTH = 400, 8, 32, 128
PROMPT, NEW, CALIBRATION, VALIDATION, DECODED, DRAWS = 64, 32, 128, 160, 8, 20
QUICK = ["STEPS=4", "BATCH=2", "CONTEXT=24", "models.DecoderLM.d_model=32", "models.Group.repeat=1",
         "experts.SwiGLU.hidden=32"]  # fmt: skip
GUESS = {"trained": prompt_guesses, "random": prompt_guesses, "text": prompt_guesses,
         "heads": head_guesses}  # fmt: skip

PLAIN = {"tokens": 1.0, "accepted": 0.0, "computed": 1.0, "per_byte": 1.0, "saved": 0.0}


class Seed:
    """The frozen model of one seed and what guesses beside it."""

    def __init__(self, seed: int, quick: bool, workdir: Path):
        self.seed, self.quick = seed, quick
        suite = config.load(SLUG, QUICK if quick else [])
        change = {"seed": seed, "capture": False, "final_eval_batches": 1, "eval_every": 0}
        self.run = suite.runs["base"].replace(**change)
        train(self.run, workdir / "base", progress=False)
        self.variables = load(workdir / "base", self.run).variables
        self.net = Net(*separate(self.run.model, self.variables))
        self.generator = Generator(self.run.model, self.variables)
        self.params, self.losses = self._guessers()
        self._of_written, self._of_labels = jax.jit(self._written_ranks), jax.jit(self._label_ranks)
        self.budgets = (BUDGETS[0], BUDGET) if quick else BUDGETS

    def _guessers(self) -> tuple[dict[str, Any], list[dict[str, float]]]:
        """Parameters of every guesser, and the losses of those that learn."""
        d, rng = self.run.model.d_model, np.random.default_rng(self.seed)
        words = jnp.asarray(list(b"Next 2 word"[:K]), jnp.int32)  # the released code's first text
        text = self.net.embed(words[None])[0]
        noise = rng.normal(size=(K, d)) * float(jnp.sqrt(jnp.mean(text**2)))
        learners = {
            "trained": Learner(prompt_guesses, text),
            "heads": Learner(head_guesses, jnp.zeros((K, d, d)), 1e-3),
        }
        steps, batch, cuts, length = (2, 2, 4, 16) if self.quick else (TRAIN, BATCH, CUTS, LENGTH)
        source = self.run.task.source("train")
        loader = Loader(source, seed=self.seed + 1000, batch_size=batch)
        texts = (source.batch(loader.indices(n))["inputs"][:, :length] for n in range(steps))
        losses: list[dict[str, float]] = []
        note = lambda _, each: losses.append(each)
        params = train_guessers(
            self.net, learners, texts, steps, cuts=cuts, seed=self.seed, report=note
        )
        return {**params, "random": jnp.asarray(noise, jnp.float32), "text": text}, losses

    def written(self, split: str, count: int) -> np.ndarray:
        """Prompts of a split and what the model writes after them [s t]."""
        prompt, new, batch = (8, 12, 2) if self.quick else (PROMPT, NEW, 32)
        source = self.run.task.source(split)
        picked = np.linspace(0, len(source) - 1, 2 if self.quick else count).astype(int)
        prompts = source.batch(picked)["inputs"][:, :prompt].tolist()
        rows: list[list[int]] = []
        for start in range(0, len(prompts), batch):
            some = prompts[start : start + batch]
            made = self.generator.generate(some, new)
            rows += [p + one.tokens for p, one in zip(some, made, strict=True)]
        return np.asarray(rows, np.int32)

    def ranks(self, texts: np.ndarray) -> dict[str, np.ndarray]:
        """Of every guesser, the ranks [s n k] of the bytes that were written after each position."""
        prompt = 8 if self.quick else PROMPT
        return self._in_batches(
            self._of_written, texts, np.arange(prompt - 1, texts.shape[1] - K - 1)
        )

    def accuracy(self) -> dict[str, np.ndarray]:
        """Of every guesser, how often its r-th guess is right [k r] after cuts of validation text."""
        source, length = self.run.task.source("validation"), 16 if self.quick else LENGTH
        picked = np.linspace(0, len(source) - 1, 2 if self.quick else VALIDATION).astype(int)
        texts = source.batch(picked)["inputs"][:, :length]
        ranks = self._in_batches(self._of_labels, texts, np.arange(length // 4, length, 4))
        return {name: rank_accuracy(found.reshape(-1, K)) for name, found in ranks.items()}

    def _in_batches(self, call: Any, texts: np.ndarray, cuts: np.ndarray) -> dict[str, np.ndarray]:
        parts, cuts = [], cuts.astype(np.int32)
        for start in range(0, len(texts), BATCH):
            some = texts[start : start + BATCH]
            at = np.broadcast_to(cuts, (len(some), len(cuts)))
            parts.append(jax.device_get(call(self.net.variables, self.params, some, at)))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _written_ranks(self, variables: Any, params: Any, tokens: Any, cuts: Any) -> Any:
        net = Net(self.net.model, variables)
        outputs, reading = read_text(net, tokens, cuts.shape[1] * K)
        right = tokens[:, cuts[0, :, None] + 2 + np.arange(K)]
        text = reading, outputs, cuts
        return {
            name: guess_ranks(GUESS[name](net, own, *text), right) for name, own in params.items()
        }

    def _label_ranks(self, variables: Any, params: Any, tokens: Any, cuts: Any) -> Any:
        return guessers_ranks(Net(self.net.model, variables), GUESS, params, tokens, cuts)


def passes(family: TreeFamily, ranks: np.ndarray, width: int | None = None) -> dict[str, float]:
    """Figures of a family on texts; ``width`` where guesses cost no prompt tokens."""
    found = [replay(family, row) for row in ranks]
    count = sum(len(one.accepted) for one in found)
    accepted = sum(int(one.accepted.sum()) for one in found) / count
    slots = sum(one.slots(family) for one in found) / count if width is None else width
    tokens = 1 + accepted
    return {"tokens": tokens, "accepted": accepted, "computed": slots, "per_byte": slots / tokens,
            "saved": 1 - 1 / tokens, "predicted": 1 + family.accepted()}  # fmt: skip


def of_heads(acc: np.ndarray, budget: int) -> tuple[TreeFamily, int]:
    """The heads' tree as wide as a pass with prompt tokens: every slot but the root is a candidate."""
    size = min(budget + K, sum(acc.shape[1] ** n for n in range(1, K + 1)))
    return static_family(acc, size), 1 + size


def compare_trees(
    acc: dict[str, np.ndarray],
    ranks: dict[str, np.ndarray],
    budgets: tuple[int, ...],
    rng: np.random.Generator,
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Arms of equal budget, and tokens by budget for the pictures."""
    found: dict[str, dict[str, float]] = {}
    family = best_family(acc["trained"], BUDGET)
    sizes = [len(tree.paths) for tree in family.trees]
    prompts = ("trained", "random", "text")
    by_budget: dict[str, Any] = {
        name: [passes(best_family(acc[name], n), ranks[name]) for n in budgets] for name in prompts
    }
    trees = [of_heads(acc["heads"], n) for n in budgets]
    by_budget["heads"] = [passes(tree, ranks["heads"], width) for tree, width in trees]
    for name in GUESSERS:
        found[name] = {**by_budget[name][budgets.index(BUDGET)], "budget": BUDGET}
    draws = [random_family(rng, acc["trained"], sizes, BUDGET) for _ in range(DRAWS)]
    each = [passes(one, ranks["trained"]) for one in draws]
    found["random_tree"] = {key: float(np.mean([one[key] for one in each])) for key in each[0]}
    # Of the dynamic trees' average width, a root and its prompts left out, each node of a static tree takes 1 + k.
    size = max(round((found["trained"]["computed"] - 1 - K) / (1 + K)), 1)
    found["static"] = passes(static_family(acc["trained"], size), ranks["trained"])
    released = best_family(acc["trained"], BUDGET, released=True)
    found["released"] = passes(released, ranks["trained"])
    curves = {
        name: [(one["computed"], one["tokens"]) for one in by_budget[name]] for name in by_budget
    }
    predicted = [one["predicted"] for one in by_budget["trained"]]
    return found, {"curves": curves, "predicted": predicted, "measured": by_budget["trained"]}


def latencies(seed: Seed) -> dict[int, float]:
    """Median milliseconds of a pass over 128 bytes of text, by budget; 0 is a pass of one byte."""
    net, found = seed.net, {}
    tokens, count = jnp.zeros((1, 128), jnp.int32), jnp.full((1,), 128, jnp.int32)
    _, reading, _ = jax.jit(
        lambda v: read(Net(net.model, v), begin(net.model, 1, 256), tokens, count)
    )(net.variables)
    for budget in (0, *seed.budgets):
        width = budget + 1 + K if budget else 1

        @jax.jit
        def call(variables, reading, width=width):
            own = Net(net.model, variables)
            line = jnp.arange(width, dtype=jnp.int32)[None]
            seen = jnp.tril(jnp.ones((1, width, width), bool))
            args = jnp.zeros((1, width), jnp.int32), line, seen, jnp.ones((1, width), bool)
            return jnp.argmax(own.classify(read_branches(own, reading, *args)[0]), axis=-1)

        call(net.variables, reading).block_until_ready()
        times = []
        for _ in range(3 if seed.quick else 40):
            start = time.perf_counter()
            call(net.variables, reading).block_until_ready()
            times.append(1e3 * (time.perf_counter() - start))
        found[budget] = float(np.median(times))
    return found


def decoded(seed: Seed, texts: np.ndarray, family: TreeFamily) -> dict[str, dict[str, float]]:
    """The decode driver itself after some prompts, one by one: bytes that differ from greedy text, and time."""
    prompt, rows = (8, 1) if seed.quick else (PROMPT, DECODED)
    prompts, wanted = texts[:rows, :prompt].tolist(), texts[:rows, prompt:]
    new, found = wanted.shape[1], {}
    model = seed.run.model, seed.variables
    tree = TreeGenerator(*model, seed.params["trained"], family)
    runs = {"greedy": seed.generator, "trained": tree, "random": tree}
    for name, generator in runs.items():
        if name == "random":
            tree.prompts = seed.params["random"]
        generator.generate(prompts[:1], new)  # compiles
        start = time.perf_counter()
        made = [generator.generate([row], new)[0].tokens for row in prompts]
        seconds = time.perf_counter() - start
        found[name] = {"byte_ms": 1e3 * seconds / (rows * new),
                       "unequal": float(np.sum(np.asarray(made) != wanted))}  # fmt: skip
    return found


def run_seed(seed: int, quick: bool, workdir: Path) -> dict[str, Any]:
    """All arms of one seed: arm -> metric -> value; ``_figures`` holds what the pictures show."""
    made = Seed(seed, quick, workdir)
    calibrated = made.ranks(made.written("calibration", CALIBRATION))
    texts = made.written("validation", VALIDATION)
    ranks = made.ranks(texts)
    flat = lambda found: found.reshape(-1, K)
    acc = {name: rank_accuracy(flat(found)) for name, found in calibrated.items()}
    results, shown = compare_trees(acc, ranks, made.budgets, np.random.default_rng(seed))
    pass_ms = latencies(made)
    curve = dict(zip(made.budgets, shown["predicted"], strict=True))
    budget, measured = best_budget(curve, pass_ms), shown.pop("measured")
    chosen = measured[made.budgets.index(budget)] if budget else {**PLAIN, "predicted": 1.0}
    speedup = chosen["tokens"] * pass_ms[0] / pass_ms[budget]
    results["fastest"] = {**chosen, "budget": budget, "speedup": speedup}
    results["greedy"] = dict(PLAIN)
    family = best_family(acc["trained"], BUDGET)
    for name, figures_ in decoded(made, texts, family).items():
        results[name] |= figures_
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    for name in ("trained", "heads"):
        own = size(made.params[name]) / size(made.variables["params"])
        results[name]["parameters"] = own
    for name, table in made.accuracy().items():
        for n, row in zip(DISTANCES, table, strict=True):
            results[f"{name}_{n}"] = {"top1": float(row[0]), "top10": float(row.sum())}
    shown |= {"losses": made.losses, "budgets": [0, *made.budgets],
              "latencies": [pass_ms[n] for n in (0, *made.budgets)],
              **written_in_passes(texts, ranks["trained"], family, 8 if quick else PROMPT)}  # fmt: skip
    return {**results, "_figures": shown}


def written_in_passes(
    texts: np.ndarray, ranks: np.ndarray, family: TreeFamily, prompt: int
) -> dict[str, list[int]]:
    """Bytes of some texts, and by how many bytes the pass that wrote each one advanced (0: the prompt)."""
    text, advance = [], []
    for row, own in zip(texts[:6], ranks[:6], strict=True):
        steps = replay(family, own).accepted + 1
        written = np.repeat(steps, steps)[: len(own)].tolist()
        # The first byte comes from reading the prompt; a root and its accepted guesses from the passes after it.
        text += row[: prompt + 1 + len(written)].tolist() + [10]
        advance += [0] * prompt + [1, *written, 0]
    return {"text": text, "advance": advance}


def figures(results: dict[str, Any], outdir: Path) -> None:
    """Writes the pictures of the page; drawing is in ``pictures.py``."""
    load_module(Path(__file__).with_name("pictures.py")).draw(results, outdir)
