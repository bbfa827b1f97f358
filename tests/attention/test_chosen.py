"""Plans of sparse patterns: what is counted, what they depend on, and attention over them, against loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.attention import (
    AShape,
    Assigned,
    Chosen,
    Everything,
    FrozenLines,
    RandomBlocks,
    TopBlocks,
    VerticalSlash,
    attend,
    attend_chosen,
    compare,
    fit_slash,
)
from dyncomp.attention.search import whole
from dyncomp.core.errors import DyncompError
from dyncomp_kernels.sparse_attention.spans import slash_spans

B, T, H, G, P, TILE = 1, 75, 4, 2, 8, 16
LINES = VerticalSlash(vertical=5, slash=12, sink=2, local=4, probe=8, tile=TILE)
KINDS = {
    "a_shape": AShape(window=20, sink=3, tile=TILE),
    "top": TopBlocks(2, tile=TILE),
    "random": RandomBlocks(2, tile=TILE),
    "lines": LINES,
    "everything": Everything(tile=TILE),
}


@pytest.fixture(scope="module")
def heads():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (B, T, H, P), (B, T, G, P), (B, T, G, P)
    return tuple(jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True))


@functools.lru_cache
def chooser(pattern):
    return jax.jit(lambda q, k: pattern.choose(q, k, whole(q.shape[1])))


def seen_of(chosen, t=T):
    """Which pairs a plan holds, bool [b h t s], by loops; none may stand twice in one block of queries."""
    b, h, x = chosen.spans.count.shape
    seen = np.zeros((b, h, t, t), bool)
    for n, j, block in np.ndindex(b, h, x):
        rows = slice(block * chosen.spans.rows, (block + 1) * chosen.spans.rows)
        begins = np.asarray(chosen.spans.index)[n, j, block][: int(chosen.spans.count[n, j, block])]
        keys = [key for begin in begins for key in range(begin, begin + chosen.spans.columns)]
        assert len(keys) == len(set(keys))
        keys = set(keys) | set(np.asarray(chosen.columns)[n, j][: int(chosen.count[n, j])].tolist())
        seen[n, j, rows, [key for key in sorted(keys) if key < t]] = True if keys else False
    return seen & np.tril(np.ones((t, t), bool))


@pytest.mark.parametrize("name", KINDS)
def test_attention_over_a_plan_is_masked_dense(heads, name):
    chosen = chooser(KINDS[name])(*heads[:2])
    seen = seen_of(chosen)
    mixed, lse = jax.jit(attend_chosen)(*heads, chosen, whole(T))
    q, k, v = (np.asarray(x, np.float64) for x in heads)
    for j, i in np.ndindex(H, T):
        keys = np.flatnonzero(seen[0, j, i])
        scores = k[0, keys, j // 2] @ q[0, i, j] / np.sqrt(P)
        weights = np.exp(scores - scores.max())
        np.testing.assert_allclose(
            mixed[0, i, j], weights @ v[0, keys, j // 2] / weights.sum(), atol=3e-6
        )
        assert float(lse[0, i, j]) == pytest.approx(np.log(np.exp(scores).sum()), abs=3e-6)


@pytest.mark.parametrize("name", ["lines", "top", "random", "everything"])
def test_patterns_attend_to_their_plan(heads, name):
    chosen = chooser(KINDS[name])(*heads[:2])
    mixed, pairs = jax.jit(KINDS[name])(*heads, whole(T))
    np.testing.assert_allclose(
        mixed, jax.jit(attend_chosen)(*heads, chosen, whole(T))[0], atol=3e-6
    )
    assert float(pairs) > 0


def test_an_a_shape_has_all_tokens_of_its_blocks(heads):
    seen = seen_of(chooser(KINDS["a_shape"])(*heads[:2]))[0, 0]
    i, j = np.arange(T)[:, None], np.arange(T)[None]
    begin = i // TILE * TILE
    want = (j // TILE == 0) | (j // TILE >= (begin - 19) // TILE)
    np.testing.assert_array_equal(seen, want & (j <= i))


def test_lines_depend_on_the_newest_queries_and_all_keys(heads):
    q, k, _ = heads
    before = chooser(LINES)(q, k)
    same = chooser(LINES)(q.at[:, : T - 8].add(7.0), k)
    jax.tree.map(np.testing.assert_array_equal, before, same)
    for other in (
        chooser(LINES)(q.at[:, -8:].multiply(-3.0), k),
        chooser(LINES)(q, k.at[:, 30].multiply(40.0)),
    ):
        assert any(
            np.any(a != b)
            for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(other), strict=True)
        )


def test_tiles_of_the_worked_example():
    """MInference's builder on 512 tokens: spans and loose columns of each block of queries are known."""
    offsets = jnp.asarray([[[333, 201, 70, 1, 0]]], jnp.int32)
    spans = slash_spans(offsets, jnp.asarray([[5]], jnp.int32), 512, 64, keys=512)
    columns = jnp.asarray([[[0, 1, 2, 100, 300]]], jnp.int32)
    chosen = Chosen(spans, columns, jnp.asarray([[5]], jnp.int32))
    loose = [0, 0, 3, 1, 3, 1, 4, 4]
    want = sum(s + -(-n // 64) for s, n in zip([1, 2, 3, 4, 4, 5, 5, 5], loose, strict=True))
    assert chosen.tiles().tolist() == [[want]]
    assert chosen.executed(512).tolist() == [[29 * 64 * 64 + 512 * 5]]


def test_tiles_by_loops(heads):
    chosen = chooser(LINES)(*heads[:2])
    for j in range(H):
        total = 0
        for x in range(-(-T // TILE)):
            begins = np.asarray(chosen.spans.index)[0, j, x][: int(chosen.spans.count[0, j, x])]
            columns = np.asarray(chosen.columns)[0, j][: int(chosen.count[0, j])]
            loose = [
                c
                for c in columns
                if c < (x + 1) * TILE and not any(b <= c < b + TILE for b in begins)
            ]
            total += len(begins) + -(-len(loose) // TILE)
        assert int(chosen.tiles()[0, j]) == total


def test_random_blocks_keep_what_is_forced_and_differ(heads):
    q, k, _ = heads
    one, other = chooser(KINDS["random"])(q, k), chooser(KINDS["random"])(q + 1.0, k)
    seen = seen_of(one)
    assert seen[0, :, :, 0].all() and all(seen[0, :, i, i].all() for i in range(T))
    assert one.spans.count.tolist() == chooser(KINDS["top"])(q, k).spans.count.tolist()
    wide = RandomBlocks(3, tile=TILE)
    assert np.any(seen_of(chooser(wide)(q, k)) != seen_of(chooser(wide)(q + 1.0, k)))
    assert one.spans.count.tolist() == other.spans.count.tolist()


def test_assigned_heads_do_what_their_pattern_does(heads):
    patterns = tuple(KINDS.values())
    call = jax.jit(lambda told, *x: Assigned(patterns)(*x, whole(T), {"heads": told}))
    for told in ((0, 1, 3, 4), (3, 3, 0, 1)):
        mixed, pairs = call(jnp.asarray(told, jnp.int32), *heads)
        tiles = looked = 0
        for j, n in enumerate(told):
            chosen = chooser(patterns[n])(*heads[:2])
            want, _ = jax.jit(attend_chosen)(*heads, chosen, whole(T))
            np.testing.assert_allclose(mixed[:, :, j], want[:, :, j], atol=3e-6)
            tiles, looked = tiles + int(chosen.tiles()[0, j]), looked + patterns[n].looks(T, T)
        assert float(pairs.needed) == pytest.approx((tiles * TILE**2 + looked) / H)
        assert float(pairs.executed) >= float(pairs.needed) - looked
    assert call._cache_size() == 1
    with pytest.raises(DyncompError, match="one for each"):
        Assigned(patterns)(*heads, whole(T), {"heads": jnp.zeros((3,), jnp.int32)})
    with pytest.raises(DyncompError, match="same tile"):
        Assigned((Everything(tile=8), Everything(tile=16)))


def test_frozen_lines(heads):
    """A text's own lines are its pattern; those of a text that looks elsewhere miss what is looked for."""
    q, k, v = heads
    target = 3 * jnp.ones((P,))
    q = 0.1 * q + target / 3
    here, there = k.at[:, 40].set(target), k.at[:, 9].set(target)
    lines = VerticalSlash(vertical=3, slash=4, sink=1, local=2, probe=8, tile=TILE)
    frozen = jax.jit(lambda told, k: FrozenLines(lines)(q, k, v, whole(T), told)[0])
    told = [lines.lines(q, x, whole(T)) for x in (here, there)]
    dynamic, _ = jax.jit(lines)(q, here, v, whole(T))
    np.testing.assert_allclose(frozen(told[0], here), dynamic, atol=3e-6)
    dense = attend(q, here, v, whole(T).all())
    # Late queries: there 40 lies in none of the tiles that the diagonals need.
    error = lambda mixed: float(jnp.abs(mixed - dense)[:, 70:].mean())
    assert error(dynamic) < 0.5 * error(frozen(told[1], here))


def test_compare_by_loops(heads):
    chosen = chooser(LINES)(*heads[:2])
    found = jax.jit(lambda h, c: compare(h, [c], 30))(heads, chosen)
    seen, (q, k, v) = seen_of(chosen), (np.asarray(x, np.float64) for x in heads)
    for j in range(H):
        scores = np.einsum("tp,sp->ts", q[0, :, j], k[0, :, j // 2]) / np.sqrt(P)
        weights = np.exp(scores) * np.tril(np.ones((T, T)))
        weights /= weights.sum(-1, keepdims=True)
        kept = weights * seen[0, j]
        assert float(found.recall[0, j]) == pytest.approx(kept[30:].sum(-1).mean(), abs=1e-5)
        gap = (kept / kept.sum(-1, keepdims=True) - weights)[30:] @ v[0, :, j // 2]
        assert float(found.error[0, j]) == pytest.approx(np.mean(gap**2), rel=1e-3)


def test_diagonals_are_fitted_to_the_cost(heads):
    pattern = VerticalSlash(vertical=5, slash=60, sink=2, local=4, probe=8, tile=TILE)
    mean = lambda slash: float(pattern.choose(*heads[:2], whole(T), slash).tiles().mean())
    found = fit_slash([heads], pattern, 14.0)
    assert mean(found.slash) <= 14 < mean(found.slash + 1)
    with pytest.raises(DyncompError, match="fewer columns"):
        fit_slash([heads], pattern, 3.0)
