"""Cached, batched decoding against whole forward passes, and its ends and errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp import models
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Ledger
from dyncomp.decoding import FullDepth, Generator, KeepLayers, Sampler
from dyncomp.decoding.batch import bucket, pad_left

NEW = 10


@pytest.fixture(scope="module")
def full(lm):
    model, variables, prompts = lm
    generator = Generator(model, variables, keep_logits=True)
    return generator, generator.generate(prompts, NEW), generator.ledger, generator.prompt_ledger


@pytest.fixture(scope="module")
def forward(lm):
    model, variables, _ = lm
    apply = jax.jit(functools.partial(models.apply, model, variables))
    return lambda tokens: np.asarray(apply(jnp.asarray([tokens]))[0][0])


def test_greedy_decoding_is_the_whole_forward_pass(lm, full, forward):
    for prompt, one in zip(lm[2], full[1], strict=True):
        want = forward(prompt + one.tokens)[len(prompt) - 1 : -1]
        np.testing.assert_allclose(one.logits, want, atol=1e-5)
        np.testing.assert_array_equal(one.tokens, want.argmax(-1))
        assert one.reason == "length" and one.depths == [6] * NEW


def test_a_padded_batch_equals_single_runs(lm, full):
    generator, batch, *_ = full
    for prompt, one in zip(lm[2], batch, strict=True):
        (alone,) = generator.generate([prompt], NEW)
        assert alone.tokens == one.tokens
        np.testing.assert_allclose(alone.logits, one.logits, atol=1e-5)


def test_a_cache_that_is_read_by_blocks_says_the_same(full, lm):
    """Capacities above `attend.SMALL` and above one block of keys; empty slots behind, padding in front."""
    generator, batch, *_ = full
    for capacity in (300, 1200):
        for one, want in zip(generator.generate(lm[2], NEW, capacity=capacity), batch, strict=True):
            assert one.tokens == want.tokens
            np.testing.assert_allclose(one.logits, want.logits, atol=1e-5)


def test_the_ledger_counts_real_tokens(lm, full):
    model, _, prompts = lm
    _, _, steps, prompted = full
    lengths = [len(prompt) for prompt in prompts]
    per_token = Ledger(model.cost((1, 1)))
    for where, tokens in ((prompted, lengths), (steps, [NEW - 1] * len(prompts))):
        assert where.events(under="group_0/block_0/ffn/tokens") == 6 * sum(tokens)
        assert where.events(under="head") == sum(tokens)
    seen = sum(n + i + 1 for n in lengths for i in range(NEW - 1))
    assert steps.events(under="group_0/block_0/mixer/pairs") == 6 * seen
    assert per_token.total("needed") == 0


def test_sequences_end_at_their_own_token(lm, full):
    model, variables, prompts = lm
    _, batch, *_ = full
    end = batch[0].tokens[4]
    found = Generator(model, variables, eos=[end]).generate(prompts, NEW)
    for one, whole in zip(found, batch, strict=True):
        cut = whole.tokens.index(end) if end in whole.tokens else NEW
        assert one.tokens == whole.tokens[:cut]
        assert one.reason == ("eos" if cut < NEW else "length")


def test_a_listener_ends_a_row(lm, full):
    generator, batch, *_ = full
    seen = []

    def listener(tick):
        seen.append(tick)
        return np.array([len(seen) == 3, False, False])

    found = generator.generate(lm[2], NEW, listener=listener)
    assert found[0].tokens == batch[0].tokens[:3] and found[0].reason == "stop"
    assert found[1].tokens == batch[1].tokens


def test_sampling_depends_on_the_seed_alone(lm):
    model, variables, prompts = lm
    generator = Generator(model, variables, sampler=Sampler(temperature=1.5))
    draw = lambda seed: [one.tokens for one in generator.generate(prompts, NEW, seed=seed)]
    first = draw(0)
    assert draw(0) == first != draw(1)
    assert [one.tokens for one in generator.generate(prompts[:1], NEW, seed=0)] == first[:1]


def test_keeping_all_layers_is_full_depth(lm, full):
    model, variables, prompts = lm
    generator = Generator(model, variables, KeepLayers(tuple(range(6))), keep_logits=True)
    for one, whole in zip(generator.generate(prompts, NEW), full[1], strict=True):
        assert one.tokens == whole.tokens
        np.testing.assert_allclose(one.logits, whole.logits, atol=1e-6)
    assert generator.ledger.total("needed") == full[2].total("needed")


def test_kept_layers_equal_a_model_whose_other_blocks_are_identity_after_the_prompt(lm):
    """The reference runs whole sequences: skipped blocks change only prompt positions."""
    model, variables, prompts = lm
    keep, prompt = (0, 2, 5), prompts[1]
    generator = Generator(model, variables, KeepLayers(keep), keep_logits=True)
    (one,) = generator.generate([prompt], NEW)
    plain = model.clone(layers="unroll")
    own = models.unstack(jax.tree.map(jnp.asarray, variables))
    call = lambda *args, method: plain.apply(own, *args, method=method)
    tokens = jnp.asarray([prompt + one.tokens])
    x = call(tokens, method="embed")
    prompted = (jnp.arange(tokens.shape[1]) < len(prompt))[None, :, None]
    for index in range(6):
        y, _ = call(index, x, method="run_block")
        x = y if index in keep else jnp.where(prompted, y, x)
    want = np.asarray(call(x, method="classify"))[0, len(prompt) - 1 : -1]
    np.testing.assert_allclose(one.logits, want, atol=1e-5)
    assert one.depths == [6] + [3] * (NEW - 1)
    for part in ("ffn/tokens", "mixer/projections"):
        assert generator.ledger.events(under=f"group_0/block_0/{part}") == 3 * (NEW - 1)


def test_a_step_compiles_once_for_its_buckets(lm):
    model, variables, prompts = lm
    generator = Generator(model, variables)
    for prompt in prompts:
        generator.generate([prompt], 4)
        generator.generate([prompt], 7, seed=1)
    assert generator._step._cache_size() == 1 and generator._prefill._cache_size() == 1


def test_padding_and_buckets():
    tokens, mask = pad_left([[7], [1, 2, 3]], 10)
    assert tokens.shape == (2, 16) and mask.sum(1).tolist() == [1, 3]
    assert tokens[0, -1] == 7 and tokens[1, -3:].tolist() == [1, 2, 3]
    assert bucket(20, 40) == 40 and bucket(20, 400) == 64 and bucket(41, 40) == 41
    assert bucket(16) == 16 and bucket(17) == 64 and bucket(40_000) == 3 * 16384


def test_a_prompt_that_fits_is_not_padded_past_the_limit(lm):
    """20 tokens would go into a bucket of 64."""
    generator = Generator(lm[0].clone(max_length=40), lm[1])
    prompt = [1 + n % 60 for n in range(20)]
    (one,) = generator.generate([prompt], 20)
    assert one.tokens == Generator(*lm[:2]).generate([prompt], 20)[0].tokens
    with pytest.raises(DyncompError, match="20 tokens of prompt and 21 new ones exceed .* 40"):
        generator.generate([prompt], 21)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "at least one token"),
        ([[61]], {}, "token id 61 is not in a vocabulary of 61"),
        ([[1]], {"max_new": 0}, "at least one token"),
        ([[1]], {"capacity": 16}, "the cache has 16"),
    ],
)
def test_bad_input(lm, prompts, options, message):
    generator = Generator(*lm[:2])
    with pytest.raises(DyncompError, match=message):
        generator.generate(prompts, **{"max_new": 3, **options})


@pytest.mark.parametrize("layers", [(), (2, 1), (0, 6)])
def test_layers_that_do_not_exist(lm, layers):
    with pytest.raises(DyncompError, match="KeepLayers.layers"):
        Generator(*lm[:2], KeepLayers(layers))
    assert FullDepth().slack() == 0
