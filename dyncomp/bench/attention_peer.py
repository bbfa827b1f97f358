"""What `dyncomp bench attention` is measured against in PyTorch."""

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np


def available() -> bool:
    """Whether PyTorch is installed."""
    return importlib.util.find_spec("torch") is not None


def sdpa(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> Callable[[], Any]:
    """Causal attention; [b t h p] as given."""
    import torch  # pyrefly: ignore

    first, keys, values = (torch.from_numpy(x.swapaxes(1, 2).copy()) for x in (q, k, v))
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(first, keys, values, is_causal=True, enable_gqa=True)


def flex(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, blocks: np.ndarray, tile: int
) -> Callable[[], Any]:
    """``flex_attention``, compiled, causal within listed blocks: ``blocks`` bool [1 g x y]."""
    import torch  # pyrefly: ignore
    from torch.nn.attention.flex_attention import BlockMask, flex_attention  # pyrefly: ignore

    first, keys, values = (torch.from_numpy(x.swapaxes(1, 2).copy()) for x in (q, k, v))
    heads = np.repeat(blocks, q.shape[2] // k.shape[2], axis=1)
    order = np.argsort(~heads, axis=-1, kind="stable").astype(np.int32)
    count = heads.sum(-1).astype(np.int32)
    mask = BlockMask.from_kv_blocks(
        torch.from_numpy(count),
        torch.from_numpy(order),
        BLOCK_SIZE=tile,
        mask_mod=lambda b, h, i, j: i >= j,
        seq_lengths=(q.shape[1], k.shape[1]),
    )
    call = torch.compile(flex_attention)
    run = lambda: call(first, keys, values, block_mask=mask, enable_gqa=True)

    def without_gradients() -> Any:
        with torch.no_grad():
            return run()

    return without_gradients
