"""TokenSelect (arXiv 2411.02886) on SmolLM2-135M: which cached tokens a piece or a step reads, without training.

Needs the weights (``DYNCOMP_SMOLLM2``, see docs/pretrained.md); ``--quick`` does with a random model of bytes. A seed
draws the texts and pass keys. Three parts: whole texts read in pieces; texts followed token by token behind a densely
read prompt, by budget; questions about a pass key. Every arm of a part keeps as many tokens.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dyncomp import attention
from dyncomp.evidence.following import Follower, smollm2
from dyncomp.evidence.seed import load_module
from dyncomp.tasks.long_text import draw, passkey

TITLE = "TokenSelect: every step reads the tokens that its heads vote for"
COMPUTE = "read"
VOTES: dict[str, dict[str, Any]] = {
    "soft": {}, "scaled": {"vote": "scaled"}, "raw": {"vote": "raw"},
    "modulo": {"heads": "modulo"}, "recent": {"vote": "recent"}, "random": {"vote": "random"},
}  # fmt: skip
PIECES = {
    **{f"{vote}_a": (vote, 128) for vote in VOTES},
    **{f"{vote}_b": (vote, 64) for vote in ("soft", "modulo", "recent", "random")},
}
"""Arm -> vote, and positions of a piece; all keep 16 first, 128 selected and 128 newest tokens."""
BUDGETS = (32, 96, 224)
FOLLOWED = {f"{vote}_{n}": (vote, n) for vote in ("soft", "recent", "random") for n in BUDGETS}
REUSED = {"reuse_8": 0.8, "reuse_9": 0.9, "reuse_95": 0.95}
HITTERS = {"hitters_96": 96, "hitters_224": 224}
ASKED = {f"{vote}_asked": vote for vote in VOTES}
ARMS = ["dense", *PIECES, *FOLLOWED, *REUSED, *HITTERS, "places_96", *ASKED]
TRIALS = dict.fromkeys(ARMS, 1)  # nothing is tuned: shares of the list follow the released sizes
METRICS = {
    "nats": {"text": "nats a token of texts read in pieces, after token 512", "minimize": True},
    "followed": {"text": "nats a token of texts followed token by token", "minimize": True},
    "key": {"text": "nats a token of the pass key", "minimize": True},
    "read": {"text": "tokens that a query reads in a layer", "minimize": True},
    "scored": {"text": "keys scored in a layer and step", "minimize": True},
    "chosen": {"text": "share of steps that selected anew, mean over layers", "minimize": True},
}  # fmt: skip
LENGTH, SINCE, ROWS = 1024, 512, 4
PROMPT, NEW, TEXTS = 1024, 64, 6
SINK, LOCAL, KEY, QUESTION, KEYS = 16, 64, 1100, 24, 4


class Study:
    """The model and the texts of one seed."""

    def __init__(self, seed: int, quick: bool):
        model, variables, self.tokenizer = smollm2("token_select", quick)
        self.follower, self.short = Follower(model, variables), 8 if quick else 1
        self.rng = np.random.default_rng([2411, seed])
        self.new = 4 if quick else NEW

    def texts(self, length: int, rows: int) -> np.ndarray:
        """Half code, half prose."""
        kinds = ("code", "prose") * (rows // 2)
        return np.asarray([draw(self.tokenizer, kind, length, self.rng) for kind in kinds])  # type: ignore[arg-type]

    def policy(self, slots: int, **words: Any) -> Any:
        """A selection."""
        return attention.TokenSelection(slots, **words)


def pieces(study: Study) -> dict[str, dict[str, float]]:
    """Texts read in pieces that select by their mean query."""
    length, since = LENGTH // study.short, SINCE // study.short
    texts, follower, results = study.texts(length, ROWS), study.follower, {}
    nats = lambda nll: float(jnp.mean(nll[:, since:]))
    full = attention.FullCache(length)
    results["dense"] = {"nats": nats(follower.tell(follower.blank(full, ROWS), texts))}
    for name, (vote, chunk) in PIECES.items():
        sizes = {
            "sink": SINK // study.short,
            "top": 128 // study.short,
            "local": 128 // study.short,
        }
        policy = study.policy(length, chunk=chunk // study.short, **sizes, **VOTES[vote])
        nll = follower.tell(follower.blank(policy, ROWS), texts)
        results[name] = {"nats": nats(nll), "read": float(sum(sizes.values()))}
    return results


def followed(study: Study) -> tuple[dict[str, dict[str, float]], Any]:
    """Texts followed behind a prompt that every arm read densely; and what is shown of one arm."""
    prompt, follower = PROMPT // study.short, study.follower
    texts = study.texts(prompt + study.new + 1, TEXTS)
    slots, top = prompt + study.new, max(BUDGETS)
    base = {"sink": SINK // study.short, "top": top, "local": LOCAL // study.short}
    whole = follower.prefill(follower.blank(study.policy(slots, **base), TEXTS), texts[:, :prompt])
    told, results, shown = texts[:, prompt:], {}, None

    def run(name: str, state: Any) -> Any:
        found = follower.follow(state, told)
        results[name] = {
            "followed": float(jnp.mean(found.nll)), "read": found.pairs, "scored": found.scored,
        }  # fmt: skip
        return found.state

    run("dense", everything(whole))
    for name, (vote, budget) in FOLLOWED.items():
        state = run(name, under(whole, study.policy(slots, **base, **VOTES[vote]), budget))
        shown = state if name == "soft_96" else shown
    run("places_96", under(whole, study.policy(slots, **base, compact=False), 96))
    for name, reuse in REUSED.items():
        state = run(name, under(whole, study.policy(slots, **base, reuse=reuse), 96))
        results[name]["chosen"] = float(jnp.mean(state.selections)) / study.new
    for name, budget in HITTERS.items():
        kept = budget // study.short + base["sink"] + base["local"]
        policy = attention.HeavyHitters(slots, budget=kept, recent=base["local"])
        run(name, follower.prefill(follower.blank(policy, TEXTS), texts[:, :prompt]))
    return results, pictures(study, texts, shown)


def asked(study: Study) -> dict[str, dict[str, float]]:
    """Pass keys: the prompt is read densely, its question and the answer token by token."""
    length, follower = KEY // study.short, study.follower
    rows, prompts, answer = 1 if study.short > 1 else KEYS, [], 0
    length = max(length, 400) if study.short > 1 else length  # bytes are longer than tokens
    for _ in range(rows):
        half = [draw(study.tokenizer, kind, length // 2, study.rng) for kind in ("code", "prose")]
        ids, answer = passkey(study.tokenizer, half[0] + half[1], length, study.rng)
        prompts.append(ids)
    ids, cut = np.asarray(prompts), length - QUESTION
    sizes = {"sink": SINK, "top": 128, "local": 128}
    whole = follower.prefill(follower.blank(study.policy(length, **sizes), rows), ids[:, :cut])
    loss = lambda state: float(jnp.mean(follower.follow(state, ids[:, cut:]).nll[-answer:]))
    results = {"dense": {"key": loss(everything(whole))}}
    for name, vote in ASKED.items():
        policy = study.policy(length, **sizes, **VOTES[vote])
        results[name] = {"key": loss(under(whole, policy, 128))}
    return results


def under(state: Any, policy: Any, budget: int) -> Any:
    """A prompt's state under another policy and budget."""
    return dataclasses.replace(
        state,
        policy=policy,
        budget=jnp.full_like(state.budget, min(budget, state.chosen.shape[-1])),
    )


def everything(state: Any) -> Any:
    """Reads all: as many may be selected as there are."""
    policy = dataclasses.replace(state.policy, local=state.positions.shape[-1])
    return dataclasses.replace(state, policy=policy)


def run_seed(seed: int, quick: bool, workdir: Path) -> dict[str, Any]:
    """All arms of one seed; ``_figures`` holds what the pictures show."""
    study = Study(seed, quick)
    results = pieces(study)
    more, shown = followed(study)
    for part in (more, asked(study)):
        for name, own in part.items():
            results[name] = {**results.get(name, {}), **own}
    return {**results, "_figures": shown}


def pictures(study: Study, texts: np.ndarray, state: Any) -> dict[str, Any]:
    """Of the first text: in how many layers the last query selected each token."""
    chosen = np.asarray(state.chosen[:, 0])
    counts = np.zeros(texts.shape[1])
    for layer in chosen:
        counts[layer[layer < len(counts)]] += 1 / len(chosen)
    decode = lambda i: study.tokenizer.decode([int(i)]).encode("latin-1", "replace")
    parts = [decode(i) for i in texts[0]]
    spread = [float(v) for v, part in zip(counts, parts, strict=True) for _ in part]
    return {"text": list(b"".join(parts)), "selected": spread}


def figures(results: dict[str, Any], outdir: Path) -> None:
    """Writes the pictures of the page; drawing is in ``pictures.py``."""
    load_module(Path(__file__).with_name("pictures.py")).draw(results, outdir)
