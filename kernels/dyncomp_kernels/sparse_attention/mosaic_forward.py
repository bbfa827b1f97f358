"""Body of the Hopper forward kernel: persistent blocks of three warpgroups take tiles of 128 queries in turn.

::

    a tile of queries               the third warpgroup reads the list and copies (TMA) what coming steps read, also
    |  warpgroup 0: rows  0 ..  63  |       those of the next tile; the two others multiply (wgmma) in turn: while one
    |  warpgroup 1: rows 64 .. 127  |       is at its products, the other is at its softmax

A step is a tile of keys of a listed block. Scores are kept in base 2; only tiles that hold a pair that may not be seen
are masked.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dyncomp_kernels.sparse_attention.mosaic_pieces import (
    COPIER,
    HALF,
    HALVES,
    PART,
    REGISTERS,
    TILED,
    Plan,
    QueryTile,
    along,
    by_rows,
    masked,
    start_of,
    zeros,
)
from dyncomp_kernels.sparse_attention.scores import LOG2E, LOW

STAGES, QUEUE = 2, 2
"""Tiles of keys and of queries that are in shared memory."""


def forward_kernel(plan: Plan, order, index, q, k, v, *rest) -> None:
    """Blocks of queries in descending length, dealt to the blocks of threads to and fro.

    Args:
      order: the blocks of queries [b*u*x] (`mosaic_gpu.by_length`); index: [w a x m].
      q: [b t' h p]; k, v: [b s' g p]; rest: marks of padding (`mosaic_pieces.masked`); then out, like q, and lse
        [b h t'].
    """
    *marks, out, lse = rest
    size, dtype, turns = plan.size, q.dtype, plan.query_turns
    tile_of = lambda i: QueryTile.of(plan, i, order, index)

    def roles(
        queries, keys, values, kept, sums, q_full, k_full, v_full, q_free, k_free, v_free, turn
    ):
        stage, queue = (lambda step: lax.rem(step, STAGES)), (lambda tile: lax.rem(tile, QUEUE))
        none = jnp.int32(0), jnp.int32(0)

        def copies():
            plgpu.set_max_registers(REGISTERS[1], action="decrease")

            def fill(i, carry):
                begun, asked = carry
                own = tile_of(i)

                def step(j, first):
                    at, again = stage(begun + j), begun + j >= STAGES
                    slab = own.batch, plan.slab(first), own.key_head
                    pl.when(again)(lambda: plgpu.barrier_wait(k_free.at[at]))
                    plgpu.copy_gmem_to_smem(k.at[slab], keys.at[at], k_full.at[at])

                    @pl.when(j == 0)
                    def _():
                        room = queue(asked)
                        pl.when(asked >= QUEUE)(lambda: plgpu.barrier_wait(q_free.at[room]))
                        for part in range(HALVES):
                            head, rows = own.half(part)
                            barrier = q_full.at[room * HALVES + part]
                            taken = q.at[own.batch, rows, head]
                            plgpu.copy_gmem_to_smem(taken, queries.at[room, part], barrier)

                    after = own.first_key(j + 1)
                    pl.when(again)(lambda: plgpu.barrier_wait(v_free.at[at]))
                    plgpu.copy_gmem_to_smem(v.at[slab], values.at[at], v_full.at[at])
                    return after

                lax.fori_loop(0, own.steps, step, own.first_key(0))
                return begun + own.steps, asked + jnp.where(own.steps > 0, 1, 0)

            begun, asked = lax.fori_loop(0, turns, fill, none)

            def drain(j, _):
                plgpu.barrier_wait(k_free.at[stage(j)])
                plgpu.barrier_wait(v_free.at[stage(j)])

            lax.fori_loop(jnp.maximum(begun - STAGES, 0), begun, drain, None)
            drain = lambda j, _: plgpu.barrier_wait(q_free.at[queue(j)])
            lax.fori_loop(jnp.maximum(asked - QUEUE, 0), asked, drain, None)

        def products():
            plgpu.set_max_registers(REGISTERS[0], action="increase")
            part = lax.axis_index(PART)

            def meet():
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            def attend(i, carry):
                begun, asked = carry
                own = tile_of(i)
                head, rows = own.half(part)
                place, room = start_of(order) + rows.start, queue(asked)
                mine = queries.at[room, part]
                pl.when(own.steps > 0)(lambda: plgpu.barrier_wait(q_full.at[room * HALVES + part]))

                def step(j, state):
                    top, total, mixed, first = state
                    at = stage(begun + j)
                    plgpu.barrier_wait(k_full.at[at])

                    def score(acc):
                        plgpu.wgmma(acc, mine, keys.at[at].transpose((1, 0)))
                        meet()
                        return acc[...]

                    after = own.first_key(j + 1)
                    scores = pl.run_scoped(score, plgpu.ACC((HALF, plan.keys)))
                    plgpu.barrier_arrive(k_free.at[at])
                    pl.when(j == own.steps - 1)(lambda: plgpu.barrier_arrive(q_free.at[room]))
                    scores = masked(plan, scores, own.batch, place, first, marks)
                    before, top = top, jnp.maximum(top, jnp.max(scores, axis=1) * plan.scale)
                    weights = jnp.exp2(scores * plan.scale - along(top, scores, 0))
                    shrink = jnp.exp2(before - top)
                    total = total * shrink + jnp.sum(weights, axis=1)
                    weights = weights.astype(dtype)
                    plgpu.barrier_arrive(turn)
                    plgpu.barrier_wait(v_full.at[at])
                    plgpu.barrier_wait(turn)

                    def mix(acc):
                        plgpu.wgmma(acc, weights, values.at[at])
                        return acc[...]

                    added = pl.run_scoped(mix, plgpu.ACC((HALF, size.p)))
                    plgpu.barrier_arrive(v_free.at[at])
                    return top, total, mixed * along(shrink, mixed, 0) + added, after

                blank = by_rows(LOW), by_rows(0.0), zeros(size.p), own.first_key(0)
                top, total, mixed, _ = lax.fori_loop(0, own.steps, step, blank)
                blind = total == 0
                total = jnp.where(blind, jnp.ones_like(total), total)
                number = top * (1 / LOG2E) + jnp.log(total)

                @pl.when(own.live)
                def _():
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    kept.at[part][...] = (mixed * along(1 / total, mixed, 0)).astype(dtype)
                    sums.at[part][...] = jnp.where(blind, jnp.full_like(number, -jnp.inf), number)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(kept.at[part], out.at[own.batch, rows, head])
                    plgpu.copy_smem_to_gmem(sums.at[part], lse.at[own.batch, head, rows])

                return begun + own.steps, asked + jnp.where(own.steps > 0, 1, 0)

            some = tile_of(0).steps > 0
            pl.when((part == 1) & some)(meet)
            lax.fori_loop(0, turns, attend, none)
            pl.when((part == 0) & some)(meet)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        lax.cond(lax.axis_index(PART) == COPIER, copies, products)

    tile = lambda *shape: plgpu.SMEM((*shape, size.p), dtype, transforms=TILED)
    full = lambda count: plgpu.Barrier(num_barriers=count)
    free = lambda count: plgpu.Barrier(num_arrivals=HALVES, num_barriers=count)
    pl.run_scoped(
        roles,
        tile(QUEUE, HALVES, HALF),
        tile(STAGES, plan.keys),
        tile(STAGES, plan.keys),
        tile(HALVES, HALF),
        plgpu.SMEM((HALVES, HALF), jnp.float32),
        *(full(QUEUE * HALVES), full(STAGES), full(STAGES)),
        *(free(QUEUE), free(STAGES), free(STAGES)),
        free(1),
        collective_axes=PART,
    )
