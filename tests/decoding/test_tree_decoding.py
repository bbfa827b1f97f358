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


def test_every_path_of_a_tree_sees_what_it_would_see_alone(tiny, net, random_prompts):
    """Nodes, and prompts behind nodes, against sequences that hold nothing else."""
    tables = tree_tables(FAMILY.trees[-1], FAMILY.prompts[-1], K)
    rng, text = np.random.default_rng(0), [1, 2, 3, 4]
    tokens = np.where(tables.prompt >= 0, -1, rng.integers(0, 7, len(tables.real)))
    vectors = random_prompts[np.maximum(tables.prompt, 0)][None]
    reading = begin(net.model, 1, 64)
    _, reading, _ = read(net, reading, jnp.asarray([text]), jnp.asarray([4]))
    given = (jnp.asarray(part)[None] for part in (tables.depth, tables.mask, tables.real))
    x, *_ = read_branches(net, reading, jnp.asarray(tokens, jnp.int32)[None], *given, vectors)
    for slot in range(len(tokens)):
        path = np.flatnonzero(tables.mask[slot])
        alone = np.concatenate([text, tokens[path]])[None].astype(np.int32)
        own = jnp.concatenate([jnp.zeros((1, 4, vectors.shape[2])), vectors[:, path]], axis=1)
        y = net.embed(jnp.asarray(alone), jnp.arange(alone.shape[1])[None], own)
        for index in range(2):
            y, *_ = net.block(index, y, jnp.arange(alone.shape[1])[None], None, None)
        np.testing.assert_allclose(x[0, slot], y[0, -1], atol=1e-4)


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


def test_chains_say_what_they_would_after_the_bare_prefix(net, text, random_prompts):
    found = chain_logits(net, text[1], random_prompts, jnp.asarray(CUTS), 6)
    for row, place in itertools.product(range(2), range(3)):
        cut = CUTS[row, place] + 1
        tokens = np.concatenate([TEXTS[row, :cut], [-1] * K])[None].astype(np.int32)
        vectors = jnp.concatenate([jnp.zeros((cut, 32)), random_prompts])[None]
        places = jnp.arange(cut + K)[None]
        y = net.embed(jnp.asarray(tokens), places, vectors)
        for index in range(2):
            y, *_ = net.block(index, y, places, None, None)
        np.testing.assert_allclose(found[row, place], net.classify(y)[0, cut:], atol=1e-4)


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


def test_gradients_reach_prompts_through_later_ones_only(net, text, random_prompts):
    """Term i depends on prompts 0..i; real tokens and weights get none."""
    cuts, teacher = jnp.asarray(CUTS), jnp.zeros((2, 3, K, 7))

    def term(prompts, i):
        guesses = chain_logits(net, text[1], prompts, cuts, 6)
        return guessing_loss(guesses[:, :, i : i + 1], teacher[:, :, i : i + 1])

    jacobian = jax.jacrev(lambda prompts: jnp.stack([term(prompts, i) for i in range(K)]))
    norms = np.linalg.norm(jacobian(random_prompts), axis=-1)  # [term prompt]
    assert np.all(norms[np.triu_indices(K, 1)] == 0)
    assert np.all(norms[np.tril_indices(K)] > 1e-6)


def test_training_makes_guesses_better(net, text, random_prompts):
    cuts = jnp.asarray(CUTS)
    teacher, right = greedy_labels(net, text[1], text[0], cuts, K)
    loss = lambda prompts: guessing_loss(chain_logits(net, text[1], prompts, cuts, 6), teacher)
    step, optimizer = jax.jit(jax.value_and_grad(loss)), optax.adam(0.05)
    prompts, state = random_prompts, optimizer.init(random_prompts)
    first = float(loss(prompts))
    for _ in range(60):
        _, gradient = step(prompts)
        update, state = optimizer.update(gradient, state)
        prompts = optax.apply_updates(prompts, update)
    assert float(loss(prompts)) < 0.6 * first
    flat = lambda x: np.asarray(x).reshape(6, *x.shape[2:])
    before, after = (
        guess_accuracy(flat(chain_logits(net, text[1], p, cuts, 6)), flat(right), 4)
        for p in (random_prompts, prompts)
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
