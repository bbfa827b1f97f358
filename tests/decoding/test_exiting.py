"""Exits against whole forward passes on what each block was given."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp import models
from dyncomp.core.errors import DyncompError
from dyncomp.decoding import Confident, ExitAndCatchUp, ExitEarly, Generator, OwnHeads

NEW, EXITS, LONGEST = 9, (1, 3, 4), 16
THRESHOLDS = jnp.asarray([0.11, 0.12, 0.12])
"""The tiny model then leaves at every exit now and then (a test checks)."""


@pytest.fixture(scope="module")
def net(lm):
    model, variables, _ = lm
    plain = model.clone(layers="unroll")
    own = models.unstack(jax.tree.map(jnp.asarray, variables))

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(method, index, x):
        return plain.apply(own, *([] if index is None else [index]), x, method=method)

    return lambda *args, method: run(method, args[0] if len(args) > 1 else None, args[-1])


def generator_of(lm, fill):
    model, variables, _ = lm
    return Generator(model, variables, ExitEarly(EXITS, fill=fill), keep_logits=True)


@pytest.fixture(scope="module", params=["propagate", "copy"])
def run(lm, request):
    """(fill, generator, what it generated)."""
    generator = generator_of(lm, request.param)
    return request.param, generator, generator.generate(lm[2], NEW, controls=THRESHOLDS)


def test_thresholds_above_one_are_full_depth(lm, run):
    _, generator, _ = run
    whole = Generator(*lm[:2], keep_logits=True).generate(lm[2], NEW)
    for one, full in zip(generator.generate(lm[2], NEW), whole, strict=True):
        assert one.tokens == full.tokens and set(one.depths) == {6}
        np.testing.assert_allclose(one.logits, full.logits, atol=1e-6)


def test_thresholds_of_zero_are_the_first_exit(lm, run):
    _, generator, _ = run
    found = generator.generate(lm[2], NEW, controls=jnp.zeros(3))
    assert all(one.depths == [6] + [1] * (NEW - 1) for one in found)
    assert generator.ledger.events(under="group_0/block_0/ffn") == len(lm[2]) * (NEW - 1)


def test_rows_of_a_batch_leave_as_they_do_alone(lm, run):
    _, generator, batch = run
    assert {depth for one in batch for depth in one.depths} >= {1, 3, 4, 6}, "thresholds too easy"
    for prompt, one in zip(lm[2], batch, strict=True):
        (alone,) = generator.generate([prompt], NEW, controls=THRESHOLDS)
        assert alone.tokens == one.tokens and alone.depths == one.depths
        np.testing.assert_allclose(alone.logits, one.logits, atol=1e-5)


def padded(rows):
    """As long as any sequence here; nothing before sees what comes behind."""
    return np.pad(rows, [(0, LONGEST - len(rows)), *[(0, 0)] * (np.ndim(rows) - 1)])[None]


def attended(net, rows, index):
    """Block ``index`` on the last of ``rows`` [t d]."""
    return np.asarray(net(index, padded(rows), method="run_block")[0])[0, len(rows) - 1]


def test_propagated_states_are_what_later_tokens_attend_to(lm, net):
    """Token by token without caches: block i makes keys of the state with which each token stood before it."""
    generator, prompt = generator_of(lm, "propagate"), lm[2][1]
    (one,) = generator.generate([prompt], NEW, controls=THRESHOLDS)
    states = [[] for _ in range(6)]  # what each block was given, token by token
    x = net(padded(prompt), method="embed")
    for index in range(6):
        states[index] = list(np.asarray(x)[0, : len(prompt)])
        x, _ = net(index, x, method="run_block")
    for step, token in enumerate(one.tokens[:-1]):
        x = np.asarray(net(np.asarray([[token]]), method="embed"))[0, 0]
        depth, logits = 6, None
        for index in range(6):
            states[index].append(x)
            if index < depth:
                x = attended(net, np.stack(states[index]), index)
            said = np.asarray(net(x[None, None], method="classify"))[0, 0]
            if index + 1 in EXITS and depth == 6:
                sure = jnp.max(jax.nn.softmax(said)) >= THRESHOLDS[EXITS.index(index + 1)]
                depth, logits = (index + 1, said) if sure else (6, None)
        logits = said if logits is None else logits
        assert one.depths[step + 1] == depth
        np.testing.assert_allclose(one.logits[step + 1], logits, atol=1e-5)


def test_copied_keys_are_those_of_the_last_block_that_ran(lm):
    generator, prompt = generator_of(lm, "copy"), lm[2][1]
    model, policy = generator.model, generator.policy
    tokens = jnp.asarray([prompt])
    mask = jnp.ones(tokens.shape, bool)
    args = generator.variables, tokens, mask, 16, policy.controls(), jax.random.key(0)
    decoding, *_ = generator._prefill_step(*args)
    for depth, threshold in ((1, [0.0, 2, 2]), (4, [2.0, 2, 0])):
        after, told, _ = generator._decode_step(
            generator.variables, decoding, jnp.asarray(threshold), jax.random.key(0)
        )
        assert told["depths"].tolist() == [depth]
        caches = [block["mixer"] for block in models.layer_caches(after.cache)]
        at = len(prompt)
        for index in range(depth, model.depth):
            assert int(caches[index].length) == at + 1
            np.testing.assert_array_equal(
                caches[index].keys[..., at], caches[depth - 1].keys[..., at]
            )
        assert not np.array_equal(caches[0].keys[..., at - 1], caches[1].keys[..., at - 1])


def test_what_was_needed_and_executed(lm, run):
    fill, generator, _ = run
    prompt = lm[2][1]
    (one,) = generator.generate([prompt], NEW, controls=THRESHOLDS)
    depths, ledger = one.depths[1:], generator.ledger
    entry = ledger.entries["group_0/block_0/ffn/tokens"]
    assert entry.needed == entry.executed == sum(depths)
    heads = ledger.entries["exits/rows"]
    read = sum(sum(e <= depth for e in EXITS) for depth in depths)
    assert heads.needed == heads.executed == read
    assert ledger.entries["head/tokens"].executed == depths.count(6)
    made = ledger.entries["fill/rows"].executed
    assert made == (sum(6 - depth for depth in depths) if fill == "propagate" else 0)


@pytest.fixture(scope="module")
def exact(lm):
    """Of every window, the generator that catches up."""
    model, variables, _ = lm
    make = lambda w: Generator(model, variables, ExitAndCatchUp(EXITS, window=w), keep_logits=True)
    return {window: make(window) for window in (2, 5)}


def said_at(net, tokens, depth):
    """Logits of the last of ``tokens`` after ``depth`` blocks of the whole sequence."""
    x = net(padded(tokens), method="embed")
    for index in range(depth):
        x, _ = net(index, x, method="run_block")
    return np.asarray(net(x, method="classify"))[0, len(tokens) - 1]


@pytest.mark.parametrize("window", [2, 5])
def test_blocks_that_catch_up_have_the_caches_of_full_depth(lm, net, exact, window):
    """Each token's logits are those of its exit in a forward pass in which all tokens ran all blocks."""
    prompt, generator = lm[2][1], exact[window]
    (one,) = generator.generate([prompt], NEW, controls=THRESHOLDS)
    assert set(one.depths[1:]) >= {1, 6}
    for step in range(NEW):
        want = said_at(net, prompt + one.tokens[:step], one.depths[step])
        np.testing.assert_allclose(one.logits[step], want, atol=1e-5)
    ran = generator.ledger.entries["group_0/block_0/ffn/tokens"]
    assert ran.needed <= 6 * (NEW - 1) and ran.executed >= ran.needed


def test_a_full_window_goes_deep(lm, exact):
    generator, zero = exact[2], jnp.zeros(3)
    (one,) = generator.generate(lm[2][:1], NEW, controls=zero)
    assert one.depths == [6, 1, 6, 1, 6, 1, 6, 1, 6]
    assert generator.ledger.entries["group_0/block_0/ffn/tokens"].needed == 6 * (NEW - 1)
    (one,) = exact[5].generate(lm[2][:1], NEW, controls=zero)
    assert one.depths == [6, 1, 1, 1, 1, 6, 1, 1, 1]


def test_catching_up_above_all_thresholds_is_full_depth(lm, exact):
    whole = Generator(*lm[:2], keep_logits=True).generate(lm[2], NEW)
    for one, full in zip(exact[5].generate(lm[2], NEW), whole, strict=True):
        assert one.tokens == full.tokens and set(one.depths) == {6}
        np.testing.assert_allclose(one.logits, full.logits, atol=1e-6)


def test_own_heads_read_the_raw_state(lm, net):
    model, variables, prompts = lm
    heads = jax.random.normal(jax.random.key(1), (3, 32, 61))
    own = {**variables, "exits": {"heads": heads}}
    generator = Generator(model, own, ExitEarly(EXITS, readout=OwnHeads()), keep_logits=True)
    (one,) = generator.generate(prompts[:1], 2, controls=jnp.asarray([0.0, 2, 2]))
    tokens = jnp.asarray([prompts[0] + one.tokens[:1]])
    x, _ = net(0, net(tokens, method="embed"), method="run_block")
    np.testing.assert_allclose(one.logits[1], x[0, -1] @ heads[0], atol=1e-4)


def test_recomputing_is_another_policy(lm, unchecked):
    with pytest.raises(DyncompError, match="fill='recompute'.* ExitAndCatchUp"):
        Generator(*lm[:2], ExitEarly(EXITS, fill="recompute"))


@pytest.mark.parametrize("exits", [(), (0, 2), (2, 6), (3, 1)])
def test_exits_that_do_not_exist(lm, exits):
    with pytest.raises(DyncompError, match="from 1 to 5"):
        Generator(*lm[:2], ExitEarly(exits))
    assert Confident().controls(2).tolist() == [2.0, 2.0]
