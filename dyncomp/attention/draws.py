"""Random subsets and local shuffles of positions, drawn for each sequence, and rows moved by them."""

import jax
import jax.numpy as jnp

from dyncomp.core.typing import Array, Bool, Float, Int, Key


def example_keys(key: Key[Array, ""], count: int) -> Key[Array, "x"]:
    """A key for each example (or example and head) of a batch."""
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(count))


def random_subset(
    key: Key[Array, ""], real: Bool[Array, "x s"], size: int
) -> Int[Array, "x {size}"]:
    """``size`` distinct positions a row in ascending order, uniform over real ones, others only when these run out."""
    draw = lambda one, row: jnp.where(row, jax.random.uniform(one, row.shape), 2.0)
    chosen = jnp.argsort(jax.vmap(draw)(example_keys(key, len(real)), real), axis=1)[:, :size]
    return jnp.sort(chosen.astype(jnp.int32), axis=1)


def shuffled_order(
    key: Key[Array, ""], real: Bool[Array, "x t"], sigma: float
) -> Int[Array, "x t"]:
    """Positions sorted by ``i + sigma * noise``, those that are not real last."""
    place = jnp.arange(real.shape[1], dtype=jnp.float32)
    noise = lambda one, row: jnp.where(
        row, place + sigma * jax.random.normal(one, row.shape), jnp.inf
    )
    return jnp.argsort(jax.vmap(noise)(example_keys(key, len(real)), real), axis=1).astype(
        jnp.int32
    )


def inverse(order: Int[Array, "x s"]) -> Int[Array, "x s"]:
    """The place of each position in an order: ``inverse(order)[order[i]] = i``."""
    place = jnp.arange(order.shape[1], dtype=jnp.int32)
    turn = lambda row: jnp.zeros_like(place).at[row].set(place, unique_indices=True)
    return jax.vmap(turn)(order)


def take_rows(x: Float[Array, "x s g p"], index: Int[Array, "x m"]) -> Float[Array, "x m g p"]:
    """Rows of each sequence; ascending, distinct indices."""
    take = lambda one, rows: one.at[rows].get(unique_indices=True, indices_are_sorted=True)
    return jax.vmap(take)(x, index)


@jax.custom_vjp
def permuted(x: Float[Array, "x s g p"], order: Int[Array, "x s"], back: Array) -> Array:
    """``x[order]`` of each sequence; ``back`` is the inverse, so that gradients are gathered too, not scattered."""
    return jax.vmap(lambda one, rows: one[rows])(x, order)


def _permuted_forward(x, order, back):
    return permuted(x, order, back), (order, back)


def _permuted_backward(saved, cotangent):
    order, back = saved
    return permuted(cotangent, back, order), None, None


permuted.defvjp(_permuted_forward, _permuted_backward)
