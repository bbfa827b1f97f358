"""Two models in turns: against each alone, against a walk without caches, and the invariants of catching up."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp import models
from dyncomp.core.errors import DyncompError
from dyncomp.decoding import (
    EntropySwitch,
    Generator,
    PeriodicSwitch,
    RandomSwitch,
    SwitchingGenerator,
    choose_on_text,
    switches,
    tokens_read,
)

NEW, PROMPT = 20, [5, 6, 7, 8, 9, 10]
EAGER = EntropySwitch(window=2, min_dwell=3)


@pytest.fixture(scope="module")
def large(lm, make_lm):
    """(model of three layers, variables, prompts)."""
    return *make_lm(3, 2), lm[2]


@pytest.fixture(scope="module")
def small(make_lm):
    """A model of one layer."""
    return make_lm(1, 5)


@pytest.fixture(scope="module")
def pair(large, small):
    return SwitchingGenerator(small, large[:2], EAGER)


def middle(pair):
    """A threshold at which both models run."""
    (one,) = pair.generate([PROMPT], NEW, threshold=-1.0)
    return float(np.median(one.entropies))


@pytest.fixture(scope="module")
def mixed(pair):
    """(threshold, what came out at it, both ledgers)."""
    threshold = middle(pair)
    (one,) = pair.generate([PROMPT], NEW, threshold=threshold)
    return threshold, one, pair.ledgers


def test_both_models_run_and_dwell(mixed):
    one = mixed[1]
    assert 0 < sum(one.models) < NEW == len(one.models)
    edges = np.flatnonzero(np.diff(one.models))
    assert len(edges) == switches(np.asarray(one.models)[None])[0] <= NEW // EAGER.min_dwell
    assert edges[0] + 1 >= EAGER.min_dwell and np.all(np.diff(edges) >= EAGER.min_dwell)


def test_the_text_is_that_of_a_walk_without_caches(large, small, mixed):
    """Every step anew from the whole text, by the rule as the paper writes it."""
    threshold, one, _ = mixed
    nets = [jax.jit(lambda t, m=m, v=v: models.apply(m, v, t)[0]) for m, v in (small, large[:2])]
    text, entropies, model, since = list(PROMPT), [], 1, 0
    for _ in range(NEW):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(text)] = text
        logits = np.asarray(nets[model](padded)[0, len(text) - 1], np.float64)
        p = np.exp(logits - logits.max())
        p /= p.sum()
        entropies.append(float(-(p * np.log2(p)).sum()))
        text.append(int(logits.argmax()))
        since += 1
        wanted = int(np.mean(entropies[-2:]) > threshold)
        if since >= 3 and wanted != model:
            model, since = wanted, 0
    assert one.tokens == text[len(PROMPT) :]
    np.testing.assert_allclose(one.entropies, entropies, atol=1e-4)


def test_tokens_come_with_who_wrote_them(pair, mixed):
    threshold, one, _ = mixed
    ticks = list(pair.stream([PROMPT], NEW, threshold=threshold))
    assert [int(tick.tokens[0]) for tick in ticks] == one.tokens
    assert [int(tick.model[0]) for tick in ticks] == one.models
    stop = lambda tick: tick.model == 1 - one.models[0]  # noqa: E731
    (short,) = pair.generate([PROMPT], NEW, threshold=threshold, listener=stop)
    turn = one.models.index(1 - one.models[0])
    assert short.reason == "stop" and short.tokens == one.tokens[: turn + 1]


def test_each_model_reads_every_token_up_to_its_last_turn_once(mixed):
    _, one, ledgers = mixed
    who = np.asarray(one.models)
    np.testing.assert_array_equal(one.read, tokens_read(who[None])[0])
    for model, layers in ((0, 1), (1, 3)):
        last = int(np.flatnonzero(who == model).max()) + 1
        assert (
            ledgers[model].events(under="head") == last == sum(np.asarray(one.read)[who == model])
        )
        pairs = sum(range(len(PROMPT), len(PROMPT) + last))
        assert ledgers[model].events(under="pairs") == layers * pairs


@pytest.mark.parametrize("threshold", [-1.0, "middle", 1e9])
def test_two_models_of_equal_weights_write_the_same_at_every_threshold(large, mixed, threshold):
    twins = SwitchingGenerator(large[:2], large[:2], EAGER)
    threshold = mixed[0] if threshold == "middle" else threshold
    (one,) = twins.generate([PROMPT], NEW, threshold=threshold)
    (alone,) = Generator(*large[:2]).generate([PROMPT], NEW)
    assert one.tokens == alone.tokens
    lengths = [session.read[0] for session in twins.sessions]
    assert max(lengths) == len(PROMPT) + NEW - 1 and min(lengths) >= len(PROMPT) - 1


def test_extreme_thresholds_are_one_model(large, small, pair):
    (big,) = pair.generate([PROMPT], NEW, threshold=-1.0)
    assert big.tokens == Generator(*large[:2]).generate([PROMPT], NEW)[0].tokens
    assert big.large_share() == 1.0 and set(big.read) == {1} and pair.cost_share(big) == 1.0
    own = SwitchingGenerator(small, large[:2], EntropySwitch(start="small"))
    (little,) = own.generate([PROMPT], NEW, threshold=1e9)
    assert little.tokens == Generator(*small).generate([PROMPT], NEW)[0].tokens
    sizes = [sum(x.size for x in jax.tree.leaves(v["params"])) for _, v in (small, large[:2])]
    assert own.cost_share(little) == pytest.approx(sizes[0] / sizes[1])


def test_controls_and_ends(large, small):
    periodic = SwitchingGenerator(small, large[:2], PeriodicSwitch(large=2, small=3))
    (one,) = periodic.generate([PROMPT], 10)
    assert one.models == [1, 1, 0, 0, 0, 1, 1, 0, 0, 0]
    assert one.read == [1, 1, 3, 1, 1, 4, 1, 3, 1, 1]
    random = SwitchingGenerator(small, large[:2], RandomSwitch(large=(1, 3), small=(2,)))
    first, again, other = (random.generate([PROMPT], NEW, seed=s)[0] for s in (0, 0, 1))
    assert first.models == again.models != other.models
    runs = [len(list(g)) for m, g in itertools.groupby(first.models) if m == 0][:-1]
    assert set(runs) == {2}
    end = one.tokens[4]
    ending = SwitchingGenerator(small, large[:2], PeriodicSwitch(large=2, small=3), eos=[end])
    (cut,) = ending.generate([PROMPT], 10)
    assert cut.tokens == one.tokens[: one.tokens.index(end)] and cut.reason == "eos"


def test_catching_up_compiles_few_programs(pair, mixed):
    """The threshold is a run-time argument; reads come in widths of 1, 2, 4, 8, 16, ..."""
    before = [session._extend._cache_size() for session in pair.sessions]
    pair.generate([PROMPT], NEW, threshold=mixed[0] + 1e-6)
    assert [s._extend._cache_size() for s in pair.sessions] == before and max(before) <= 6
    assert pair._decide._cache_size() == 1


def test_a_prompt_of_one_token(large, small):
    (one,) = SwitchingGenerator(small, large[:2], PeriodicSwitch(large=1, small=1)).generate(
        [[4]], 4
    )
    text = [4]
    for model in one.models:
        net, variables = (small, large[:2])[model]
        text.append(int(models.apply(net, variables, jnp.asarray([text]))[0][0, -1].argmax()))
    assert one.tokens == text[1:]


def test_choices_on_a_given_text():
    """The sheet's trace; and what the model that does not run thinks is never looked at."""
    switch = EntropySwitch(start="small")
    entropy = np.float32([0.1] * 12 + [3.0] * 6 + [0.1] * 20)[None]
    found = choose_on_text(switch, jnp.asarray(entropy), jnp.asarray(entropy), jnp.float32(1.0))
    assert found[0].tolist() == [0] * 14 + [1] * 10 + [0] * 14
    small, large = (np.where(found == model, entropy, np.float32(9.0)) for model in (0, 1))
    again = choose_on_text(switch, jnp.asarray(small), jnp.asarray(large), jnp.float32(1.0))
    np.testing.assert_array_equal(again, found)


def test_bad_input(large, small, pair):
    with pytest.raises(DyncompError, match="one tokenizer"):
        SwitchingGenerator((small[0].clone(vocab_size=60), small[1]), large[:2])
    with pytest.raises(DyncompError, match="rows of a batch would need different models"):
        pair.generate([PROMPT, PROMPT], 3)
    with pytest.raises(DyncompError, match="at least one token"):
        pair.generate([[]], 3)
