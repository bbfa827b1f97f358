"""Logit fusion in the decode loop: against whole forward passes of every model, fixed weights, and its ledger."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp import models
from dyncomp.core.errors import DyncompError
from dyncomp.decoding import (
    FusedGenerator,
    Generator,
    Sampler,
    alpha_grid,
    choose_fusion,
    fused_text_logits,
)

NEW, LONGEST = 8, 16
GRID = jnp.asarray(alpha_grid())


@pytest.fixture(scope="module")
def big(lm, make_lm):
    """(model of three layers, variables, prompts)."""
    return *make_lm(3, 2), lm[2]


@pytest.fixture(scope="module")
def base(make_lm):
    return make_lm(1, 5)


@pytest.fixture(scope="module")
def experts(base):
    """Two experts: the base, with its weights moved a little in two directions."""

    def moved(seed):
        leaves, treedef = jax.tree.flatten(base[1])
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        noise = [
            x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)
        ]
        return base[0], jax.tree.unflatten(treedef, noise)

    return {"code": moved(1), "verse": moved(2)}


@pytest.fixture(scope="module")
def run(big, base, experts):
    """(generator, what came out, every tick, ledgers)."""
    generator = FusedGenerator(big[:2], base, experts, keep_logits=True)
    ticks = []
    found = generator.generate(big[2], NEW, listener=ticks.append)
    return generator, found, ticks, (generator.prompt_ledger, generator.ledger)


@pytest.fixture(scope="module")
def forward(big, base, experts):
    """Logits [3 + 1 t v] of all models on a whole text, and what stands behind it."""
    pairs = [big[:2], base, *experts.values()]
    nets = [jax.jit(functools.partial(models.apply, *pair)) for pair in pairs]
    return lambda text: [net(np.pad(text, (0, LONGEST - len(text)))[None])[0][0] for net in nets]


on_text = jax.jit(fused_text_logits)


def test_every_step_is_the_choice_on_whole_forward_passes(big, run, forward):
    _, found, ticks, _ = run
    for row, (prompt, one) in enumerate(zip(big[2], found, strict=True)):
        large, base, *experts = forward(prompt + one.tokens)
        own = large[None], base[None], jnp.stack(experts)[:, None]
        fused, plan = on_text(*own, GRID)
        fused, experts, alphas = map(np.asarray, (fused, plan.expert, plan.alpha))
        span = slice(len(prompt) - 1, len(prompt) + NEW - 1)
        np.testing.assert_allclose(one.logits, fused[0, span], atol=1e-4)
        assert one.tokens == fused[0, span].argmax(-1).tolist()
        assert [int(t.expert[row]) for t in ticks] == experts[0, span].tolist()
        np.testing.assert_allclose([t.alpha[row] for t in ticks], alphas[0, span], atol=1e-6)


def test_positions_of_a_text_choose_for_themselves(forward):
    large, base, *experts = forward([1, 2, 3, 4])
    large, base, both = map(np.asarray, (large, base, experts))
    _, plan = on_text(large[None], base[None], both[:, None], GRID)
    choose = jax.jit(choose_fusion)
    for place in range(4):
        here = slice(place, place + 1)
        one = choose(large[here], base[here], both[:, here], GRID)
        assert int(one.expert[0]) == int(plan.expert[0, place])
        assert float(one.alpha[0]) == float(plan.alpha[0, place])


def test_weight_zero_is_the_large_model(big, run):
    generator = run[0]
    alone = Generator(*big[:2]).generate(big[2], NEW)
    found = generator.generate(big[2], NEW, grid=[0.0])
    assert [one.tokens for one in found] == [one.tokens for one in alone]


def test_an_expert_that_learned_nothing_changes_nothing(big, base, run):
    ticks = []
    generator = FusedGenerator(big[:2], base, {"same": base})
    found = generator.generate(big[2], NEW, listener=ticks.append)
    assert [one.tokens for one in found] == [
        o.tokens for o in run[0].generate(big[2], NEW, grid=[0.0])
    ]
    assert all((tick.alpha == 0).all() for tick in ticks)


def test_a_large_model_that_is_the_base_becomes_the_expert(big, base, experts):
    """Then alpha is 1 and the text is the expert's own."""
    ticks = []
    generator = FusedGenerator(base, base, {"code": experts["code"]})
    found = generator.generate(big[2], NEW, listener=ticks.append)
    assert all((tick.alpha == 1).all() for tick in ticks)
    own = Generator(*experts["code"]).generate(big[2], NEW)
    assert [one.tokens for one in found] == [one.tokens for one in own]


def test_a_fixed_weight_is_a_grid_of_one_value(big, base, experts, forward):
    """Proxy tuning: large + 1.5 (expert - base), with one expert."""
    generator = FusedGenerator(big[:2], base, {"code": experts["code"]}, [1.5], keep_logits=True)
    (one,) = generator.generate(big[2][:1], NEW)
    large, small, code, _ = forward(big[2][0] + one.tokens)
    np.testing.assert_allclose(one.logits, (large + 1.5 * (code - small))[2 : 2 + NEW], atol=1e-4)


def test_all_models_read_every_token(big, run):
    prompted, steps = run[3]
    for name, layers in (("large", 3), ("base", 1), ("code", 1), ("verse", 1)):
        for ledger, tokens in ((prompted, 3 + 6 + 1), (steps, 3 * (NEW - 1))):
            assert ledger.events(under=f"{name}/head") == tokens
            assert ledger.events(under=f"{name}/group_0/block_0/ffn/tokens") == layers * tokens
    assert steps.total("needed", under="large") + sum(
        steps.total("needed", under=n) for n in ("base", "code", "verse")
    ) == steps.total("needed")


def test_rows_and_steps_do_not_influence_each_other(big, run):
    generator, found, *_ = run
    for prompt, one in zip(big[2], found, strict=True):
        (alone,) = generator.generate([prompt], NEW)
        assert alone.tokens == one.tokens


def test_one_program_serves_all_grids_of_a_size(big, run):
    generator = run[0]
    generator.generate(big[2], NEW)
    before = generator._step._cache_size()
    generator.generate(big[2], NEW, grid=GRID / 2)
    assert generator._step._cache_size() == before


def test_ends_and_sampling(big, base, experts, run):
    end = run[1][0].tokens[3]
    generator = FusedGenerator(big[:2], base, experts, eos=[end])
    for one, whole in zip(generator.generate(big[2], NEW), run[1], strict=True):
        cut = whole.tokens.index(end) if end in whole.tokens else NEW
        assert one.tokens == whole.tokens[:cut]
    warm = FusedGenerator(big[:2], base, experts, sampler=Sampler(temperature=1.5))
    draw = lambda seed: [one.tokens for one in warm.generate(big[2], NEW, seed=seed)]
    assert draw(0) == draw(0) != draw(1)


def test_bad_input(big, base, experts):
    with pytest.raises(DyncompError, match="one tokenizer"):
        FusedGenerator(big[:2], (base[0].clone(vocab_size=60), base[1]), experts)
    with pytest.raises(DyncompError, match="give at least one"):
        FusedGenerator(big[:2], base, {})
    with pytest.raises(DyncompError, match="not named 'large'"):
        FusedGenerator(big[:2], base, {"large": base})
