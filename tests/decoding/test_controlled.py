"""Decoding under a stop and exit controller (arXiv 2401.09964)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dyncomp.core.errors import DyncompError
from dyncomp.decoding import Controlled, ExitAndCatchUp, ExitEarly, Generator, OwnHeads
from dyncomp.depth import STOP, decision
from dyncomp.models import unstack

EXITS, NEW = (1, 2, 4), 9


@pytest.fixture(scope="module")
def stopping(lm):
    """Generators with heads and a controller of random weights, and at full depth."""
    model, variables, prompts = lm
    heads = 0.3 * jax.random.normal(jax.random.key(5), (3, 32, 61))
    controller = 0.2 * jax.random.normal(jax.random.key(6), (32, 3))
    own = {**variables, "exits": {"heads": heads, "controller": controller}}
    policy = ExitEarly(EXITS, readout=OwnHeads(), rule=Controlled())
    return Generator(model, own, policy, keep_logits=True), Generator(model, variables), prompts


def taus(leave, stop):
    return {"exit": jnp.full((4,), leave), "stop": jnp.full((4,), stop)}


def test_thresholds_of_one_change_nothing(stopping):
    ours, full, prompts = stopping
    assert [one.tokens for one in ours.generate(prompts, NEW)] == [
        one.tokens for one in full.generate(prompts, NEW)
    ]
    heads = ours.ledger.entries["exits/rows"]
    assert heads.needed == heads.executed == 0  # nobody asked an early exit's head


def test_without_exits_the_text_is_a_prefix_at_full_depth(stopping):
    ours, full, prompts = stopping
    ended = 0
    for prompt in prompts:
        (whole,) = full.generate([prompt], NEW)
        lengths = []
        for stop in (0.0, 0.4, 0.5, 0.7, 1.0):
            (one,) = ours.generate([prompt], NEW, controls=taus(1.0, stop))
            assert one.tokens == whole.tokens[: len(one.tokens)]
            assert set(one.depths) == {6}
            lengths.append(len(one.tokens))
        assert lengths == sorted(lengths) and lengths[-1] == NEW
        ended += lengths[0] < NEW
    assert ended


def test_the_first_token_comes_from_full_depth(stopping):
    ours, full, prompts = stopping
    first = [one.tokens[0] for one in full.generate(prompts, 1)]
    found = ours.generate(prompts, 3, controls=taus(0.0, 0.0))
    assert [one.tokens[0] for one in found] == first
    assert [one.depths[0] for one in found] == [6] * len(prompts)


def test_the_second_token_by_hand(stopping, lm):
    """Its caches are those of full depth: walk through the blocks of the whole sequence."""
    ours, full, prompts = stopping
    model, weights = ours.model, ours.variables["exits"]
    own = unstack(nn.meta.unbox(lm[1]))
    run = jax.jit(functools.partial(model.apply, own), static_argnames="method")
    block = jax.jit(
        lambda index, x: model.apply(own, index, x, method="run_block"), static_argnums=0
    )
    depths = set()
    for prompt in prompts:
        for leave, stop in ((0.0, 0.0), (0.0, 1.0), (0.45, 1.0)):
            tokens = [*prompt, full.generate([prompt], 1)[0].tokens[0]]
            x, want = run(jnp.asarray([tokens]), method="embed"), None
            for index in range(6):
                x, _ = block(index, x)
                if index + 1 not in (*EXITS, 6) or want is not None:
                    continue
                said = decision(
                    x[0, -1] @ weights["controller"], jnp.float32(leave), jnp.float32(stop)
                )
                if said == STOP:
                    want = index + 1, None
                elif said == 1 and index < 5:
                    want = index + 1, x[0, -1] @ weights["heads"][EXITS.index(index + 1)]
            want = want or (6, run(x, method="classify")[0, -1])
            (one,) = ours.generate([prompt], 2, controls=taus(leave, stop))
            if want[1] is None:
                assert one.reason == "policy" and len(one.tokens) == 1
            else:
                assert one.depths[1] == want[0]
                np.testing.assert_allclose(one.logits[1], want[1], atol=1e-4)
            depths.add(want[0])
    assert len(depths) > 1


def test_what_is_counted(stopping):
    ours, _, prompts = stopping
    (one,) = ours.generate([prompts[1]], NEW, controls=taus(0.0, 1.0))
    depths, entries = one.depths[1:], ours.ledger.entries
    asked = [1 + sum(exit < depth for exit in EXITS) for depth in depths]
    assert entries["rule/rows"].needed == sum(asked)
    assert entries["exits/rows"].needed == sum(depth < 6 for depth in depths)
    assert entries["head/tokens"].needed == depths.count(6)
    assert ours.costs()["rule"]["rows"].flops == 2 * 3 * 32


def test_catching_up_refuses_it(lm):
    with pytest.raises(DyncompError, match="ExitEarly"):
        Generator(lm[0], lm[1], ExitAndCatchUp(EXITS, rule=Controlled()))
