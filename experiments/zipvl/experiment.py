"""ZipVL (arXiv 2410.08584) on SmolLM2-135M: which tokens attend while a prompt is read, and at how many bits they stay.

Needs the weights (``DYNCOMP_SMOLLM2``, see docs/pretrained.md); ``--quick`` does with a random model of bytes. Nothing
trains. Every arm reads the same prompts of a seed and is judged by the loss of the 96 tokens behind each.
"""

import dataclasses
import functools
import sysconfig
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dyncomp import config
from dyncomp.attention import MixedCache, MixedPrecision, cache_bytes
from dyncomp.attention.attention import PAIR_BLOCK
from dyncomp.evidence.following import Follower, layers_of, smollm2
from dyncomp.evidence.seed import load_module
from dyncomp.tasks.long_text import draw
from dyncomp.tasks.objectives import token_nll

SLUG = "zipvl"
TITLE = "ZipVL: important tokens for prefill and for the bits of the cache"
COMPUTE = "pairs"
TAUS = {"80": 0.8, "90": 0.9, "96": 0.96, "975": 0.975}
RANKINGS = ("accumulated", "random")
PROBES = {
    "probed_80": {}, "probed_90": {}, "seen_90": {"normaliser": "probe"},
    "recent_90": {"probe": "recent", "recent": 128}, "drawn_90": {"probe": "random", "drawn": 128},
}  # fmt: skip
BITS = {
    "bits_42": (4, 2),
    "bits_24": (2, 4),
    "bits_22": (2, 2),
    "bits_33": (3, 3),
    "bits_44": (4, 4),
}
ARMS = [
    "dense", *(f"adaptive_{name}" for name in TAUS), "fixed_80", "fixed_90", "shuffled_90",
    *(f"{ranking}_90" for ranking in RANKINGS), *PROBES, "probed_975", "probed_fixed_90",
    *(f"probed_{ranking}_90" for ranking in RANKINGS), *BITS, "bits_42_random",
    "bits_42_accumulated", "bits_42_286", "whole_975", "whole_window32",
    "tables_dense", "tables_975", "tables_probed_975",
]  # fmt: skip
TRIALS = dict.fromkeys(ARMS, 1)  # nothing is tuned
METRICS = {
    "nats": {"text": "cross-entropy of the tokens behind the prompt, nats a token", "minimize": True},
    "pairs": {"text": "attention pairs of the prompt kept, of all causal ones", "minimize": True},
    "executed": {"text": "pairs of the prompt computed, blocks and probes included, of all causal ones"},
    "kept": {"text": "important tokens, share of the prompt, mean over layers"},
    "spread": {"text": "share of important tokens, highest less lowest layer"},
    "bits": {"text": "mean bits of a cached number, without steps and places", "minimize": True},
    "ratio": {"text": "how many times smaller the prompt's cache is than one of 16 bits, all included"},
}  # fmt: skip
FULL = {"prompt": 1024, "new": 96, "texts": 6}
QUICK = {"prompt": 64, "new": 32, "texts": 2}


class Reader:
    """A model that reads prompts into caches of any policy, one compiled program each."""

    def __init__(self, model: Any, variables: Any, tokenizer: Any, sizes: dict[str, int]):
        self.model, self.variables, self.tokenizer, self.sizes = model, variables, tokenizer, sizes
        mixer = config.load(SLUG).runs["base"].model.groups[0].blocks[0]().mixer()
        self.cache, self.tokens = mixer.cache, mixer.cache(max_length=1).tokens
        self.follower, self.known = Follower(model, variables), {}
        self._read = jax.jit(self._reading)
        self._go_on = jax.jit(self._going_on)

    def policy(self, tokens: dict[str, Any] | None = None, **words: Any) -> MixedPrecision:
        """The config's cache with changes; without quantisers unless told. The same words give the same object."""
        key = str((tokens, words))
        if key not in self.known:
            prompt, chosen = self.sizes["prompt"], functools.partial(self.tokens, **(tokens or {}))
            own = {"high": None, "low": None, "tokens": chosen, "prompt": prompt, **words}
            self.known[key] = self.cache(max_length=prompt + self.sizes["new"], **own)
        return self.known[key]

    def _reading(self, variables, tokens, cache):
        x, aux = self.model.apply(variables, tokens, cache=cache, method="hidden")
        logits = self.model.apply(variables, x[:, -1:], method="classify")
        return logits[:, 0], layers_of(aux), aux.events

    def _going_on(self, variables, first, tokens, cache):
        """Loss of each token, the first of which follows ``first``."""
        x, _ = self.model.apply(variables, tokens, cache=cache, method="hidden")
        logits = self.model.apply(variables, x, method="classify")
        every = jnp.concatenate([first[:, None], logits[:, :-1]], axis=1)
        return token_nll(every, tokens)

    def prompt(
        self,
        texts: np.ndarray,
        policy: MixedPrecision,
        tau: float | None = None,
        budget: Any = None,
    ) -> "Read":
        """Reads the prompts; ``budget`` int [l b], p itself."""
        own = self.follower.blank(policy, len(texts))
        change = {"tau": own.tau if tau is None else jnp.full_like(own.tau, tau)}
        if budget is not None:
            change["budget"] = jnp.asarray(budget, jnp.int32)
        cache = with_layers(dataclasses.replace(own, **change))
        n = self.sizes["prompt"]
        return Read(*self._read(self.variables, texts[:, :n], cache))

    def nats(self, texts: np.ndarray, read: "Read", layers: MixedCache) -> float:
        """Mean loss of the tokens behind the prompt."""
        new = texts[:, self.sizes["prompt"] :]
        found = self._go_on(self.variables, read.first, new, with_layers(layers))
        return float(np.mean(jax.device_get(found)))


@dataclasses.dataclass(frozen=True)
class Read:
    """What a pass over prompts left: logits after them, the stacked caches of all layers, events."""

    first: Any
    layers: MixedCache
    events: Any

    @property
    def counts(self) -> np.ndarray:
        """Important tokens, int [l b]."""
        return np.asarray(self.layers.prompt.count)


def with_layers(layers: MixedCache) -> Any:
    """A model's cache of these."""
    return {"group_0": {"layers": {"block_0": {"mixer": layers}}}}


def sparsity(read: Read, n: int) -> dict[str, float]:
    """Figures of a prompt's attention."""
    counts, mixer = read.counts.astype(np.int64), read.events["group_0"]["block_0"]["mixer"]
    done = lambda name: int(np.sum(np.asarray(mixer[name].executed, np.int64)))
    pairs = done("pair_blocks") * PAIR_BLOCK + done("pairs") + done("scored") / 2
    share = counts.mean(axis=1) / n
    return {
        "pairs": float(np.mean(counts * (counts + 1)) / (n * (n + 1))),
        "executed": float(pairs / (counts.size * n * (n + 1) / 2)),
        "kept": float(share.mean()),
        "spread": float(share.max() - share.min()),
    }


def size(layers: MixedCache) -> dict[str, float]:
    """Figures of a prompt's cache, over all layers."""
    each = [cache_bytes(jax.tree.map(lambda x, i=i: x[i], layers)) for i in range(len(layers.tau))]
    total = lambda name: sum(getattr(one, name) for one in each)
    _, b, g, _, p = layers.keys.shape
    numbers = 2 * g * p * total("packed")
    return {
        "bits": 8 * total("codes") / numbers,
        "ratio": 2 * numbers / (total("codes") + total("metadata")),
    }


def tables() -> list[str]:
    """The character maps of the standard library's ``encodings``: lines that hardly differ."""
    folder, mark = Path(sysconfig.get_paths()["stdlib"]) / "encodings", "decoding_table = ("
    texts = [path.read_text("utf-8") for path in sorted(folder.glob("*.py"))]
    return [text[text.find(mark) :] for text in texts if mark in text]


def draw_texts(reader: Reader, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Prose (Python's language reference) or windows of different tables, int32 [b, prompt + new]."""
    wide, rows, found = reader.sizes["prompt"] + reader.sizes["new"], reader.sizes["texts"], []
    if kind == "prose":
        found = [draw(reader.tokenizer, "prose", wide, rng) for _ in range(rows)]
        return np.asarray(found, np.int32)
    for index in rng.permutation(len(texts := tables())):
        ids = reader.tokenizer.encode(texts[index])
        if len(ids) >= wide:
            start = int(rng.integers(0, len(ids) - wide + 1))
            found.append(ids[start : start + wide])
    return np.asarray(found[:rows], np.int32)


def make_reader(quick: bool) -> tuple[Reader, Any]:
    """The model, and what turns one of its tokens into bytes."""
    model, variables, tokenizer = smollm2(SLUG, quick)
    reader = Reader(model, nn.unbox(variables), tokenizer, QUICK if quick else FULL)
    return reader, lambda token: tokenizer.decode([token]).encode("latin-1", "replace")


def random_split(rng: np.random.Generator, counts: np.ndarray, n: int) -> np.ndarray:
    """`Chosen.order` of random tokens, the last one among them: int32 [l b n]."""
    order = np.empty((*counts.shape, n), np.int32)
    for place in np.ndindex(counts.shape):
        drawn = np.concatenate([[n - 1], rng.permutation(n - 1)])
        first, rest = np.split(drawn, [counts[place]])
        order[place] = np.concatenate([np.sort(first), np.sort(rest)])
    return order


def evened(counts: np.ndarray) -> np.ndarray:
    """One p for all layers of a text, the mean: int [l b]."""
    return np.broadcast_to(np.round(counts.mean(axis=0)).astype(int), counts.shape)


class Seed:
    """All arms of one seed on one set of texts."""

    def __init__(self, reader: Reader, texts: np.ndarray, rng: np.random.Generator):
        self.reader, self.texts, self.rng, self.n = reader, texts, rng, reader.sizes["prompt"]
        self.exact = reader.policy()
        self.results: dict[str, dict[str, float]] = {}

    def sparse(self, arm: str, tau: float = 0.9, budget: Any = None, **tokens: Any) -> Read:
        """A sparse prefill whose cache stays at full precision."""
        read = self.reader.prompt(self.texts, self.reader.policy(tokens), tau, budget)
        return self.judged(arm, read)

    def dense(self, arm: str | None, share: float, **tokens: Any) -> Read:
        """A dense prefill; the store's front holds so many of the best tokens."""
        budget = np.full((self.reader.model.depth, len(self.texts)), round(share * self.n))
        policy = self.reader.policy(tokens, sparse=False)
        read = self.reader.prompt(self.texts, policy, None, budget)
        if arm is None:
            return read
        # Nothing is left out of attention, whatever the store's ends hold.
        whole = {**sparsity(read, self.n), "pairs": 1.0, "kept": 1.0, "spread": 0.0}
        return self.judged(arm, read, whole)

    def judged(self, arm: str, read: Read, figures: dict[str, float] | None = None) -> Read:
        """Goes on behind a prompt at full precision: one program for all policies."""
        layers = dataclasses.replace(read.layers, policy=self.exact)
        nats = self.reader.nats(self.texts, read, layers)
        self.results[arm] = {"nats": nats, **(figures or sparsity(read, self.n))}
        return read

    def packed(
        self, arm: str, read: Read, bits: tuple[int, int], order=None, count=None, **words
    ) -> None:
        """Goes on behind a prompt whose cache is quantised."""
        policy = self.reader.policy(high=bits[0], low=bits[1], **words)
        more = [None if x is None else jnp.asarray(x, jnp.int32) for x in (order, count)]
        layers = jax.jit(jax.vmap(policy.repacked))(read.layers, *more)
        nats = self.reader.nats(self.texts, read, layers)
        self.results[arm] = {"nats": nats, **size(layers)}

    def prefill_arms(self, piece: Any) -> tuple[dict[str, np.ndarray], Read, dict[str, list]]:
        """Which tokens attend, told by every query, and by few.

        Returns:
          p of some arms [l b], what the paper's own setting read, and what is shown of a text; caches are large.
        """
        every, kept, shown = functools.partial(self.sparse, probe="all"), {}, {}
        for name, tau in TAUS.items():
            read = every(f"adaptive_{name}", tau)
            kept[f"adaptive_{name}"] = read.counts
            shown = shown or shown_text(self.texts, read, piece)
        for name in ("80", "90"):
            every(f"fixed_{name}", budget=evened(kept[f"adaptive_{name}"]))
        counts = kept["adaptive_90"]
        every("shuffled_90", budget=self.rng.permuted(counts, axis=0))
        for ranking in RANKINGS:
            every(f"{ranking}_90", budget=counts, ranking=ranking)
        for arm, tokens in PROBES.items():
            kept[arm] = self.sparse(arm, TAUS[arm.rpartition("_")[2]], **tokens).counts
        counts = kept["probed_90"]
        self.sparse("probed_fixed_90", budget=evened(counts))
        for ranking in RANKINGS:
            self.sparse(f"probed_{ranking}_90", budget=counts, ranking=ranking)
        return kept, self.sparse("probed_975", TAUS["975"]), shown

    def cache_arms(self, whole: Read) -> None:
        """At how many bits they stay."""
        half = self.dense("dense", 0.5)
        for arm, bits in BITS.items():
            self.packed(arm, half, bits)
        order = random_split(self.rng, half.counts, self.n)
        self.packed("bits_42_random", half, (4, 2), order, half.counts)
        self.packed("bits_42_accumulated", self.dense(None, 0.5, ranking="accumulated"), (4, 2))
        self.packed("bits_42_286", self.dense(None, 0.286), (4, 2))
        for arm, words in (("whole_975", {}), ("whole_window32", {"span": 32})):
            self.packed(arm, whole, (4, 2), **words)
            self.results[arm] |= sparsity(whole, self.n)


def shown_text(texts: np.ndarray, read: Read, piece: Any, room: int = 1400) -> dict[str, list]:
    """Bytes of the first text's end, and in what share of the layers each is an important token's."""
    n = read.layers.policy.prompt
    front = np.arange(n) < read.counts[:, 0, None]
    places, share = np.asarray(read.layers.prompt.positions)[:, 0], np.zeros(n)
    for layer, own in enumerate(front):
        share[places[layer][own]] += 1 / len(front)
    values, shades = [], []
    for token, one in zip(texts[0, :n], share, strict=True):
        own = piece(int(token))
        values += own
        shades += [float(one)] * len(own)
    return {"text": values[-room:], "share": shades[-room:]}


def run_seed(seed: int, quick: bool, workdir: Path) -> dict[str, Any]:
    """All arms of one seed: arm -> metric -> value; ``_figures`` holds what the pictures show."""
    (reader, piece), rng = make_reader(quick), np.random.default_rng(seed)
    prose = draw_texts(reader, "prose", rng)
    own = Seed(reader, prose, rng)
    kept, whole, shown = own.prefill_arms(piece)
    own.cache_arms(whole)
    tables = Seed(reader, draw_texts(reader, "tables", rng), rng)
    tables.dense("tables_dense", 0.5)
    found = tables.sparse("tables_975", TAUS["975"], probe="all").counts
    tables.sparse("tables_probed_975", TAUS["975"])
    named = {
        **{f"tau {tau}": kept[f"adaptive_{name}"] for name, tau in TAUS.items()},
        "tau 0.9, 128 probes": kept["probed_90"],
        "tables, tau 0.975": found,
    }
    share = {name: (counts.mean(axis=1) / own.n).tolist() for name, counts in named.items()}
    shown = {"layers": share, **shown}
    return {**own.results, **tables.results, "_figures": shown}


def figures(results: dict[str, Any], outdir: Path) -> None:
    """Writes the pictures of the page; drawing is in ``pictures.py``."""
    load_module(Path(__file__).with_name("pictures.py")).draw(results, outdir)
