"""Bodies of the Hopper kernels of gradients, which divide their work as the forward one does.

A block of threads owns a tile of 128 queries, or of 128 keys, and streams what its list names through shared memory.
Two products give weights and slopes, in registers; their products with what was streamed add up to gradients::

    owns    streams   scores = own x streamed^T   gradients of its own
    q, do   k, v      q k^T, do v^T               d_q += slopes k
    k, v    q, do     k q^T, v do^T               d_k += slopes q, d_v += weights do

Before its first step a tile of queries streams its outputs too: what slopes lose is the sum of outputs times `do`, less
the gradient of the log-sum-exp. The kernel of keys, which runs after, reads it.

Every sum has one order: results are the same from run to run.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dyncomp_kernels.sparse_attention.lists import blocks_of
from dyncomp_kernels.sparse_attention.mosaic_pieces import (
    COPIER,
    HALF,
    HALVES,
    KEYS,
    PART,
    REGISTERS,
    TILED,
    Plan,
    QueryTile,
    along,
    masked,
    ranked,
    start_of,
    taken,
)
from dyncomp_kernels.sparse_attention.scores import LOG2E, LOW

QUERY_STAGES, KEY_STAGES = 2, 4
"""Steps in flight: of the kernels that own queries and keys."""


class Task(NamedTuple):
    """What a block of threads does for one tile.

    Attributes:
      live: whether there is a tile.
      steps: int32, how many; 0 where there is none.
      load: of (warpgroup, memory for its rows of the two tiles, barrier), copies what it owns.
      copy: of (step, memory for what is streamed, barrier).
      place: of a step: where what it streams begins.
      weigh: of a warpgroup: a function of (place, scores, memory with the numbers of queries) to weights, and one of
        (weights, slopes, that memory) to slopes.
      store: of (sums, memory that copies start from).
      before: of (warpgroup, memory, barrier), copies what is streamed before the first step; None for nothing.
      count: of (warpgroup, that memory, own second tile, memory for the numbers), finds the numbers of own queries.
    """

    live: Any
    steps: Any
    load: Callable[..., None]
    copy: Callable[..., None]
    place: Callable[..., Any]
    weigh: Callable[..., Any]
    store: Callable[..., None]
    before: Callable[..., None] | None = None
    count: Callable[..., None] | None = None


def query_kernel(plan: Plan, order, index, q, out, d_out, lse, d_lse, k, v, *rest) -> None:
    """Gradient of the queries.

    Args:
      order, index, q, k, v: as `mosaic_forward.forward_kernel`; out, d_out: like q; lse, d_lse: float32 [b h t'].
      rest: marks of padding, as there; then d_q, like q, and numbers, float32 [b h 2 t'], written where a list holds
        something: log-sum-exp in base 2, and what slopes lose.
    """
    *marks, d_q, numbers = rest

    def task(turn) -> Task:
        tile = QueryTile.of(plan, turn, order, index)

        def load(part, first, second, barrier):
            head, rows = tile.half(part)
            slab = tile.batch, rows, head
            plgpu.copy_gmem_to_smem(q.at[slab], first, barrier)
            plgpu.copy_gmem_to_smem(d_out.at[slab], second, barrier)

        def copy(j, first, second, _, barrier):
            slab = tile.batch, plan.slab(tile.first_key(j)), tile.key_head
            plgpu.copy_gmem_to_smem(k.at[slab], first, barrier)
            plgpu.copy_gmem_to_smem(v.at[slab], second, barrier)

        def before(part, room, barrier):
            head, rows = tile.half(part)
            plgpu.copy_gmem_to_smem(out.at[tile.batch, rows, head], room, barrier)

        def count(part, outs, d_outs, told):
            head, rows = tile.half(part)
            base_two = taken(lse.at[tile.batch, head, rows], 0) * LOG2E
            products = outs[...].astype(jnp.float32) * d_outs[...].astype(jnp.float32)
            lost = jnp.sum(products, axis=1) - taken(d_lse.at[tile.batch, head, rows], 0)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            blind = base_two == -jnp.inf  # has weights of 0
            told[0] = jnp.where(blind, jnp.full_like(base_two, -LOW), base_two)
            told[1] = lost
            plgpu.commit_smem()
            for i in range(2):
                plgpu.copy_smem_to_gmem(told.at[i], numbers.at[tile.batch, head, i, rows])

        def weigh(part):
            def weight(key, scores, told):
                place = start_of(order) + tile.half(part)[1].start
                scores = masked(plan, scores, tile.batch, place, key, marks)
                return jnp.exp2(scores * plan.scale - along(taken(told.at[0], 0), scores, 0))

            def slope(weights, slopes, told):
                return weights * (slopes - along(taken(told.at[1], 0), slopes, 0))

            return weight, slope

        def store(sums, kept, part):
            head, rows = tile.half(part)
            _fill(kept, sums[0] * (1 / math.sqrt(plan.size.p)))
            plgpu.copy_smem_to_gmem(kept, d_q.at[tile.batch, rows, head])

        return Task(tile.live, tile.steps, load, copy, tile.first_key, weigh, store, before, count)

    _persistent(plan, plan.query_turns, task, plan.keys, QUERY_STAGES, 1, q.dtype)


def key_kernel(plan: Plan, order, index, count, q, d_out, numbers, k, v, *rest) -> None:
    """Gradients of keys and values, of every part of the queries (`Plan.parts`).

    Args:
      order: blocks of keys [b*g*y], by the lengths of the lists of all groups (`mosaic_gpu.by_length`).
      index, count: [w a y x] and [w a y], the transposed lists.
      q, d_out, k, v: as `query_kernel`; numbers: as it writes.
      rest: marks of padding; then d_k, d_v, like k, of each part.
    """
    *marks, d_k, d_v = rest
    size = plan.size
    groups, tiles, parts = size.u // size.g, size.columns // KEYS, plan.parts
    share = plan.halves // parts

    def task(turn) -> Task:
        rank, live = plan.dealt(turn, plan.key_items)
        place, length = ranked(order, lax.div(rank, tiles * parts), groups * size.x)
        tile, part = lax.rem(lax.div(rank, parts), tiles), lax.rem(rank, parts)
        row, block = lax.div(place, size.y), lax.rem(place, size.y)
        batch, head = lax.div(row, size.g), lax.rem(row, size.g)
        begin = pl.multiple_of(block * size.columns + tile * KEYS, KEYS)

        def queries(j):
            """Head of the queries that step ``j`` reads, and which they are."""
            group, own = head * groups, lax.div(j, share)
            if size.a > size.g:
                later = jnp.int32(0)
                for other in range(groups - 1):  # whose list holds the entry
                    own_count = count[*plan.list_of(batch, head * groups + other), block]
                    past = (own >= own_count) & (later == other)
                    own, later = (
                        jnp.where(past, own - own_count, own),
                        jnp.where(past, later + 1, later),
                    )
                group = group + later
            entry = index[*plan.list_of(batch, group), block, own]
            return plan.half(group, entry, part * share + lax.rem(j, share))

        def load(half, first, second, barrier):
            slab = batch, pl.ds(begin + half * HALF, HALF), head
            plgpu.copy_gmem_to_smem(k.at[slab], first, barrier)
            plgpu.copy_gmem_to_smem(v.at[slab], second, barrier)

        def copy(j, first, second, told, barrier):
            own, rows = queries(j)
            slab = batch, rows, own
            plgpu.copy_gmem_to_smem(q.at[slab], first, barrier)
            plgpu.copy_gmem_to_smem(d_out.at[slab], second, barrier)
            for i in range(2):
                plgpu.copy_gmem_to_smem(numbers.at[batch, own, i, rows], told.at[i], barrier)

        def weigh(half):
            def weight(at, scores, told):
                key = begin + half * HALF
                scores = masked(plan, scores, batch, start_of(order) + at, key, marks, axis=0)
                return jnp.exp2(scores * plan.scale - along(taken(told.at[0], 1), scores, 1))

            def slope(weights, slopes, told):
                return weights * (slopes - along(taken(told.at[1], 1), slopes, 1))

            return weight, slope

        def store(sums, kept, half):
            rows = part, batch, pl.ds(begin + half * HALF, HALF), head
            _fill(kept, sums[0] * (1 / math.sqrt(size.p)))
            plgpu.copy_smem_to_gmem(kept, d_k.at[rows])
            _fill(kept, sums[1])
            plgpu.copy_smem_to_gmem(kept, d_v.at[rows])

        steps = jnp.where(live, length * share, 0)
        return Task(live, steps, load, copy, lambda j: queries(j)[1].start, weigh, store)

    _persistent(plan, blocks_of(plan.key_items, plan.sms), task, HALF, KEY_STAGES, 2, q.dtype)


def _fill(kept, total) -> None:
    """Puts ``total`` where a copy starts from, once the copy before has read."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    kept[...] = total.astype(kept.dtype)
    plgpu.commit_smem()


def _half(tile, part):
    """A warpgroup's rows of a tile."""
    return tile.at[pl.ds(part * HALF, HALF)]


def _persistent(plan: Plan, turns: int, task, columns: int, stages: int, sums: int, dtype) -> None:
    """Runs the block's share of the tiles: steps stream tiles of so many ``columns``, ``sums`` are of p columns."""
    streamed = sums == 2  # queries, with their numbers
    lead = 0 if streamed else 1  # stages that outputs take

    def roles(own, flow, told, kept, own_full, own_free, full, first_free, second_free, turn):
        stage = lambda step: lax.rem(step, stages)

        def meet():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def copies():
            plgpu.set_max_registers(REGISTERS[1], action="decrease")

            def fill(i, carry):
                begun, owned = carry
                do = task(i)
                ahead = jnp.minimum(stages - 2, do.steps - 1)  # steps copied before

                def room(turn):
                    at = stage(turn)

                    @pl.when(turn >= stages)
                    def _():
                        plgpu.barrier_wait(first_free.at[at])
                        plgpu.barrier_wait(second_free.at[at])

                    return at

                @pl.when(do.steps > 0)
                def _():
                    if do.before:
                        at = room(begun)
                        for part in range(HALVES):
                            do.before(part, _half(flow.at[at, 0], part), full.at[at])

                begun = begun + jnp.where(do.steps > 0, lead, 0)

                def step(j, _):
                    at = room(begun + j)
                    do.copy(j, flow.at[at, 0], flow.at[at, 1], told.at[at], full.at[at])

                    @pl.when(j == ahead)
                    def _():
                        for part in range(HALVES):
                            pl.when(owned > 0)(
                                lambda part=part: plgpu.barrier_wait(own_free.at[part])
                            )
                            do.load(part, own.at[0, part], own.at[1, part], own_full.at[part])

                lax.fori_loop(0, do.steps, step, None)
                return begun + do.steps, owned + jnp.where(do.steps > 0, 1, 0)

            begun, owned = lax.fori_loop(0, turns, fill, (jnp.int32(0), jnp.int32(0)))

            def drain(j, _):
                plgpu.barrier_wait(first_free.at[stage(j)])
                plgpu.barrier_wait(second_free.at[stage(j)])

            lax.fori_loop(jnp.maximum(begun - stages, 0), begun, drain, None)
            for part in range(HALVES):
                pl.when(owned > 0)(lambda part=part: plgpu.barrier_wait(own_free.at[part]))

        def products():
            plgpu.set_max_registers(REGISTERS[0], action="increase")
            part = lax.axis_index(PART)
            some = task(0).steps > 0
            pl.when((part == 1) & some)(meet)

            def release(step):
                plgpu.barrier_arrive(first_free.at[stage(step)])
                if streamed:
                    plgpu.barrier_arrive(second_free.at[stage(step)])

            def prepare(do, turn):
                if do.count is None:
                    plgpu.barrier_wait(own_full.at[part])
                    return
                # A turn more: the other warpgroup may still be at the last step, whose stage the first one needs.
                pl.when(part == 0)(meet)
                at = stage(turn)
                plgpu.barrier_wait(own_full.at[part])
                plgpu.barrier_wait(full.at[at])
                do.count(part, _half(flow.at[at, 0], part), own.at[1, part], told.at[part])
                plgpu.barrier_arrive(first_free.at[at])
                plgpu.barrier_arrive(second_free.at[at])
                pl.when(part == 1)(meet)

            def add(i, begun):
                do = task(i)
                pl.when(do.steps > 0)(lambda: prepare(do, begun))
                begun = begun + jnp.where(do.steps > 0, lead, 0)
                weight, slope = do.weigh(part)

                def steps(*totals):
                    def step(j, _):
                        at, place = stage(begun + j), do.place(j)
                        first, second = flow.at[at, 0], flow.at[at, 1]
                        numbers = told.at[at if streamed else part]
                        plgpu.barrier_wait(full.at[at])

                        def both(scores, slopes):
                            plgpu.wgmma(scores, own.at[0, part], first.transpose((1, 0)))
                            plgpu.wgmma(slopes, own.at[1, part], second.transpose((1, 0)))
                            meet()
                            found = plgpu.wgmma_accumulator_load(scores, wait_n=1)
                            if streamed:  # what the step before added is done too
                                pl.when(j > 0)(lambda: release(begun + j - 1))
                            weights = weight(place, found, numbers)
                            sloped = slope(weights, slopes[...], numbers)
                            return weights.astype(dtype), sloped.astype(dtype)

                        acc = plgpu.ACC((HALF, columns))
                        weights, slopes = pl.run_scoped(both, acc, acc)
                        if not streamed:
                            plgpu.barrier_arrive(second_free.at[at])

                        if streamed:
                            plgpu.commit_smem()  # numbers are read before copies write there
                        meet()
                        plgpu.wgmma(totals[0], slopes, first)
                        if streamed:
                            plgpu.wgmma(totals[1], weights, second)
                        if not streamed:  # of two stages, the copies need theirs at once
                            plgpu.wgmma_wait(0)
                            release(begun + j)

                    lax.fori_loop(0, do.steps, step, None)
                    pl.when(do.steps > 0)(lambda: plgpu.barrier_arrive(own_free.at[part]))
                    found = tuple(total[...] for total in totals)
                    if streamed:
                        pl.when(do.steps > 0)(lambda: release(begun + do.steps - 1))
                    return found

                found = pl.run_scoped(steps, *[plgpu.ACC((HALF, plan.size.p))] * sums)
                pl.when(do.live)(lambda: do.store(found, kept.at[part], part))
                return begun + do.steps

            lax.fori_loop(0, turns, add, jnp.int32(0))
            pl.when((part == 0) & some)(meet)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        lax.cond(lax.axis_index(PART) == COPIER, copies, products)

    tile = lambda *shape: plgpu.SMEM((*shape, plan.size.p), dtype, transforms=TILED)
    free = plgpu.Barrier(num_arrivals=HALVES, num_barriers=stages)
    pl.run_scoped(
        roles,
        tile(2, HALVES, HALF),
        tile(stages, 2, columns),
        plgpu.SMEM((max(stages, HALVES), 2, HALF), jnp.float32),
        tile(HALVES, HALF),
        plgpu.Barrier(num_arrivals=2, num_barriers=HALVES),
        plgpu.Barrier(num_barriers=HALVES),
        plgpu.Barrier(num_arrivals=4 if streamed else 2, num_barriers=stages),
        free,
        free,
        plgpu.Barrier(num_arrivals=HALVES),
        collective_axes=PART,
    )
