"""Sparse patterns: everything kept is dense attention; what they keep is what they say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dyncomp.attention import (
    AShape,
    Assigned,
    Attention,
    Everything,
    ImportantTokens,
    PerHead,
    Sight,
    SinkWindow,
    TopBlocks,
    VerticalSlash,
    attend,
    band,
    head_errors,
)
from dyncomp.attention.attention import PAIR_BLOCK
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Ledger

B, T, H, G, P = 2, 75, 4, 2, 8
EVERYTHING = {
    "a_shape": AShape(window=T, tile=16),
    "sink_alone": AShape(window=1, sink=T, tile=16),
    "top_blocks": TopBlocks(blocks=9, tile=16),
    "vertical": VerticalSlash(vertical=T, slash=1, local=1, probe=8, tile=16),
    "slash": VerticalSlash(vertical=1, sink=0, slash=T, probe=8, tile=16),
}


def drawn(seed=0, s=T):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (B, T, H, P), (B, s, G, P), (B, s, G, P)
    return [jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True)]


def sight(s=T, offset=0, padded=0):
    keys = jnp.where(jnp.arange(s) < offset + T, jnp.arange(s), -1)
    keys = jnp.where(jnp.arange(s) < padded, -1, keys)
    place = jnp.arange(offset, offset + T, dtype=jnp.int32)
    return Sight(place, jnp.broadcast_to(keys.astype(jnp.int32), (B, s)))


@functools.lru_cache
def compiled(pattern):
    return jax.jit(pattern)


@pytest.mark.parametrize("name", EVERYTHING)
@pytest.mark.parametrize("cached", [False, True])
def test_everything_kept_is_dense(name, cached):
    """Alone, and behind a cache with padding in front and empty slots behind."""
    pattern = EVERYTHING[name]
    s, offset, padded = (107, 20, 3) if cached else (T, 0, 0)
    if cached and name != "top_blocks":
        pattern = {
            "a_shape": AShape(window=s, tile=16), "sink_alone": AShape(window=1, sink=s, tile=16),
            "vertical": VerticalSlash(vertical=s, slash=1, local=1, probe=8, tile=16),
            "slash": VerticalSlash(vertical=1, sink=0, slash=s, probe=8, tile=16),
        }[name]  # fmt: skip
    q, k, v = drawn(s=s)
    own = sight(s, offset, padded)
    mixed, pairs = compiled(pattern)(q, k, v, own)
    np.testing.assert_allclose(mixed, attend(q, k, v, own.all()), atol=3e-6)
    assert float(pairs) > 0


def test_a_shape_is_a_window_and_a_sink():
    q, k, v = drawn()
    mixed, pairs = compiled(AShape(window=9, sink=5, tile=16))(q, k, v, sight())
    i, j = np.arange(T)[:, None], np.arange(T)[None]
    seen = (j <= i) & ((j > i - 9) | (j < 5))
    np.testing.assert_allclose(mixed, attend(q, k, v, jnp.asarray(seen)[None]), atol=3e-6)
    assert float(pairs) == (1 + 2 + 3 + 3 + 3) * 256


def test_the_future_changes_no_window():
    q, k, v = drawn()
    call = compiled(AShape(window=9, sink=5, tile=16))
    before, _ = call(q, k, v, sight())
    after, _ = call(q.at[:, 50:].add(1.0), k.at[:, 50:].add(2.0), v.at[:, 50:].add(1.0), sight())
    np.testing.assert_array_equal(before[:, :50], after[:, :50])


def test_a_planted_column_is_found():
    """Every query looks at key 17: a vertical line keeps what a window of the same size loses."""
    q, k, v = drawn(3)
    target = jnp.ones((P,)) * 3
    q, k = 0.1 * q + target / 3, k.at[:, 17].set(target)
    dense = attend(q, k, v, sight().all())
    error = lambda pattern: float(
        jnp.abs(compiled(pattern)(q, k, v, sight())[0] - dense)[:, 40:].max()
    )
    lines = VerticalSlash(vertical=3, slash=3, sink=1, local=2, probe=8, tile=16)
    assert error(lines) < 0.2 * error(AShape(window=16, sink=4, tile=16))


def test_heads_have_patterns_of_their_own():
    q, k, v = drawn()
    patterns = AShape(window=9, tile=16), AShape(window=2, sink=3, tile=16)
    mixed, pairs = compiled(PerHead(patterns, (0, 1, 1, 0)))(q, k, v, sight())
    each = [compiled(pattern)(q, k, v, sight()) for pattern in patterns]
    for head, index in enumerate((0, 1, 1, 0)):
        np.testing.assert_allclose(mixed[:, :, head], each[index][0][:, :, head], atol=1e-6)
    assert float(pairs) == (float(each[0][1]) + float(each[1][1])) / 2
    with pytest.raises(DyncompError, match="PerHead"):
        PerHead(patterns, (0, 1))(q, k, v, sight())


def test_the_search_finds_planted_heads():
    """Head 0 looks at one early key, the others at their neighbours: the first wants lines, the second a window."""
    q, k, v = drawn(3)
    target = 3 * jnp.ones((P,))
    q, k = q.at[:, :, :2].set(0.1 * q[:, :, :2] + target / 3), k.at[:, 17, 0].set(target)
    near = jnp.cumsum(jax.random.normal(jax.random.key(7), (B, T, P)), axis=1)
    q, k = q.at[:, :, 2:].set(near[:, :, None]), k.at[:, :, 1].set(near)
    candidates = (
        AShape(window=24, sink=4, tile=16),
        VerticalSlash(vertical=3, slash=3, sink=1, local=2, probe=8, tile=16),
    )
    errors, pairs = jax.jit(lambda *x: head_errors(*x, sight(), candidates))(q, k, v)
    assert errors.shape == (2, H) and pairs.shape == (2,)
    assert jnp.argmin(errors, axis=0)[:2].tolist() == [1, 1]


def test_no_recompilation_and_no_table():
    pattern = VerticalSlash(vertical=32, slash=64, sink=4, local=16, tile=64)
    shape = lambda h: jax.ShapeDtypeStruct((1, 2048, h, P), jnp.float32)
    place = jnp.arange(2048, dtype=jnp.int32)
    call = jax.jit(lambda q, k, v: pattern(q, k, v, Sight(place, place[None]))[0])
    found = call.lower(shape(H), shape(G), shape(G)).compile().memory_analysis()
    assert found.temp_size_in_bytes < 4 * H * 2048 * 2048


@pytest.fixture(scope="module")
def layer():
    make = functools.partial(Attention, heads=H, kv_heads=G)
    x = jax.random.normal(jax.random.key(5), (B, T, 16))
    params = nn.unbox(jax.jit(make().init)(jax.random.key(1), x))
    return make, params, x


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_mixer_that_keeps_everything_is_dense(layer, name):
    make, params, x = layer
    pattern = functools.partial(type(EVERYTHING[name]), **vars(EVERYTHING[name]))
    dense, _ = jax.jit(make().apply)(params, x)
    y, aux = jax.jit(make(pattern=pattern).apply)(params, x)
    np.testing.assert_allclose(y, dense, atol=3e-6)
    ledger = Ledger(make().cost(16, T)).record(aux.events)
    assert ledger.events("needed", under="pair") > 0


def test_short_passes_are_dense(layer):
    make, params, x = layer
    sparse = make(pattern=functools.partial(AShape, window=2), pattern_from=T + 1)
    np.testing.assert_array_equal(sparse.apply(params, x)[0], make().apply(params, x)[0])


def test_a_window_of_a_long_pass_is_computed_by_blocks(layer, monkeypatch):
    make, params, _ = layer
    module, t = make(window=32), 320
    x = jax.random.normal(jax.random.key(6), (B, t, 16))
    real = jnp.arange(t)[None] >= jnp.asarray([[7], [0]])
    want, square = module.apply(params, x, None, real)
    d_want = jax.grad(summed, argnums=1)(module, x, params, real)
    monkeypatch.setattr(band, "LONG", t)
    y, aux = module.apply(params, x, None, real)
    for row, start in enumerate((7, 0)):
        np.testing.assert_allclose(y[row, start:], want[row, start:], atol=1e-6)
    d_x = jax.grad(summed, argnums=1)(module, x, params, real)
    np.testing.assert_allclose(d_x, d_want, atol=1e-5)
    pairs = lambda aux, kind: (
        PAIR_BLOCK * int(getattr(aux.events["pair_blocks"], kind))
        + int(getattr(aux.events["pairs"], kind))
    )
    assert pairs(aux, "needed") == pairs(square, "needed")
    assert 2 * pairs(aux, "executed") < pairs(square, "executed")


def summed(module, x, params, real):
    y, _ = module.apply(params, x, None, real)
    return jnp.sum(jnp.where(real[:, :, None], y, 0.0) ** 2)


def test_a_long_window_takes_memory_in_proportion_to_the_text():
    module = Attention(heads=2, window=64)

    def temporary(t):
        x = jax.ShapeDtypeStruct((1, t, 16), jnp.float32)
        params = jax.eval_shape(module.init, jax.random.key(0), x)
        call = jax.jit(lambda params, x: module.apply(params, x)[0])
        return call.lower(params, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8192) < 2.5 * temporary(4096) < 2**26


def test_prefill_then_decode(layer):
    """Single tokens are dense over what prefill cached."""
    make, params, x = layer
    module = make(pattern=functools.partial(AShape, window=T, tile=16))
    dense = make()
    _, aux = module.apply(params, x[:, :70], cache=module.init_cache(16, B, 80))
    y, _ = module.apply(params, x[:, 70:71], cache=aux.cache)
    want, _ = dense.apply(params, x[:, :71])
    np.testing.assert_allclose(y[:, 0], want[:, -1], atol=3e-6)


SPARSE = {
    "a_shape": AShape(window=9, sink=5, tile=16),
    "top_blocks": TopBlocks(blocks=3, tile=16),
    "vertical_slash": VerticalSlash(vertical=7, slash=9, probe=8, sink=4, local=5, tile=16),
    "per_head": PerHead((AShape(window=9, sink=3, tile=16), TopBlocks(2, tile=16)), (0, 1, 1, 0)),
    "assigned": Assigned((VerticalSlash(7, 9, probe=8, sink=4, local=5, tile=16),)),
    "important": ImportantTokens(tau=0.8, recent=8, drawn=4, tile=16),
}


@pytest.mark.parametrize("name", SPARSE)
def test_a_padded_row_equals_itself_alone(layer, name):
    """Sinks, columns, blocks and probing queries are those of the tokens, whatever slots they lie in."""
    make, params, x = layer
    run = jax.jit(make(pattern=lambda: SPARSE[name]).apply)
    alone, _ = run(params, x[:, :40])
    for before in (35, 0, 11):  # slots of padding in front of 40 tokens, and the rest behind
        real = (jnp.arange(T) >= before) & (jnp.arange(T) < before + 40)
        rows = jnp.where(real[None, :, None], jnp.roll(x, before, axis=1), 3.0)
        positions = jnp.maximum(jnp.arange(T) - before, 0)[None]
        y, _ = run(params, rows, positions, jnp.broadcast_to(real, (B, T)))
        np.testing.assert_allclose(y[:, before : before + 40], alone, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(SPARSE) - {"important"}))
def test_rows_that_stand_at_different_places_equal_themselves_alone(layer, name):
    """Two passes into a cache, the first with another number of tokens in each row."""
    make, params, x = layer
    module = make(pattern=lambda: SPARSE[name])
    run = jax.jit(lambda rows, at, mask, cache: module.apply(params, rows, at, mask, cache))
    first = jnp.arange(24)[None] >= jnp.asarray([[9], [0]])
    at = jnp.maximum(jnp.arange(24)[None] - jnp.asarray([[9], [0]]), 0)
    _, aux = run(x[:, :24], at, first, module.init_cache(16, B, 90))
    later = jnp.arange(24, 64)[None] - jnp.asarray([[9], [0]])
    y, _ = run(x[:, 24:64], later, None, aux.cache)
    for row, skipped in enumerate((9, 0)):
        own = x[row : row + 1, skipped:64]
        cut = 24 - skipped
        _, aux = run(own[:, :cut], None, None, module.init_cache(16, 1, 90))
        want, _ = run(own[:, cut:], None, None, aux.cache)
        np.testing.assert_allclose(y[row : row + 1], want, atol=1e-6)


def test_a_policy_that_anchors_slots_refuses_a_pattern(layer):
    make, params, x = layer
    cache = functools.partial(SinkWindow, sink=2, window=20)
    module = make(pattern=lambda: SPARSE["a_shape"], cache=cache)
    with pytest.raises(DyncompError, match="pattern=None"):
        module.apply(params, x, cache=module.init_cache(16, B, T))


@pytest.mark.parametrize("change", [{"window": 3}, {"causal": False}])
def test_what_does_not_go_together_is_refused(layer, change):
    make, params, x = layer
    with pytest.raises(DyncompError, match="Attention.pattern"):
        make(pattern=functools.partial(AShape, window=2), **change).apply(params, x)


def test_bad_patterns_are_refused():
    with pytest.raises(DyncompError, match="window"):
        AShape(window=0)
    with pytest.raises(DyncompError, match="local"):
        VerticalSlash(vertical=3, slash=3, local=0)
    with pytest.raises(DyncompError, match="sink=4, local=1"):
        TopBlocks(blocks=2, sink=4)
    with pytest.raises(DyncompError, match="blocks=0"):
        TopBlocks(blocks=0, sink=0, local=0)
    for make in (functools.partial(AShape, 4), functools.partial(TopBlocks, 4), Everything):
        with pytest.raises(DyncompError, match="tile=0"):
            make(tile=0)
