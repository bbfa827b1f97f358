"""Whole models on one NVIDIA GPU: ``python docs/bench/models_gpu.py [PART ...] [--small]``; prints JSON last.

Parts: ``attention`` (cuDNN's kernel in the layer against float32), ``train`` (a dense model of a billion parameters:
share of the GPU's arithmetic), ``experts`` (train steps of mixtures at that width against a dense network of equal
active FLOPs), ``decode`` (share of the memory's speed), ``exits`` (the host executor at batch 256). Needs jax for CUDA,
flax and optax. ``--small`` runs tiny sizes anywhere.
"""

import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from flax import linen as nn  # noqa: E402
from gpu_card import card, copy_rate, seconds  # noqa: E402

from dyncomp.attention import Attention  # noqa: E402
from dyncomp.bench import exits  # noqa: E402
from dyncomp.core.dtypes import DTypes  # noqa: E402
from dyncomp.core.ledger import Ledger  # noqa: E402
from dyncomp.decoding import FullDepth, Generator  # noqa: E402
from dyncomp.experts import HopperSwiGLUBank, MoE, SwiGLU, SwiGLUBank  # noqa: E402
from dyncomp.models import Block, DecoderLM, Group  # noqa: E402
from dyncomp.routers import TopK, TopP  # noqa: E402
from dyncomp.tasks.objectives import LMObjective  # noqa: E402


def language_model(ffn: Any, depth: int, small: bool, remat: str = "none", **dtypes: str) -> Any:
    """d 2048, 32 heads of 64 on 8 key/value heads, 32,768 tokens of vocabulary, tied."""
    d, heads, vocab = (64, 4, 256) if small else (2048, 32, 32_768)
    mixer = functools.partial(Attention, heads=heads, kv_heads=heads // 4, rope_theta=5e5)
    block = functools.partial(Block, mixer=mixer, ffn=ffn)
    kept = DTypes(**{"param": "float32", "compute": "bfloat16", **dtypes})
    return DecoderLM(
        vocab_size=vocab, d_model=d, groups=[Group([block], depth)], tie_embeddings=True,
        remat=remat, dtypes=kept,
    )  # fmt: skip


def train_steps(model: Any, batch: int, length: int) -> dict[str, Any]:
    """Seconds of a train step (AdamW, float32 parameters) and the FLOPs that its plan needs: three forward passes."""
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (batch, length + 1), np.int32)
    inputs, targets = jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])
    data = {"targets": targets, "mask": jnp.ones((batch, length), jnp.float32)}
    objective, tx = LMObjective(), optax.adamw(1e-4)
    keys = {name: jax.random.key(i) for i, name in enumerate(("router", "dropout"))}

    def loss(params: Any, controls: Any) -> Any:
        variables = {"params": params, "controls": controls}
        (output, aux), _ = model.apply(
            variables, inputs, train=True, rngs=keys, mutable=["controls"]
        )
        return objective(output, aux, data, jnp.int32(0))[0], aux.events

    def step(params: Any, state: Any, controls: Any) -> Any:
        grads, events = jax.grad(loss, has_aux=True)(params, controls)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, events

    start = jax.jit(lambda key: nn.meta.unbox(model.init(key, inputs[:1, :8])))(jax.random.key(0))
    controls = start.get("controls", {})
    held = [start["params"], jax.jit(tx.init)(start["params"])]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(held[0]))
    run, last = jax.jit(step, donate_argnums=(0, 1)), []

    def call() -> Any:
        held[0], held[1], last[:] = *(out := run(*held, controls))[:2], [out[2]]
        return last[0]

    taken = seconds(call)
    ledger = Ledger(model.cost((batch, length))).record(jax.device_get(last[0]))
    return {
        "seconds": taken,
        "tokens_a_second": batch * length / taken,
        "flops": 3 * ledger.total("needed"),
        "parameters": parameters,
    }


def attention(small: bool, _: float | None) -> dict[str, float]:
    """The layer in bfloat16 (cuDNN's kernel, where it serves) against float32 in plain form: largest differences."""
    x = jax.random.normal(jax.random.key(0), (2, 100 if small else 1000, 512), jnp.bfloat16)
    layer = lambda dtype: Attention(heads=8, kv_heads=2, dtypes=DTypes(compute=dtype))
    variables = nn.meta.unbox(layer("float32").init(jax.random.key(1), x[:, :4]))
    both = []
    for dtype in ("bfloat16", "float32"):
        own = x.astype(dtype)
        out = lambda v, own=own, dtype=dtype: layer(dtype).apply(v, own)[0].astype(jnp.float32)
        with jax.default_matmul_precision("highest"):
            grads = jax.jit(jax.grad(lambda v, out=out: jnp.sum(jnp.sin(out(v)))))(variables)
            both.append(jax.device_get((jax.jit(out)(variables), grads)))
    apart = lambda a, b: float(np.abs(a - b).max() / np.abs(b).max())
    (ours, grads), (exact, wanted) = both
    found = [
        apart(*pair) for pair in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True)
    ]
    return {"outputs": apart(ours, exact), "gradients": max(found)}


def train(small: bool, peak: float | None) -> list[dict[str, Any]]:
    """Share of the arithmetic: needed FLOPs / seconds / peak."""
    found = []
    for remat, batch in (("none", 4), ("dots", 8)):
        ffn = functools.partial(SwiGLU, hidden=128 if small else 8192)
        model = language_model(ffn, 2 if small else 16, small, remat)
        one = train_steps(model, batch, 64 if small else 2048)
        share = None if peak is None else one["flops"] / one["seconds"] / peak
        found.append({"remat": remat, "batch": batch, **one, "mfu": share})
    return found


def experts(small: bool, _: float | None) -> list[dict[str, Any]]:
    """Train steps of four layers, eight experts each: (seconds dense / seconds) / (FLOPs dense / FLOPs needed)."""
    hidden, batch, length = (32, 2, 64) if small else (4096, 8, 2048)
    bank = SwiGLUBank if small else HopperSwiGLUBank
    moe = functools.partial(MoE, num_experts=8, hidden=hidden, bank=bank)
    top2 = functools.partial(TopK, k=2)
    free = functools.partial(TopK, k=2, residual=True, logit_std=1.0, null_experts=1)
    kinds = ("constant", "constant", "copy", "zero")
    forms: dict[str, Any] = {
        "dense": functools.partial(SwiGLU, hidden=2 * hidden),
        "moe, two of eight": functools.partial(moe, router=top2),
        "moe++, four free experts": functools.partial(moe, router=free, free=kinds, free_weight=0.75),
        "top-p, p 0.4": functools.partial(moe, router=functools.partial(TopP, p=0.4, max_p=0.5)),
    }  # fmt: skip
    found: list[dict[str, Any]] = []
    for name, ffn in forms.items():
        one = {"form": name, **train_steps(language_model(ffn, 4, small), batch, length)}
        dense = found[0] if found else one
        saved = dense["flops"] / one["flops"]
        found.append({**one, "realised": dense["seconds"] / one["seconds"] / saved})
    return found


def decode(small: bool, _: float | None) -> list[dict[str, Any]]:
    """(bytes of weights and cache / measured bandwidth) / seconds of a step, greedy, bfloat16."""
    rate, found = copy_rate(small), []
    ffn = functools.partial(SwiGLU, hidden=128 if small else 8192)
    model = language_model(ffn, 2 if small else 16, small, param="bfloat16")
    start = jax.jit(lambda key: nn.meta.unbox(model.init(key, jnp.zeros((1, 8), jnp.int32))))
    generator = Generator(model, start(jax.random.key(0)), FullDepth())
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(generator.variables))
    for batch, context in ((1, 1024), (1, 4096), (16, 1024), (16, 4096)):
        context = context // 8 if small else context
        length = context - 64
        tokens = np.random.default_rng(0).integers(0, model.vocab_size, (batch, length), np.int32)
        key, mask = jax.random.key(0), np.ones(tokens.shape, bool)
        state = [generator._prefill(generator.variables, tokens, mask, context, None, key)[0]]

        def step(state: Any = state, key: Any = key) -> Any:
            state[0], *rest = generator._step(generator.variables, state[0], None, key)
            return rest[0]

        taken = seconds(step, 7, 7)
        shapes = jax.eval_shape(functools.partial(model.init_cache, batch, context))
        cache = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
        found.append(
            {"batch": batch, "context": context, "seconds": taken, "tokens_a_second": batch / taken,
             "share": (weights + cache) / rate / taken, "bandwidth": rate}
        )  # fmt: skip
    return found


def leaving(small: bool, _: float | None) -> list[dict[str, Any]]:
    """`dyncomp bench exits` at batch 256, by confidence: a network of milliseconds, and one of a ViT-L's width."""
    exits.SIZES["large"] = exits.Size(1024, 6, 16, 4096, 2)
    sizes, batch, pairs = (("laptop",), 16, 4) if small else (("wide", "large"), 256, 20)
    return [exits._row(size, "confidence", batch, pairs) for size in sizes]


PARTS = {
    "attention": attention,
    "train": train,
    "experts": experts,
    "decode": decode,
    "exits": leaving,
}


def main() -> None:
    """All parts, or those that were named."""
    small = "--small" in sys.argv
    named = [part for part in sys.argv[1:] if part != "--small"] or list(PARTS)
    about = card()
    result: dict[str, Any] = {"models": True, **about}
    for part in named:
        begin = time.perf_counter()
        try:
            result[part] = PARTS[part](small, about["peak"])
        except Exception as error:  # one part's failure keeps the others' figures
            result[part] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        print(f"{part}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
