"""Random keys as pure functions of (seed, step, name)."""

import zlib

import jax

from dyncomp.core.typing import Array, Int, Key


def fold(seed: Int[Array, ""] | int, step: Int[Array, ""] | int, name: str) -> Key[Array, ""]:
    """``fold_in(fold_in(key(seed), step), crc32(name))``; the same on every process and resume."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def streams(
    seed, step, names: tuple[str, ...] = ("router", "dropout")
) -> dict[str, Key[Array, ""]]:
    """The Linen random streams of one step."""
    return {name: fold(seed, step, name) for name in names}
