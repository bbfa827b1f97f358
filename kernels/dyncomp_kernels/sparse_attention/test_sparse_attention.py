"""Listed attention against the masked dense definition in float64."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp_kernels.sparse_attention.api import merged, sparse_attention
from dyncomp_kernels.sparse_attention.lists import (
    BlockLists,
    a_shape_lists,
    blocks_of,
    causal_lists,
    check_lists,
    lists_of,
    table_of,
    transposed,
)
from dyncomp_kernels.sparse_attention.reference import sparse_attention_reference

B, P = 2, 8


def drawn(t, s, h, g, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    return [
        rng.normal(size=shape).astype(dtype) for shape in ((B, t, h, P), (B, s, g, P), (B, s, g, P))
    ]


def random_lists(t, s, a, rows, columns, density=0.5, seed=1, batch=B):
    """Random tables with an empty and a full row."""
    x, y = blocks_of(t, rows), blocks_of(s, columns)
    table = np.random.default_rng(seed).random((batch, a, x, y)) < density
    table[:, :, 0] = True
    table[:, :, -1] &= x == 1
    return lists_of(jnp.asarray(table), rows, columns)


@functools.lru_cache
def compiled(causal, grad=False):
    def loss(q, k, v, lists, offset, real, d_out, d_lse):
        out, lse = sparse_attention(q, k, v, lists, causal=causal, offset=offset, real=real)
        return jnp.sum(out * d_out) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0) * d_lse)

    call = lambda q, k, v, lists, offset, real: sparse_attention(
        q, k, v, lists, causal=causal, offset=offset, real=real
    )
    return jax.jit(jax.grad(loss, (0, 1, 2)) if grad else call)


def truth(q, k, v, lists, causal, offset, real):
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in (q, k, v)]
        return [np.asarray(x) for x in sparse_attention_reference(
            *wide, lists, causal=causal, offset=offset, real=real)]  # fmt: skip


CASES = [
    # t, s, h, g, a, rows, columns, causal, padding
    (16, 16, 4, 2, 1, 4, 4, True, False),
    (16, 16, 4, 2, 2, 4, 4, True, True),
    (16, 16, 4, 2, 4, 4, 8, True, False),
    (19, 23, 6, 2, 2, 5, 7, True, True),
    (19, 23, 6, 6, 1, 5, 7, False, False),
    (3, 30, 4, 1, 4, 8, 16, True, False),
    (7, 5, 2, 2, 2, 4, 16, False, True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_definition(case):
    t, s, h, g, a, rows, columns, causal, padded = case
    q, k, v = drawn(t, s, h, g)
    lists = random_lists(t, s, a, rows, columns)
    check_lists(lists, t, s)
    real = jnp.asarray(np.random.default_rng(3).random((B, s)) < 0.7) if padded else None
    offset = max(s - t, 0)
    half = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    out, lse = compiled(causal)(*half, lists, offset, real)
    want, want_lse = truth(q, k, v, lists, causal, offset, real)
    np.testing.assert_allclose(out, want, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, atol=2e-6)
    blind = ~np.isfinite(want_lse)
    assert not np.asarray(out)[blind].any()


@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[4]], ids=str)
def test_gradients_equal_those_of_the_definition(case):
    t, s, h, g, a, rows, columns, causal, padded = case
    q, k, v = drawn(t, s, h, g)
    lists = random_lists(t, s, a, rows, columns)
    real = jnp.asarray(np.random.default_rng(3).random((B, s)) < 0.7) if padded else None
    offset = max(s - t, 0)
    rng = np.random.default_rng(5)
    d_out, d_lse = rng.normal(size=(B, t, h, P)), rng.normal(size=(B, t, h))
    half = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    given = [jnp.asarray(x, jnp.float32) for x in (d_out, d_lse)]
    found = compiled(causal, grad=True)(*half, lists, offset, real, *given)

    def loss(q, k, v):
        out, lse = sparse_attention_reference(
            q, k, v, lists, causal=causal, offset=offset, real=real
        )
        return jnp.sum(out * d_out) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0) * d_lse)

    with jax.enable_x64(True):
        want = jax.grad(loss, (0, 1, 2))(*(jnp.asarray(x, jnp.float64) for x in (q, k, v)))
    for own, other in zip(found, want, strict=True):
        assert np.isfinite(own).all()
        np.testing.assert_allclose(own, other, atol=1e-5)


def test_bfloat16():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in drawn(16, 16, 4, 2))
    lists = random_lists(16, 16, 2, 4, 4)
    out, _ = compiled(True)(q, k, v, lists, 0, None)
    want, _ = truth(*(np.asarray(x, np.float64) for x in (q, k, v)), lists, True, 0, None)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), want, atol=1e-2)


def test_parts_over_disjoint_keys_merge_exactly():
    q, k, v = (jnp.asarray(x, jnp.float32) for x in drawn(16, 24, 4, 2))
    table = table_of(random_lists(16, 24, 2, 4, 4, density=0.8), 6)
    odd = jnp.arange(6) % 2 == 1
    make = lambda chosen: lists_of(chosen, 4, 4)
    whole = compiled(True)(q, k, v, make(table), 8, None)
    parts = [compiled(True)(q, k, v, make(table & side), 8, None) for side in (odd, ~odd)]
    for own, other in zip(merged(parts), whole, strict=True):
        np.testing.assert_allclose(own, other, atol=1e-6)


def test_spans_may_begin_anywhere():
    """Spans of 5 keys, one of them before the first key and one past the last."""
    q, k, v = drawn(8, 22, 2, 1)
    begins = np.asarray([[[[-3, 7, 12, 0], [2, 9, 20, 14]]]], np.int32)
    count = jnp.asarray([[[3, 4]]], jnp.int32)
    spans = BlockLists(jnp.asarray(begins), count, 4, 5, unit=1)
    half = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    out, lse = compiled(False)(*half, spans, 0, None)
    for i in range(8):
        own = begins[0, 0, i // 4][: int(count[0, 0, i // 4])]
        keys = [key for begin in own for key in range(begin, begin + 5) if 0 <= key < 22]
        for n, j in np.ndindex(B, 2):
            scores = k[n, keys, 0] @ q[n, i, j] / np.sqrt(P)
            weights = np.exp(scores - scores.max())
            np.testing.assert_allclose(
                out[n, i, j], weights / weights.sum() @ v[n, keys, 0], atol=2e-6
            )
            assert float(lse[n, i, j]) == pytest.approx(
                np.log(weights.sum()) + scores.max(), abs=2e-6
            )
    with pytest.raises(ValueError, match="no table"):
        table_of(spans, 5)


def test_all_causal_blocks_are_dense_attention():
    q, k, v = drawn(13, 21, 4, 2)
    lists = causal_lists(13, 21, 4, 8, offset=8)
    out, _ = compiled(True)(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), lists, 8, None)
    every = lists_of(jnp.ones((1, 1, 4, 3), bool), 4, 8)
    want, _ = truth(q, k, v, every, True, 8, None)
    np.testing.assert_allclose(out, want, atol=2e-6)
    assert lists.count.tolist() == [[[2, 2, 3, 3]]]


def test_the_future_changes_nothing():
    q, k, v = (jnp.asarray(x, jnp.float32) for x in drawn(16, 16, 4, 2))
    lists = random_lists(16, 16, 2, 4, 4, density=0.9)
    before, _ = compiled(True)(q, k, v, lists, 0, None)
    after, _ = compiled(True)(q, k.at[:, 9:].add(3.0), v.at[:, 9:].add(1.0), lists, 0, None)
    np.testing.assert_array_equal(before[:, :9], after[:, :9])


def test_other_lists_compile_nothing():
    call = jax.jit(
        lambda q, k, v, lists, offset: sparse_attention(q, k, v, lists, offset=offset)[0]
    )
    q, k, v = (jnp.asarray(x, jnp.float32) for x in drawn(16, 16, 4, 2))
    for seed in range(3):
        call(q, k, v, random_lists(16, 16, 2, 4, 4, seed=seed), jnp.int32(seed))
    assert call._cache_size() == 1


def test_tables_and_lists_are_the_same():
    table = np.random.default_rng(0).random((2, 3, 5, 7)) < 0.4
    lists = lists_of(jnp.asarray(table), 4, 8)
    np.testing.assert_array_equal(table_of(lists, 7), table)
    np.testing.assert_array_equal(table_of(transposed(lists, 7), 5), table.swapaxes(-1, -2))
    back = transposed(lists, 7)
    assert (back.rows, back.columns) == (8, 4)
    for place in np.ndindex(2, 3, 5):
        own = np.asarray(lists.index[place])[: int(lists.count[place])]
        assert own.tolist() == np.flatnonzero(table[place]).tolist()
    assert int(lists.listed) == table.sum()
    short = lists_of(jnp.asarray(table), 4, 8, most=2)
    assert short.index.shape[-1] == 2 and int(short.count.max()) == 2


def test_memory_is_linear_in_the_sequence():
    def temporary(t):
        shape = lambda heads: jax.ShapeDtypeStruct((1, t, heads, 16), jnp.float32)
        lists = causal_lists(t, t, 128, 128)
        lists = BlockLists(lists.index[..., :4], jnp.minimum(lists.count, 4), 128, 128)
        call = jax.jit(lambda q, k, v: sparse_attention(q, k, v, lists)[0])
        found = call.lower(shape(4), shape(2), shape(2)).compile().memory_analysis()
        return found.temp_size_in_bytes

    assert temporary(4096) < 4.5 * temporary(1024)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda l: BlockLists(l.index.at[0, 0, 0, 1].set(l.index[0, 0, 0, 0]), l.count, 4, 4), "twice"),
        (lambda l: BlockLists(l.index.at[0, 0, 0, 0].set(-1), l.count, 4, 4), "block -1 is listed"),
        (lambda l: BlockLists(l.index, l.count.at[0, 0, 1].set(-5), 4, 4), "a count of -5; use 0"),
        (lambda l: BlockLists(l.index, l.count, 4, 4, unit=1), "spans that overlap"),
        (lambda l: BlockLists(l.index.at[0, 0, 0, 0].set(9), l.count, 4, 4), "there are 4"),
        (lambda l: BlockLists(l.index, l.count + 9, 4, 4), "exceeds"),
        (lambda l: BlockLists(l.index[:, :, :2], l.count[:, :, :2], 4, 4), "need"),
    ],
)  # fmt: skip
def test_bad_lists_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        check_lists(change(random_lists(16, 16, 2, 4, 4)), 16, 16)


def test_spans_that_do_not_overlap_are_good():
    lists = random_lists(16, 16, 2, 4, 4)
    check_lists(BlockLists(lists.index * 4 - 1, lists.count, 4, 4, unit=1), 16, 16)


def test_an_unknown_form_is_refused():
    q, k, v = (jnp.asarray(x, jnp.float32) for x in drawn(16, 16, 4, 2))
    unchecked = inspect.unwrap(sparse_attention)  # the run-time type checks of tests speak first
    with pytest.raises(ValueError, match="implementation='cuda'; use one of"):
        unchecked(q, k, v, random_lists(16, 16, 2, 4, 4), implementation="cuda")


def test_bad_shapes_are_refused():
    q, k, v = (jnp.asarray(x, jnp.float32) for x in drawn(16, 16, 4, 2))
    with pytest.raises(ValueError, match="divisor"):
        sparse_attention(q[:, :, :3], k, v, random_lists(16, 16, 2, 4, 4))
    with pytest.raises(ValueError, match="in blocks of 8 queries"):
        sparse_attention(q, k, v, random_lists(16, 16, 2, 8, 4).__class__(*_wrong()))
    with pytest.raises(ValueError, match="real"):
        sparse_attention(q, k, v, random_lists(16, 16, 2, 4, 4), real=jnp.ones((1, 3), bool))


def _wrong():
    lists = random_lists(16, 16, 2, 4, 4)
    return lists.index, lists.count, 8, 4


@pytest.mark.parametrize(("window", "sink"), [(1, 0), (5, 3), (6, 0), (50, 0)])
def test_an_a_shape_is_exact(window, sink):
    """Sink and window by the token, not by the block; and only blocks that hold one of both are listed."""
    t, s, offset = 14, 21, 7
    q, k, v = drawn(t, s, 2, 1)
    lists = a_shape_lists(t, s, 4, 3, window=window, sink=sink, offset=offset)
    half = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    out, _ = sparse_attention(*half, lists, offset=offset, window=window, sink=sink)
    for n, i, j in np.ndindex(B, t, 2):
        place = offset + i
        keys = [key for key in range(place + 1) if key > place - window or key < sink]
        scores = k[n, keys, 0] @ q[n, i, j] / np.sqrt(P)
        weights = np.exp(scores - scores.max())
        np.testing.assert_allclose(out[n, i, j], weights / weights.sum() @ v[n, keys, 0], atol=2e-6)
    for x in range(4):
        places = range(offset + 4 * x, min(offset + 4 * x + 4, offset + t))
        wanted = {
            key // 3 for p in places for key in range(p + 1) if key > p - window or key < sink
        }
        own = np.asarray(lists.index)[0, 0, x][: int(lists.count[0, 0, x])]
        assert set(own.tolist()) == wanted
