"""JAX's persistent compile cache, on by default."""

import jax

from dyncomp.tasks.cache import cache_root


def enable(minimum_seconds: float = 0.5) -> None:
    """Keeps compiled programs under the cache folder, unless the user has named a folder already."""
    if not jax.config.jax_compilation_cache_dir:  # pyrefly: ignore
        jax.config.update("jax_compilation_cache_dir", str(cache_root() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", minimum_seconds)
