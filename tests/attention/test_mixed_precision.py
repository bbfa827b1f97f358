"""The mixed-precision cache: nothing lost without quantisers, bounded errors with them, bytes as computed by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dyncomp.attention import (
    Attention,
    FullCache,
    ImportantTokens,
    MixedPrecision,
    cache_bytes,
    truncate,
)
from dyncomp.attention.cache import by_token
from dyncomp.attention.two_ended import TwoEnded
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Ledger
from dyncomp.decoding import Generator, Session
from dyncomp.experts import SwiGLU
from dyncomp.models import Block, DecoderLM, Group

B, T, D, P, ROOM, SPAN = 2, 14, 32, 8, 40, 5
TOKENS = functools.partial(ImportantTokens, tau=0.6, recent=4, drawn=4, tile=4)
CACHES = {
    "full": FullCache,
    "exact": functools.partial(
        MixedPrecision, tokens=TOKENS, span=SPAN, sparse=False, high=None, low=None
    ),
    "packed": functools.partial(
        MixedPrecision, tokens=functools.partial(TOKENS, most=10), span=SPAN, sparse=False,
        prompt=T,
    ),
    "zipvl": functools.partial(
        MixedPrecision, tokens=functools.partial(TOKENS, probe="recent"), span=SPAN
    ),
}  # fmt: skip


class Layer:
    """A layer with a cache, and its compiled program."""

    def __init__(self, **words):
        shape = {"heads": 4, "kv_heads": 2, "rope_theta": 50.0}
        self.module = Attention(**shape, **words)
        self.x = jax.random.normal(jax.random.key(0), (B, ROOM, D))
        self.params = nn.unbox(jax.jit(Attention(**shape).init)(jax.random.key(1), self.x[:, :2]))
        self.call = jax.jit(functools.partial(self.module.apply, self.params))

    def empty(self):
        return self.module.init_cache(D, B, ROOM)

    def prompt(self, tokens=T, **words):
        where = np.broadcast_to(np.arange(tokens), (B, tokens))
        return self.call(self.x[:, :tokens], where, cache=self.empty(), mask=words.get("mask"))

    def decoded(self, prompt=T, step=1, mask=None, x=None, first=0, shift=None):
        """Outputs of a prompt and of what follows it, ``step`` positions at a time, and the cache.

        Positions of RoPE are places less ``shift`` [b].
        """
        x = self.x if x is None else x
        shift = np.full(B, first) if shift is None else np.asarray(shift)
        where = np.arange(x.shape[1])[None] - shift[:, None]
        at = slice(first, first + prompt)
        y, aux = self.call(x[:, at], where[:, at], cache=self.empty(), mask=mask)
        outputs = [y]
        for start in range(first + prompt, x.shape[1], step):
            at = slice(start, start + step)
            y, aux = self.call(x[:, at], where[:, at], cache=aux.cache)
            outputs.append(y)
        return jnp.concatenate(outputs, axis=1), aux.cache


@functools.lru_cache
def layer(name):
    return Layer(cache=CACHES[name])


@functools.lru_cache
def dense():
    return layer("full").call(layer("full").x)[0]


def rows_of(cache, row):
    """(packed keys, packed values, slots, places of their tokens) of the front and the back."""
    for keys, values, seen, places in cache.policy.stores("float32")[0].ends(cache.prompt):
        at = np.flatnonzero(seen[row])
        yield keys, values, at, np.asarray(places[row])[at]


@pytest.mark.parametrize("step", [1, 13])
def test_without_quantisers_nothing_is_lost(step):
    """Window, spans and both ends of the prompt's store together are the full cache."""
    got, cache = layer("exact").decoded(step=step)
    np.testing.assert_allclose(got, dense(), atol=2e-6)
    assert int(cache.used) == 26 // SPAN and int(cache.fresh) == 26 % SPAN
    np.testing.assert_array_equal(cache.seen(), [ROOM, ROOM])


def test_the_sparse_prompt_is_the_pattern():
    """One choice for prefill and cache: the rows of the prompt are those of the pattern with the same tokens."""
    got, aux = layer("zipvl").prompt()
    tokens = functools.partial(TOKENS, probe="recent")
    want, _ = Layer(pattern=tokens).call(layer("zipvl").x[:, :T])  # no cache
    np.testing.assert_array_equal(got, want)
    for row in range(B):
        (_, _, _, front), _ = rows_of(aux.cache, row)
        outside = np.setdiff1d(np.arange(T), front)
        assert len(outside) and not np.asarray(got[row, outside]).any()
        assert np.all(np.abs(np.asarray(got[row, front])).sum(-1) > 0)


def test_numbers_come_back_bit_for_bit_without_quantisers():
    _, aux = layer("exact").prompt()
    _, other = layer("full").prompt()
    plain = by_token(other.cache.keys, other.cache.values)
    for row in range(B):
        found = []
        for keys, values, at, places in rows_of(aux.cache, row):
            for packed, exact in zip((keys, values), plain, strict=True):
                own = np.swapaxes(np.asarray(packed.codes[row]), 0, 1)[at]
                np.testing.assert_array_equal(own, exact[row, places])
            found += list(places)
        assert sorted(found) == list(range(T))


def test_the_front_holds_important_tokens_in_order():
    _, aux = layer("packed").prompt()
    for row in range(B):
        (_, _, at, first), (_, _, _, last) = rows_of(aux.cache, row)
        p = int(aux.cache.prompt.count[row])
        assert len(at) == p and 0 < p < T and T - 1 in first
        np.testing.assert_array_equal(np.sort(first), first)
        np.testing.assert_array_equal(np.sort(last)[::-1], last)
        assert sorted([*first, *last]) == list(range(T))


@pytest.mark.parametrize(("high", "low"), [(4, 2), (2, 4), (3, 3), (8, None)])
def test_errors_are_at_most_half_a_step(high, low):
    """Keys step/2; values step/2 times the root of the channel's largest magnitude (T and U each their own)."""
    rng = np.random.default_rng(0)
    k, v = (
        jnp.asarray(rng.normal(size=(B, T, 2, P)) * rng.gamma(1, size=P), jnp.float32) for _ in "kv"
    )
    places = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    order = jnp.asarray(np.stack([rng.permutation(T) for _ in range(B)]), jnp.int32)
    count = jnp.asarray([6, 3], jnp.int32)
    layout = TwoEnded(T, 9, high, low, "float32")
    stored = jax.jit(layout.pack)(k, v, places, order, count)
    for end, (keys, values, seen, own) in enumerate(layout.ends(stored)):
        for row in range(B):
            at = np.flatnonzero(seen[row])
            chosen = np.asarray(order[row])[: count[row]] if end == 0 else order[row][count[row] :]
            assert sorted(np.asarray(own[row])[at]) == sorted(np.asarray(chosen).tolist())
            exact = lambda x, row=row, at=at, own=own: np.swapaxes(x[row][own[row][at]], 0, 1)
            for packed, true in ((keys, exact(k)), (values, exact(v))):
                error = np.abs(np.asarray(packed.whole()[row])[:, at] - true)
                if packed.bits is None:
                    assert not error.any()
                    continue
                wide = lambda x, row=row, at=at: np.broadcast_to(x, (B, 2, len(seen[row]), P))[row][
                    :, at
                ]
                bound = wide(packed.step) * wide(packed.scale)
                assert np.all(error <= bound * 0.5001 + 1e-6)
                assert np.any(error > 0.4 * bound)
            if keys.bits is not None:
                spread = np.ptp(exact(k), axis=1) / (2**keys.bits - 1)
                np.testing.assert_allclose(keys.step[row][:, 0], spread, rtol=1e-5)
                largest = np.sqrt(np.abs(exact(v)).max(axis=1))
                np.testing.assert_allclose(values.scale[row][:, 0], largest, rtol=1e-6)


def test_a_row_with_nothing_at_an_end():
    """All tokens important, or one: the other end is empty, and no NaN comes of it."""
    layout = TwoEnded(T, T, 4, 2, "float32")
    k = jnp.ones((B, T, 2, P))
    places = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    stored = jax.jit(layout.pack)(k, k, places, places, jnp.asarray([T, 1], jnp.int32))
    (mixed, lse), _ = jax.jit(layout.attend)(stored, jnp.ones((B, 1, 4, P)))
    np.testing.assert_allclose(mixed, 1.0, atol=1e-6)  # a constant channel: step 0 divides nothing
    np.testing.assert_allclose(lse, np.sqrt(P) + np.log(T), rtol=1e-6)


def test_quantised_slots_are_read_as_they_were_packed():
    """Decoding reads exactly the dequantised numbers: FullCache with those in place gives the same."""
    _, aux = layer("packed").prompt()
    _, other = layer("full").prompt()
    keys, values = map(np.array, by_token(other.cache.keys, other.cache.values))
    for row in range(B):
        for k, v, at, places in rows_of(aux.cache, row):
            for whole, packed in ((keys, k), (values, v)):
                whole[row, places] = np.swapaxes(packed.whole()[row], 0, 1)[at]
    full = other.cache
    full = type(full)(
        jnp.transpose(keys, (0, 2, 3, 1)),
        jnp.swapaxes(values, 1, 2),
        full.positions,
        full.length,
        full.policy,
    )
    new = layer("packed").x[:, T : T + 1], np.full((B, 1), T)
    got, _ = layer("packed").call(*new, cache=aux.cache)
    want, _ = layer("full").call(*new, cache=full)
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_bytes_are_those_of_the_formula():
    """16 / (r b_h + (1 - r) b_l) without metadata, r the share of T; the cap bounds what is allocated."""
    _, aux = layer("packed").prompt()
    counted = cache_bytes(aux.cache)
    r = float(jnp.mean(aux.cache.prompt.count)) / T
    assert counted.tokens == counted.packed == T and counted.window == 0
    assert counted.dense == 2 * 2 * P * 4 * T
    np.testing.assert_allclose(counted.dense / 2 / counted.codes, 16 / (r * 4 + (1 - r) * 2))
    assert counted.metadata == 3 * 4 * 2 * 2 * P + 12 * T
    # Of each head, T tokens of 2 bytes (2 bits) and 10 times 2 bytes more (4 bits), whatever the split.
    assert aux.cache.prompt.keys.shape == (B, 2, T * 2 + 10 * 2)
    assert counted.allocated > counted.codes + counted.metadata


@pytest.mark.parametrize(("r", "ratio"), [(0.286, 6.22), (0.7, 4.71)])
def test_the_papers_ratios_follow_from_its_shares(r, ratio):
    """6.18x at 28.6% and 4.69x at 70% (table of GSM8K); the difference is metadata."""
    layout = TwoEnded(1000, 700, 4, 2, "bfloat16")
    rows = r * layout.row(64, 4) + (1 - r) * layout.row(64, 2)
    np.testing.assert_allclose(layout.row(64, None) / rows, ratio, atol=0.01)


def test_budget_and_tau_are_run_time_values():
    """From the cap on, the best of the important tokens stay; nothing compiles anew."""
    own = layer("packed")
    before, counts = own.prompt()[1] and own.call._cache_size(), []
    for change in (
        {"tau": jnp.float32(0.2)},
        {"tau": jnp.float32(0.6)},
        {"tau": jnp.float32(1.0)},
        {"budget": jnp.asarray([5, 12], jnp.int32)},
    ):
        where = np.broadcast_to(np.arange(T), (B, T))
        empty = own.empty().replace(**change)
        _, aux = own.call(own.x[:, :T], where, cache=empty, mask=None)
        counts.append(np.asarray(aux.cache.prompt.count))
    assert np.all(counts[0] < counts[1]) and np.all(counts[2] == 10)
    np.testing.assert_array_equal(counts[3], [5, 10])
    assert own.call._cache_size() == before


def test_left_padded_prompts():
    """A row behind padding goes on as it would alone: probes, ranks, quantisers and places leave padding out."""
    own = layer("zipvl")
    mask = jnp.ones((B, T)).at[0, :5].set(0)
    padded, cache = own.decoded(step=7, mask=mask, x=own.x[:, :28], shift=[5, 0])
    alone, one = own.decoded(T - 5, 7, first=5, x=own.x[:, :28])
    np.testing.assert_allclose(padded[0, T:], alone[0, T - 5 :], atol=2e-5)
    assert int(cache.prompt.count[0]) == int(one.prompt.count[0])
    np.testing.assert_array_equal(cache.seen(), [23, 28])


def test_right_padding_is_taken_back():
    """As `decoding.Session` reads rows of different lengths."""
    own = layer("zipvl")
    mask = jnp.ones((B, T)).at[0, 9:].set(0)
    _, aux = own.prompt(mask=mask)
    cache = truncate(aux.cache, jnp.asarray([9, T]))
    np.testing.assert_array_equal(cache.seen(), [9, T])
    more = jnp.stack([own.x[0, 9:16], own.x[1, 14:21]])
    places = jnp.stack([jnp.arange(9, 16), jnp.arange(14, 21)])
    y, aux = own.call(more, places, cache=cache)
    short, _ = own.decoded(9, 7, x=own.x[:, :16])
    np.testing.assert_allclose(y[0], short[0, 9:], atol=2e-5)
    np.testing.assert_array_equal(aux.cache.seen(), [16, 21])


def test_tokens_of_a_window_can_be_taken_back():
    own = layer("packed")
    _, aux = own.prompt()
    step = lambda at, cache: own.call(own.x[:, at : at + 1], np.full((B, 1), at), cache=cache)
    first, one = step(T, aux.cache)
    _, two = step(T + 1, one.cache)
    back = truncate(two.cache, jnp.int32(T))
    assert int(back.fresh) == 0 and int(back.length) == T
    again, _ = step(T, back)
    np.testing.assert_array_equal(first, again)


def test_past_the_end_comes_nan():
    own = layer("packed")
    got, cache = own.decoded()
    assert np.isfinite(got).all()
    y, _ = own.call(own.x[:, :1], np.full((B, 1), ROOM), cache=cache)
    assert np.isnan(y).all()


def test_what_it_cannot_do_is_refused():
    with pytest.raises(DyncompError, match="None"):
        MixedPrecision(8, high=9)
    with pytest.raises(DyncompError, match="prompt that fits"):
        MixedPrecision(8, prompt=9)
    with pytest.raises(DyncompError, match="whole bytes"):
        MixedPrecision(8, high=1).init(1, 1, 6)
    own = layer("packed")
    with pytest.raises(DyncompError, match="MixedPrecision.prompt"):
        own.prompt(T + 1)
    with pytest.raises(DyncompError, match="raise max_length"):
        own.call(jnp.zeros((B, ROOM + 1, D)), cache=own.empty())
    banded = Layer(cache=CACHES["packed"], window=4)
    with pytest.raises(DyncompError, match="FullCache"):
        banded.prompt()


def test_the_ledger_counts_the_important_pairs():
    own = layer("zipvl")
    _, aux = own.prompt()
    ledger = Ledger(own.module.cost(D, T))
    ledger.record({"pairs": aux.events["pairs"], "scored": aux.events["scored"]})
    p = np.asarray(aux.cache.prompt.count)
    pairs, scored = int(np.sum(p * (p + 1) // 2)), B * 4 * T
    assert ledger.total("needed") == pairs * 4 * 4 * P + scored * 2 * 4 * P
    tiles = -(-p // 4)
    executed = -(-int(np.sum(tiles * (tiles + 1) // 2) * 16) // B) * B
    assert ledger.total("executed") == executed * 4 * 4 * P + scored * 2 * 4 * P


def test_the_future_changes_no_decoded_token():
    own = layer("zipvl")
    x = own.x[:, :28]
    before, _ = own.decoded(step=7, x=x)
    after, _ = own.decoded(step=7, x=x.at[:, 24:].add(1.0))
    np.testing.assert_array_equal(before[:, :24], after[:, :24])
    assert np.abs(before[:, 24:] - after[:, 24:]).max() > 0.1


def test_bfloat16():
    """What is stored unquantised keeps its dtype; 8 bits lose little."""
    own = Layer(cache=functools.partial(CACHES["exact"], high=8))
    module = own.module.clone(dtypes=type(own.module.dtypes)(compute="bfloat16"))
    call = jax.jit(functools.partial(module.apply, own.params))
    x = own.x.astype(jnp.bfloat16)
    _, aux = call(x[:, :T], cache=module.init_cache(D, B, ROOM))
    got, aux = call(x[:, T : T + 1], cache=aux.cache)
    assert aux.cache.keys.dtype == jnp.bfloat16
    np.testing.assert_allclose(got[:, 0].astype(jnp.float32), dense()[:, T], atol=0.05)


def test_the_drivers_of_decoding_use_it():
    """Ragged prompts, left-padded and right-padded: unquantised and dense, what is written is FullCache's."""
    models = {}
    for name in ("full", "exact"):
        mixer = functools.partial(Attention, heads=4, kv_heads=2, cache=CACHES[name])
        block = functools.partial(Block, mixer=mixer, ffn=functools.partial(SwiGLU, hidden=16))
        models[name] = DecoderLM(30, D, [Group([block], 2)])
    variables = models["full"].init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    prompts, written, logits = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3]], {}, {}
    for name, model in models.items():
        found = Generator(model, variables).generate(prompts, max_new=9)
        written[name] = [one.tokens for one in found]
        session = Session(model, variables)
        first = session.open(prompts, 48)
        more = session.extend([[2, 7], [1, 8, 2, 8, 1, 8, 2]])
        session.take_back([1, 3])
        logits[name] = first, more[0, :2], more[1, :7], session.step([[4], [5]])
    assert written["full"] == written["exact"]
    for ours, theirs in zip(logits["exact"], logits["full"], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
