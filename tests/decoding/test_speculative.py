"""Speculative decoding against the target alone: same text, same distribution, hand-counted work."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp import models
from dyncomp.core.errors import DyncompError
from dyncomp.decoding import (
    FirstLayers,
    Generator,
    OtherModel,
    Sampler,
    SkipLayers,
    SpeculativeGenerator,
)

NEW, LIMIT = 14, 2


@pytest.fixture(scope="module")
def target(lm, make_lm):
    """(model of three layers, variables, prompts)."""
    return *make_lm(3, 2), lm[2]


@pytest.fixture(scope="module")
def small(make_lm):
    """A draft of one layer."""
    return make_lm(1, 5)


@pytest.fixture(scope="module")
def plain(target):
    return [one.tokens for one in Generator(*target[:2]).generate(target[2], NEW)]


DRAFTERS = {
    "other": lambda target, small: OtherModel(*small),
    "itself": lambda target, small: OtherModel(*target[:2]),
    "skip": lambda target, small: SkipLayers((0, 2)),
    "skip_none": lambda target, small: SkipLayers((0, 1, 2)),
    "first": lambda target, small: FirstLayers(2),
}


@pytest.fixture(scope="module", params=list(DRAFTERS))
def run(target, small, request):
    """(name, generator, what three prompts give together, the first one alone, and the latter's ledgers)."""
    drafter = DRAFTERS[request.param](target, small)
    generator = SpeculativeGenerator(*target[:2], drafter, window=1, limit=LIMIT)
    together = generator.generate(target[2], NEW)
    alone = generator.generate(target[2][:1], NEW)
    return request.param, generator, together, alone, (generator.ledger, generator.draft_ledger)


def test_the_text_is_the_targets_own(run, plain):
    _, _, together, alone, _ = run
    assert [one.tokens for one in together] == plain
    assert alone[0].tokens == plain[0]


def test_tokens_come_one_by_one_and_a_listener_ends_rows(run, plain, target):
    generator, ticks = run[1], []
    assert [
        one.tokens for one in generator.generate(target[2], NEW, listener=ticks.append)
    ] == plain
    streamed = list(generator.stream(target[2], NEW))
    for given in (ticks, streamed):
        texts = [[int(t.tokens[row]) for t in given if t.emitted[row]] for row in range(3)]
        assert texts == plain

    def after_three(_, seen=itertools.count(1)):
        return np.arange(3) == 0 if next(seen) == 3 else None

    first, *others = generator.generate(target[2], NEW, listener=after_three)
    assert first.tokens == plain[0][:3] and first.reason == "stop"
    assert [one.tokens for one in others] == plain[1:]
    assert len(first.accepted) <= 3


def test_rounds_add_up_and_windows_adapt(run):
    for one in [*run[2], *run[3]]:
        assert 1 + sum(one.accepted) + len(one.accepted) == NEW
        room, window = NEW - 1, 1
        for accepted, drafted in zip(one.accepted, one.drafted, strict=True):
            assert drafted == min(window, room - 1) and 0 <= accepted <= drafted
            room -= accepted + 1
            if drafted:
                window = min(window + 2, LIMIT) if accepted == drafted else max(window - 1, 1)


def test_a_draft_of_equal_weights_is_always_kept(run):
    if run[0] in ("itself", "skip_none"):
        assert all(one.accepted == one.drafted for one in run[2])
        assert len(run[3][0].accepted) == 5  # 1 + (1 + 1) + 3 x (2 + 1), and what is left


def test_work_is_what_was_read(run):
    """The target reads the newest token and every draft; each drafter what its definition says."""
    name, _, _, (one,), (verified, draft) = run
    drafted, rounds = sum(one.drafted), len(one.drafted)
    assert verified.events(under="head") == drafted + rounds
    layers = {"first": 1}.get(name, 3)
    assert verified.events(under="ffn/tokens") == layers * (drafted + rounds)
    if name in (
        "other",
        "itself",
    ):  # a draft costs a read; a last one that was kept costs one in the next round
        pairs = list(zip(one.accepted, one.drafted, strict=True))
        late = sum(a == d > 0 for a, d in pairs[:-1]) + sum(d == 0 for d in one.drafted)
        layers = {"other": 1}.get(name, 3)
        assert draft.events(under="ffn/tokens") == layers * (drafted + late)
    elif name == "first":
        assert draft.events(under="ffn/tokens") == 2 * (drafted + rounds)
        assert draft.events(under="head") == drafted
    else:
        assert draft.events(under="ffn/tokens") == {"skip": 2, "skip_none": 3}[name] * drafted


def test_rounds_compile_once_for_each_width(target, run):
    generator = run[1]
    before = generator._round._cache_size()
    generator.generate(target[2][:1], NEW, seed=3)
    assert generator._round._cache_size() == before <= 2 * LIMIT


def test_a_sequence_ends_at_its_own_token(target, plain):
    end = plain[0][6]
    drafter = SkipLayers((0, 1, 2))
    generator = SpeculativeGenerator(*target[:2], drafter, window=2, limit=2, eos=[end])
    for one, whole in zip(generator.generate(target[2], NEW), plain, strict=True):
        cut = whole.index(end) if end in whole else NEW
        assert one.tokens == whole[:cut] and one.reason == ("eos" if cut < NEW else "length")


@pytest.mark.parametrize("name", ["other", "first"])
def test_sampled_tokens_have_the_targets_distribution(make_lm, name):
    """Exact marginals of the second and third token by summing over all prefixes; 2,048 rows."""
    model, variables = make_lm(2, 0, 7)
    drafter = OtherModel(*make_lm(1, 1, 7)) if name == "other" else FirstLayers(1)
    sampler = Sampler(temperature=0.7)
    generator = SpeculativeGenerator(model, variables, drafter, sampler, window=2, limit=2)
    rows = generator.generate([[1, 2]] * 2048, 3)
    tokens = np.asarray([one.tokens for one in rows])
    texts = np.asarray([[1, 2, *t] for t in itertools.product(range(7), repeat=2)])
    logits = np.asarray(models.apply(model, variables, jnp.asarray(texts))[0], np.float64)
    p = np.exp(logits / 0.7)
    p /= p.sum(-1, keepdims=True)
    first, second, third = p[0, 1], p[::7, 2], p[:, 3].reshape(7, 7, 7)
    joint = first[:, None, None] * second[:, :, None] * third
    for axes, column in (((0, 2), 1), ((0, 1), 2)):
        found = np.bincount(tokens[:, column], minlength=7)
        want = 2048 * joint.sum(axis=axes)
        assert ((found - want) ** 2 / want).sum() < 22.5  # 6 degrees of freedom: p = 0.001
    refused = sum(sum(one.drafted) - sum(one.accepted) for one in rows)
    assert 50 < refused < sum(sum(one.drafted) for one in rows)


def test_bad_input(target, small):
    make = functools.partial(SpeculativeGenerator, *target[:2])
    with pytest.raises(DyncompError, match="one tokenizer"):
        make(OtherModel(small[0].clone(vocab_size=60), small[1]))
    with pytest.raises(DyncompError, match="SkipLayers.layers"):
        make(SkipLayers((2, 3)))
    with pytest.raises(DyncompError, match="FirstLayers.blocks=3: use 1 to 2"):
        make(FirstLayers(3))
    with pytest.raises(DyncompError, match="window=9"):
        make(FirstLayers(2), window=9)
    with pytest.raises(DyncompError, match="at least one token"):
        make(FirstLayers(2)).generate([[]], 3)
