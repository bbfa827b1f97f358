"""What `dyncomp bench generate` decodes, and the same in transformers."""

import functools
import importlib.util
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp import pretrained
from dyncomp.attention import Attention
from dyncomp.core.dtypes import DTypes
from dyncomp.experts import SwiGLU
from dyncomp.models import Block, DecoderLM, Group

STEPS, PAIRS = 4, 30
WARM_UP = 4
"""Calls before a measurement, at most."""


def available() -> bool:
    """Whether PyTorch, transformers and the real weights are here."""
    libraries = all(map(importlib.util.find_spec, ("torch", "transformers")))
    return libraries and pretrained.smollm2() is not None


def subject(dtype: Any, quick: bool) -> tuple[DecoderLM, Any]:
    """SmolLM2-135M and its variables; random ones of its shape without the file, tiny ones if ``quick``."""
    path = pretrained.smollm2()
    if path and not quick:
        loaded = pretrained.load(path, dtype=dtype)
        return loaded.model, loaded.variables
    d, depth, heads, vocab = (64, 4, 2, 256) if quick else (576, 30, 9, 49_152)
    mixer = functools.partial(Attention, heads=heads, kv_heads=heads // 3 or 1, rope_theta=1e5)
    ffn = functools.partial(SwiGLU, hidden=d * 8 // 3)
    block = functools.partial(Block, mixer=mixer, ffn=ffn, eps=1e-5)
    model = DecoderLM(
        vocab_size=vocab,
        d_model=d,
        groups=[Group([block], depth)],
        tie_embeddings=True,
        dtypes=DTypes(param=dtype, compute=dtype),
    )
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


def prompt_length(context: int) -> int:
    """So many tokens that all steps of a measurement end within ``context``."""
    return max(context - STEPS * (PAIRS + WARM_UP) - 1, 1)


def prompt(vocab: int, batch: int, length: int) -> np.ndarray:
    """Random token ids int32 [b t]."""
    return np.random.default_rng(0).integers(0, vocab, (batch, length)).astype(np.int32)


def _theirs(dtype: str) -> tuple[Any, Any]:
    """(torch, the same weights in transformers), on as many threads as there are cores."""
    import torch  # pyrefly: ignore
    from transformers import AutoModelForCausalLM  # pyrefly: ignore

    model, variables = subject(dtype, quick=False)
    with tempfile.TemporaryDirectory() as folder:
        pretrained.export(folder, model, variables["params"])
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return torch, theirs.eval()


def decoder(dtype: str, batch: int, context: int, steps: int) -> Callable[[], Any]:
    """A call that decodes ``steps`` tokens greedily behind the prompt, with a cache that grows."""
    torch, theirs = _theirs(dtype)
    ids = prompt(theirs.config.vocab_size, batch, prompt_length(context))
    with torch.no_grad():
        out = theirs(torch.from_numpy(ids).long(), use_cache=True)
    state = [out.logits[:, -1:].argmax(-1), out.past_key_values]

    def run() -> None:
        with torch.no_grad():
            for _ in range(steps):
                out = theirs(state[0], past_key_values=state[1], use_cache=True)
                state[:] = [out.logits[:, -1:].argmax(-1), out.past_key_values]

    return run


def prefiller(length: int) -> Callable[[], Any]:
    """A call that reads a prompt, fills a cache and gives the last token's logits."""
    torch, theirs = _theirs("float32")
    ids = torch.from_numpy(prompt(theirs.config.vocab_size, 1, length)).long()

    def run() -> None:
        with torch.no_grad():
            theirs(ids, use_cache=True, logits_to_keep=1)

    return run
