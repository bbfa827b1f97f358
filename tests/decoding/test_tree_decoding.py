"""Decoding with trees of guesses against plain greedy decoding, and the training of what guesses."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.decoding import (
    Generator,
    Sampler,
    TreeGenerator,
    best_family,
    chain_logits,
    greedy_labels,
    guess_accuracy,
    guessing_loss,
    read,
    read_branches,
    read_text,
)
from dyncomp.decoding.net import Net, separate
from dyncomp.decoding.reading import begin
from dyncomp.decoding.tree_tables import tree_tables

NEW, K = 18, 3
ACC = np.asarray([[0.4, 0.2, 0.1, 0.05], [0.3, 0.1, 0.05, 0.02], [0.2, 0.1, 0.05, 0.02]])
FAMILY = best_family(ACC, 14, first=4)
PROMPTS = [[1, 2, 3], [5, 6, 1, 2, 3, 4], [4]]


@pytest.fixture(scope="module")
def tiny(make_lm):
    """Seven tokens, so that random guesses are right now and then."""
    return make_lm(2, 3, 7)


@pytest.fixture(scope="module")
def random_prompts(tiny):
    return jax.random.normal(jax.random.key(9), (K, tiny[0].d_model))


@pytest.fixture(scope="module")
def plain(tiny):
    return [one.tokens for one in Generator(*tiny).generate(PROMPTS, NEW)]


@pytest.fixture(scope="module")
def run(tiny, random_prompts):
    """(generator, what three prompts give together, the first alone, the latter's ledger)."""
    generator = TreeGenerator(*tiny, random_prompts, FAMILY)
    together = generator.generate(PROMPTS, NEW)
    alone = generator.generate(PROMPTS[:1], NEW)
    return generator, together, alone, generator.ledger


@pytest.fixture(scope="module")
def net(tiny):
    return Net(*separate(*tiny))


def test_the_text_is_the_models_own_whatever_the_prompts_are(tiny, run, plain):
    generator, together, alone, _ = run
    assert [one.tokens for one in together] == plain and alone[0].tokens == plain[0]
    generator.prompts = 100 * generator.prompts[::-1]
    assert generator.generate(PROMPTS[:1], NEW)[0].tokens == plain[0]
    assert generator._pass._cache_size() == 2


def test_tokens_come_one_by_one_and_a_listener_ends_the_text(run, plain):
    ticks = list(run[0].stream(PROMPTS, NEW))
    assert [[int(t.tokens[row]) for t in ticks if t.emitted[row]] for row in range(3)] == plain
    (one,) = run[0].generate(PROMPTS[:1], NEW, listener=lambda tick: np.ones(1, bool))
    assert one.tokens == plain[0][:1] and one.reason == "stop" and not one.accepted


def test_passes_accept_no_more_than_their_tree_is_deep(run):
    seen = [*run[1], *run[2]]
    for one in seen:
        assert one.depths[0] == K and len(one.depths) == len(one.accepted)
        assert 1 + sum(one.accepted) + len(one.accepted) >= NEW
        for (accepted, depth), after in itertools.pairwise(
            zip(one.accepted, one.depths, strict=True)
        ):
            assert 0 <= accepted <= depth and (accepted > 0 or after[1] == K)
    assert any(max(one.accepted) > 0 for one in seen)
    assert len({depth for one in seen for depth in one.depths}) > 1


def test_the_ledger_counts_what_trees_hold(run):
    _, _, (one,), ledger = run
    nodes = [1 + len(tree.paths) for tree in FAMILY.trees]
    slots = FAMILY.widths()
    assert ledger.events(under="embed") == sum(slots[d - 1] for d in one.depths)
    assert ledger.events(under="head") == sum(nodes[d - 1] + K for d in one.depths)
    passes = len(one.depths)
    assert ledger.events("executed", under="embed") == passes * max(slots)


@pytest.fixture(scope="module")
def whole(net):
    """``run(tokens, vectors)``: last states [n d] of a pass over tokens, the last of which are given as vectors."""
    longest = 12

    @jax.jit
    def states(tokens, vectors):
        places = jnp.arange(longest)[None]
        y = net.embed(tokens, places, vectors)
        for index in range(2):
            y, *_ = net.block(index, y, places, None, None)
        return y

    def run(tokens, vectors):
        before, n = len(tokens) - len(vectors), len(tokens)
        own = np.pad(vectors, ((before, longest - n), (0, 0)))[None].astype(np.float32)
        behind = np.pad(tokens, (0, longest - n))[None].astype(np.int32)  # which nothing sees
        return np.asarray(states(behind, own))[0, :n]

    return run


def test_every_path_of_a_tree_sees_what_it_would_see_alone(net, whole, random_prompts):
    """Nodes, and prompts behind nodes, against sequences that hold nothing else."""
    tables = tree_tables(FAMILY.trees[-1], FAMILY.prompts[-1], K)
    rng, text = np.random.default_rng(0), [1, 2, 3, 4]
    tokens = np.where(tables.prompt >= 0, -1, rng.integers(0, 7, len(tables.real)))
    vectors = random_prompts[np.maximum(tables.prompt, 0)][None]

    @jax.jit
    def branches(tokens, *given):
        reading = begin(net.model, 1, 64)
        _, reading, _ = read(net, reading, jnp.asarray([text]), jnp.asarray([4]))
        return read_branches(net, reading, tokens, *given)[0]

    given = (part[None] for part in (tables.depth, tables.mask, tables.real))
    x = np.asarray(branches(np.int32(tokens)[None], *given, vectors))
    for slot in range(len(tokens)):
        path = np.flatnonzero(tables.mask[slot])
        y = whole(np.concatenate([text, tokens[path]]), np.asarray(vectors)[0, path])
        np.testing.assert_allclose(x[0, slot], y[3 + len(path)], atol=1e-4)


def test_typical_acceptance_writes_with_a_temperature(tiny, random_prompts, run):
    warm = TreeGenerator(*tiny, random_prompts, FAMILY, Sampler(temperature=1.0))
    draw = lambda seed: warm.generate(PROMPTS[:1], NEW, seed=seed)[0].tokens
    assert draw(0) == draw(0) != draw(1) and len(draw(0)) == NEW


def test_a_sequence_ends_at_its_own_token(tiny, random_prompts, plain):
    end = plain[0][7]
    generator = TreeGenerator(*tiny, random_prompts, FAMILY, eos=[end])
    (one,) = generator.generate(PROMPTS[:1], NEW)
    assert one.tokens == plain[0][: plain[0].index(end)] and one.reason == "eos"


TEXTS = np.asarray([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 3, 1]], np.int32)
CUTS = np.asarray([[1, 3, 5], [0, 2, 4]], np.int32)


@pytest.fixture(scope="module")
def text(net):
    return read_text(net, jnp.asarray(TEXTS), 9)


@pytest.fixture(scope="module")
def chains(net, text):
    """Logits of the chains of given prompts."""
    return jax.jit(lambda prompts: chain_logits(net, text[1], prompts, jnp.asarray(CUTS), 6))


def test_chains_say_what_they_would_after_the_bare_prefix(net, whole, chains, random_prompts):
    found, classify = np.asarray(chains(random_prompts)), jax.jit(net.classify)
    for row, place in itertools.product(range(2), range(3)):
        cut = CUTS[row, place] + 1
        y = whole(np.concatenate([TEXTS[row, :cut], [-1] * K]), random_prompts)
        np.testing.assert_allclose(found[row, place], classify(y[None, cut:])[0], atol=1e-4)


def test_labels_are_the_models_own_greedy_text(tiny, net, text):
    logits, tokens = greedy_labels(net, text[1], text[0], jnp.asarray(CUTS), K)
    generator = Generator(*tiny, keep_logits=True)
    for row, place in itertools.product(range(2), range(3)):
        (one,) = generator.generate([TEXTS[row, : CUTS[row, place] + 1].tolist()], K + 1)
        assert tokens[row, place].tolist() == one.tokens[1:]
        np.testing.assert_allclose(logits[row, place], one.logits[1:], atol=1e-4)


def test_the_loss_by_hand():
    rng = np.random.default_rng(0)
    own, teacher = rng.normal(size=(2, 4, 3, 7))
    soft = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    p, q = soft(teacher), soft(own)
    kl = (p * np.log(p / q)).sum(-1)
    want = (kl * np.asarray([1.0, 0.8, 0.64]) / 3).sum(-1).mean()
    args = jnp.asarray(own, jnp.float32), jnp.asarray(teacher, jnp.float32)
    np.testing.assert_allclose(guessing_loss(*args), want, rtol=1e-5)
    assert abs(float(guessing_loss(args[1] + 5.0, args[1]))) < 1e-6
    assert not np.any(jax.grad(guessing_loss, 1)(*args))


def test_gradients_reach_prompts_through_later_ones_only(chains, random_prompts):
    """Term i depends on prompts 0..i; real tokens and weights get none."""
    teacher = jnp.zeros((2, 3, K, 7))

    def term(guesses, i):
        return guessing_loss(guesses[:, :, i : i + 1], teacher[:, :, i : i + 1])

    @jax.jit
    @jax.jacrev
    def jacobian(prompts):
        guesses = chains(prompts)
        return jnp.stack([term(guesses, i) for i in range(K)])

    norms = np.linalg.norm(jacobian(random_prompts), axis=-1)  # [term prompt]
    assert np.all(norms[np.triu_indices(K, 1)] == 0)
    assert np.all(norms[np.tril_indices(K)] > 1e-6)


def test_training_makes_guesses_better(net, text, chains, random_prompts):
    teacher, right = greedy_labels(net, text[1], text[0], jnp.asarray(CUTS), K)
    loss, optimizer = lambda prompts: guessing_loss(chains(prompts), teacher), optax.adam(0.05)

    @jax.jit
    def step(prompts, state):
        value, gradient = jax.value_and_grad(loss)(prompts)
        update, state = optimizer.update(gradient, state)
        return optax.apply_updates(prompts, update), state, value

    prompts, state, values = random_prompts, optimizer.init(random_prompts), []
    for _ in range(61):
        prompts, state, value = step(prompts, state)
        values.append(float(value))
    assert values[-1] < 0.6 * values[0]
    flat = lambda x: np.asarray(x).reshape(6, *x.shape[2:])
    before, after = (
        guess_accuracy(flat(chains(p)), flat(right), 4) for p in (random_prompts, prompts)
    )
    assert after[:, 0].mean() > before[:, 0].mean() and np.all(after.sum(axis=1) <= 1)


def test_accuracy_by_hand():
    guesses = np.asarray([[[3.0, 2.0, 1.0]], [[0.0, 2.0, 1.0]]])
    right = np.asarray([[0], [2]])
    assert guess_accuracy(guesses, right, 2).tolist() == [[0.5, 0.5]]


def test_bad_input(tiny, random_prompts, net, text):
    with pytest.raises(DyncompError, match=r"give \[3, 32\]"):
        TreeGenerator(*tiny, random_prompts[:2], FAMILY)
    with pytest.raises(DyncompError, match="give more room"):
        chain_logits(net, text[1], random_prompts, jnp.zeros((2, 4), jnp.int32), 6)
    with pytest.raises(DyncompError, match="at least one token"):
        TreeGenerator(*tiny, random_prompts, FAMILY).generate([[]], 3)
