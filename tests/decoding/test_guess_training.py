"""Guessers learn beside a frozen model, and a replay of written text against real passes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.decoding import (
    Generator,
    Learner,
    TreeGenerator,
    best_family,
    chain_logits,
    guess_ranks,
    guessers_loss,
    guessers_ranks,
    head_guesses,
    prompt_guesses,
    random_family,
    rank_accuracy,
    read_text,
    replay,
    static_family,
    train_guessers,
    tree_family,
)
from dyncomp.decoding.net import Net, separate

K, V = 3, 7
TEXT = jnp.asarray([[1, 2, 3, 4, 5, 6, 0, 1], [6, 5, 4, 3, 3, 1, 2, 2]], jnp.int32)
CUTS = jnp.asarray([[1, 3, 6], [0, 2, 7]], jnp.int32)
ACC = np.asarray([[0.4, 0.2, 0.1, 0.05], [0.3, 0.1, 0.05, 0.02], [0.2, 0.1, 0.05, 0.02]])


@pytest.fixture(scope="module")
def tiny(make_lm):
    return make_lm(1, 3, V)


@pytest.fixture(scope="module")
def net(tiny):
    return Net(*separate(*tiny))


@pytest.fixture(scope="module")
def starts(tiny):
    """Random prompt embeddings, and heads."""
    d = tiny[0].d_model
    return jax.random.normal(jax.random.key(9), (K, d)), jnp.zeros((K, d, d))


@pytest.fixture(scope="module")
def text(net):
    return read_text(net, TEXT, 9)


GUESSERS = {"prompts": prompt_guesses, "heads": head_guesses}


def test_no_gradient_reaches_the_model(net, starts):
    params = dict(zip(GUESSERS, starts, strict=True))

    def loss(variables, params):
        return guessers_loss(Net(net.model, variables), GUESSERS, params, TEXT, CUTS)[0]

    frozen, own = jax.jit(jax.grad(loss, (0, 1)))(net.variables, params)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(frozen))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(own))


def test_a_prompt_hears_its_own_term_and_later_ones(net, starts):
    """With decay 0 only the first term weighs, and s_2 and s_3 come after what it depends on."""

    def loss(prompts):
        params = {"prompts": prompts}
        return guessers_loss(net, {"prompts": prompt_guesses}, params, TEXT, CUTS, 0.0)[0]

    gradient = jax.jit(jax.grad(loss))(starts[0])
    assert np.any(gradient, axis=1).tolist() == [True, False, False]


def test_heads_start_as_the_models_own_next_token(net, starts, text):
    outputs, reading = text
    found = head_guesses(net, starts[1], reading, outputs, CUTS)
    own = jnp.take_along_axis(net.classify(outputs), CUTS[:, :, None], axis=1)
    for distance in range(K):
        np.testing.assert_allclose(found[:, :, distance], own, atol=1e-5)


def test_training_beats_random_prompts_and_leaves_the_model_alone(net, starts):
    """A text that repeats itself: the loss of every guesser falls, and prompts guess more tokens right."""
    text = np.tile(np.asarray([[1, 2, 3, 4], [6, 5, 0, 3]], np.int32), (1, 4))
    before = jax.device_get(net.variables)
    learners = {
        "prompts": Learner(prompt_guesses, starts[0][:2], 0.05),
        "heads": Learner(head_guesses, starts[1][:2]),
    }
    losses = []
    trained = train_guessers(
        net,
        learners,
        itertools.repeat(text),
        40,
        cuts=4,
        report=lambda _, each: losses.append(each),
    )
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(net.variables))
    for name in learners:
        assert losses[-1][name] < 0.7 * losses[0][name]
    cuts = jnp.tile(jnp.arange(16, dtype=jnp.int32), (2, 1))

    @jax.jit
    def top1(prompts):
        guess, own = {"prompts": prompt_guesses}, {"prompts": prompts}
        ranks = guessers_ranks(net, guess, own, jnp.asarray(text), cuts)
        return jnp.mean(ranks["prompts"] == 0)

    assert top1(trained["prompts"]) > top1(starts[0][:2]) + 0.1


def test_bad_training_input(net, starts):
    learner = {"prompts": Learner(prompt_guesses, starts[0])}
    with pytest.raises(DyncompError, match="0 batches of texts for 3 steps"):
        train_guessers(net, learner, [], 3, cuts=2)
    with pytest.raises(DyncompError, match="lower cuts"):
        train_guessers(net, learner, [np.asarray(TEXT)], 1, cuts=9)
    with pytest.raises(DyncompError, match="as many"):
        train_guessers(
            net,
            {**learner, "heads": Learner(head_guesses, starts[1][:2])},
            [np.asarray(TEXT)],
            1,
            cuts=2,
        )


def test_ranks_are_places_of_a_stable_sort():
    rng = np.random.default_rng(0)
    guesses = rng.integers(0, 4, (5, K, V)).astype(np.float32)  # with many ties
    right = rng.integers(0, V, (5, K))
    order = np.argsort(-guesses, axis=-1, kind="stable")
    found = np.asarray(guess_ranks(jnp.asarray(guesses), jnp.asarray(right)))
    for place in np.ndindex(5, K):
        assert order[place][found[place]] == right[place]
    acc = rank_accuracy(found, 4)
    assert acc.shape == (K, 4) and np.isclose(acc[1, 2], np.mean(found[:, 1] == 2))


PROMPTS, NEW = [[1, 2, 3], [5, 6, 1], [4, 4, 2]], 22


@pytest.fixture(scope="module")
def ranks(tiny, net, starts):
    """[row position k] of the model's own text."""
    rows = [p + one.tokens for p, one in zip(PROMPTS, Generator(*tiny).generate(PROMPTS, NEW))]
    text = jnp.asarray(rows, jnp.int32)
    cuts = np.arange(2, text.shape[1] - K - 1, dtype=np.int32)
    right = text[:, cuts[:, None] + 2 + np.arange(K)]

    @jax.jit
    def call(text, right):
        _, reading = read_text(net, text, len(cuts) * K)
        at = jnp.tile(jnp.asarray(cuts), (3, 1))
        return guess_ranks(chain_logits(net, reading, starts[0], at, text.shape[1]), right)

    return np.asarray(call(text, right))


@pytest.mark.parametrize("kind", ["best", "static"])
def test_replay_is_what_real_passes_do(tiny, starts, ranks, kind):
    """Every pass of the driver: what it accepts and which tree it uses."""
    family = best_family(ACC, 14, first=4) if kind == "best" else static_family(ACC, 4)
    accepted = 0
    written = TreeGenerator(*tiny, starts[0], family).generate(PROMPTS, NEW)
    for one, own in zip(written, ranks, strict=True):
        found = replay(family, own)
        passes = len(found.accepted)
        assert one.accepted[:passes] == found.accepted.tolist()
        assert one.depths[:passes] == found.depths.tolist()
        assert found.slots(family) == sum(family.widths()[depth - 1] for depth in found.depths)
        accepted += found.accepted.sum()
    assert accepted > 0
    if kind == "static":
        assert set(found.depths.tolist()) == {K} and set(family.widths()) == {1 + K + 4 * (1 + K)}


def test_families_of_controls():
    family = random_family(np.random.default_rng(1), ACC, (4, 5, 6), 14)
    assert [len(tree.paths) for tree in family.trees] == [4, 5, 6]
    assert all(len(p) + p.sum() <= 14 for p in family.prompts)
    best = tree_family(ACC, (4, 5, 6), 14)
    assert np.all(family.expected() <= best.expected()) and family.accepted() < best.accepted()


def test_replay_by_hand():
    """Two depths: (0,) with one prompt, (0, 1) with two."""
    acc = np.asarray([[0.9, 0.0], [0.1, 0.5]])
    family = tree_family(acc, (1, 2), 4)
    assert family.trees[1].paths == ((0,), (0, 1)) and family.prompts[1].tolist() == [1, 1]
    ranks = np.asarray([[0, 1], [9, 9], [9, 9], [0, 0], [0, 9], [3, 0]])
    # Position 0 accepts both, and (0, 1) has one prompt. 3, with the tree of depth 1, accepts (0,), whose two prompts
    # fit the budget: 5 has the deeper tree again, and accepts nothing.
    found = replay(family, ranks)
    assert found.accepted.tolist() == [2, 1, 0] and found.depths.tolist() == [2, 1, 2]
