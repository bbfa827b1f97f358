"""Static tables of a tree and acceptance along its paths, against closures and walks spelled out."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dyncomp.decoding import (
    candidate_tree,
    greedy_matches,
    longest_path,
    stack_tables,
    tree_family,
    tree_tables,
    typical_matches,
)

quick = settings(deadline=None, derandomize=True, max_examples=30)
K, V = 3, 6
ACC = -np.sort(-np.random.default_rng(0).dirichlet(np.ones(6), K)[:, :-1], axis=1)
FAMILY = tree_family(ACC, (4, 8, 10), 28)
TABLES = [tree_tables(t, p, K) for t, p in zip(FAMILY.trees, FAMILY.prompts, strict=True)]


@pytest.fixture(autouse=True)
def strictly(strict):
    """No implicit promotion anywhere in this file."""


def test_tables_by_hand():
    """Nodes (0,), (0, 0) and (1,) with 2, 1 and 1 prompts, the root with 2."""
    acc = np.asarray([[0.6, 0.3], [0.6, 0.2]])
    tree = candidate_tree(acc, 2, 3)
    assert tree.paths == ((0,), (0, 0), (1,))
    tables = tree_tables(tree, np.asarray([2, 1, 1]), 2)
    # Slots: root, (0,), (0,0), (1,), then prompts of the root, of (0,), of (0,0), of (1,).
    assert tables.parent.tolist() == [-1, 0, 1, 0, 0, 4, 1, 6, 2, 3]
    assert tables.depth.tolist() == [0, 1, 2, 1, 1, 2, 2, 3, 3, 2]
    assert tables.guess_depth.tolist() == [-1, 0, 1, 0] + [-1] * 6
    assert tables.guess_rank.tolist() == [-1, 0, 0, 1] + [-1] * 6
    assert tables.prompt.tolist() == [-1] * 4 + [0, 1, 0, 1, 0, 0]
    assert tables.paths.tolist() == [[0, 1, 2], [0, 3, -1]]
    assert tables.prompts.tolist() == [2, 2, 1, 1]
    assert tables.prompt_slots.tolist() == [[4, 5], [6, 7], [8, -1], [9, -1]]
    assert tables.mask[7].nonzero()[0].tolist() == [0, 1, 6, 7]


@quick
@given(st.integers(0, 1000), st.integers(1, 12))
def test_mask_is_the_closure_of_parents(seed, size):
    rng = np.random.default_rng(seed)
    tree = candidate_tree(ACC, K, size)
    prompts = rng.integers(1, K + 1, size)
    tables = tree_tables(tree, prompts, K)
    n = 1 + size + K + prompts.sum()
    for slot in range(n):
        seen, at = set(), slot
        while at >= 0:
            seen.add(at)
            at = int(tables.parent[at])
        assert set(tables.mask[slot].nonzero()[0].tolist()) == seen and 0 in seen
        assert tables.depth[slot] == len(seen) - 1  # position: one more than the parent's
    assert tables.mask.trace() == n == len(tables.real) and tables.real.all()
    # No candidate sees a prompt; a prompt's own chain is all it adds to its node.
    assert not tables.mask[: size + 1, size + 1 :].any()
    for node, slots in enumerate(tables.prompt_slots):
        own = slots[slots >= 0].tolist()
        assert len(own) == tables.prompts[node] == ([K, *prompts][node])
        for j, slot in enumerate(own):
            added = tables.mask[slot] & ~tables.mask[node]
            assert added.nonzero()[0].tolist() == own[: j + 1]
            assert tables.prompt[slot] == j and tables.depth[slot] == tables.depth[node] + j + 1


def test_paths_are_those_of_the_leaves():
    for tree, tables in zip(FAMILY.trees, TABLES, strict=True):
        slots = {path: i + 1 for i, path in enumerate(tree.paths)} | {(): 0}
        inner = {path[:-1] for path in tree.paths}
        leaves = [path for path in tree.paths if path not in inner]
        wanted = [[slots[path[:i]] for i in range(len(path) + 1)] for path in leaves]
        assert [[s for s in row if s >= 0] for row in tables.paths.tolist()] == wanted


def test_stacked_tables_hold_each_tree():
    whole = stack_tables(TABLES)
    assert whole.real.sum(1).tolist() == FAMILY.widths().tolist()
    for state, tables in enumerate(TABLES):
        n = len(tables.real)
        np.testing.assert_array_equal(whole.mask[state, :n, :n], tables.mask)
        assert not whole.mask[state, :n, n:].any() and not whole.mask[state, n:, :n].any()
        assert whole.mask[state].trace() == whole.real.shape[1]
        for name in ("parent", "guess_depth", "guess_rank", "prompt"):
            padded = getattr(whole, name)[state]
            np.testing.assert_array_equal(padded[:n], getattr(tables, name))
            assert (padded[n:] == -1).all()
        rows, cols = tables.paths.shape
        np.testing.assert_array_equal(whole.paths[state, :rows, :cols], tables.paths)
        assert (whole.paths[state, rows:] == -1).all() and (
            whole.paths[state, :, cols:] == -1
        ).all()
        np.testing.assert_array_equal(whole.prompts[state, : len(tables.prompts)], tables.prompts)


# acceptance


def walked(fits, tables):
    """Longest path of fitting slots, first of equals: (accepted, slots)."""
    best = (0, [0])
    for path in tables.paths.tolist():
        kept = [0]
        for slot in path[1:]:
            if slot < 0 or not fits[slot]:
                break
            kept.append(slot)
        if len(kept) - 1 > best[0]:
            best = (len(kept) - 1, kept)
    return best


match, longest = jax.jit(greedy_matches), jax.jit(longest_path)


def int32(values):
    return jnp.asarray(values, jnp.int32)


@quick
@given(st.integers(0, 1000), st.sampled_from([0, 1, 2]))
def test_greedy_acceptance(seed, state):
    rng, tables = np.random.default_rng(seed), TABLES[state]
    n, b = len(tables.real), 5
    tokens, greedy = rng.integers(0, 2, (b, n)), rng.integers(0, 2, (b, n))
    fits = match(int32(tokens), int32(greedy), int32(tables.parent))
    out = longest(fits, int32(tables.paths))
    for row in range(b):
        right = [p >= 0 and tokens[row, s] == greedy[row, p] for s, p in enumerate(tables.parent)]
        assert fits[row].tolist() == right
        accepted, slots = walked(right, tables)
        assert int(out.accepted[row]) == accepted <= state + 1
        width = tables.paths.shape[1]
        assert out.slots[row].tolist() == slots + [-1] * (width - len(slots))
        assert int(out.last[row]) == slots[-1]


def test_padding_is_never_accepted():
    """A padded place points at a slot that holds token 0, and token 0 is everywhere the argmax."""
    tables = TABLES[2]
    n = len(tables.real)
    zeros = jnp.zeros((1, n), jnp.int32)
    out = longest(match(zeros, zeros, int32(tables.parent)), int32(tables.paths))
    assert int(out.accepted[0]) == (tables.paths >= 0).sum(1).max() - 1
    short = int32([[0, 1, -1, -1], [0, 2, -1, -1]])
    out = longest_path(jnp.ones((1, n), bool), short)
    assert out.accepted.tolist() == [1] and out.slots.tolist() == [[0, 1, -1, -1]]
    nothing = longest_path(jnp.zeros((1, n), bool), short)
    assert (nothing.accepted.tolist(), nothing.last.tolist()) == ([0], [0])


def test_rows_with_different_trees_in_one_program(counting_jit):
    """Tables gathered by each row's state give what each tree alone gives."""
    whole = jax.tree.map(jnp.asarray, stack_tables(TABLES))
    rng, n = np.random.default_rng(5), whole.real.shape[1]
    tokens, greedy = rng.integers(0, 2, (2, 6, n))
    states = [0, 1, 2, 2, 1, 0]

    def accept(tokens, greedy, states):
        return longest_path(
            greedy_matches(tokens, greedy, whole.parent[states]), whole.paths[states]
        )

    jitted, traces = counting_jit(accept)
    out = jitted(int32(tokens), int32(greedy), int32(states))
    jitted(int32(tokens), int32(greedy), int32(states[::-1]))
    assert len(traces) == 1
    for row, state in enumerate(states):
        tables = TABLES[state]
        size = len(tables.real)
        fits = match(
            int32(tokens[row : row + 1, :size]),
            int32(greedy[row : row + 1, :size]),
            int32(tables.parent),
        )
        alone = longest(fits, int32(tables.paths))
        assert int(out.accepted[row]) == int(alone.accepted[0])
        assert int(out.last[row]) == int(alone.last[0])


def test_next_state_is_the_prompts_of_the_last_node():
    """Nothing accepted: the root's k prompts, so the deepest tree."""
    for tables in TABLES:
        assert tables.prompts[0] == K
        for pattern in itertools.product([False, True], repeat=3):
            fits = np.zeros((1, len(tables.real)), bool)
            fits[0, 1:4] = pattern
            out = longest(jnp.asarray(fits), int32(tables.paths))
            assert 1 <= tables.prompts[int(out.last[0])] <= K


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_typical_acceptance_in_float64(temperature):
    rng, tables = np.random.default_rng(1), TABLES[2]
    n, b = len(tables.real), 4
    tokens, logits = rng.integers(0, V, (b, n)), rng.normal(size=(b, n, V)) * 2
    p = np.exp(logits / temperature)
    p /= p.sum(-1, keepdims=True)
    h = -(p * np.log(p)).sum(-1)
    ours = np.asarray(
        typical_matches(
            int32(tokens),
            jnp.asarray(logits, jnp.float32),
            int32(tables.parent),
            temperature=temperature,
        )
    )
    for row, slot in np.ndindex(b, n):
        parent = tables.parent[slot]
        limit = min(0.09, 0.3 * np.exp(-h[row, parent]))
        wanted = parent >= 0 and p[row, parent, tokens[row, slot]] > limit
        assert ours[row, slot] == wanted
    assert 0.2 < ours.mean() < 0.8


def test_typical_acceptance_knows_which_knob_is_which():
    """Uniform over 6: p = 1/6 and alpha exp(-H) = alpha / 6: alpha decides when it is below .54, then epsilon."""
    tokens, logits = jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2, V))
    call = lambda **knobs: typical_matches(tokens, logits, int32([-1, 0]), **knobs).tolist()
    assert call() == [[False, True]]
    assert call(epsilon=0.5, alpha=1.1) == [[False, False]]
    assert call(epsilon=0.16, alpha=1.1) == [[False, True]]
    # A certain parent accepts only its own token: the limit is epsilon.
    sure = logits.at[0, 0].set(-jnp.inf).at[0, 0, 2].set(0.0)
    matches = lambda token: typical_matches(int32([[0, token]]), sure, int32([-1, 0])).tolist()
    assert matches(2) == [[False, True]] and matches(1) == [[False, False]]
