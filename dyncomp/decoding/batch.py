"""Prompts of different lengths as one array, and the sizes that are compiled for."""

from collections.abc import Sequence

import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Bool, Int

BUCKETS = (16, 64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
"""Padded lengths of prompts and slots of caches: one compilation each. Longer ones are multiples of the last."""


def bucket(length: int, limit: int | None = None) -> int:
    """The smallest bucket that holds ``length``; ``limit`` where that is smaller and holds it too."""
    size = next((size for size in BUCKETS if length <= size), 0)
    return capped(size or -(-length // BUCKETS[-1]) * BUCKETS[-1], length, limit)


def capped(size: int, length: int, limit: int | None) -> int:
    """``size``, or as much as ``length`` and ``limit`` leave of it: a model refuses padding past its own limit."""
    return size if limit is None else max(length, min(size, limit))


def pad_left(
    prompts: Sequence[Sequence[int]], vocab_size: int, limit: int | None = None
) -> tuple[Int[np.ndarray, "b t"], Bool[np.ndarray, "b t"]]:
    """Token ids int32 and which are real; padding stands in front, so that all sequences end in the last column.

    Args:
      limit: most tokens that the model reads, padding included.

    Raises:
      DyncompError: no prompt, an empty one, or an id outside the vocabulary.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise DyncompError("every prompt needs at least one token")
    length = bucket(max(map(len, prompts)), limit)
    tokens = np.zeros((len(prompts), length), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, prompt in enumerate(prompts):
        ids = np.asarray(prompt)
        if ids.min() < 0 or ids.max() >= vocab_size:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise DyncompError(
                f"prompt {row}: token id {wrong} is not in a vocabulary of {vocab_size}; use the model's tokenizer"
            )
        tokens[row, length - len(ids) :], mask[row, length - len(ids) :] = ids, True
    return tokens, mask
