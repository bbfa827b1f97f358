"""Patterns of a model's heads: read, searched, kept, applied."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dyncomp import models
from dyncomp.attention import (
    AShape,
    Assigned,
    Attention,
    Everything,
    FrozenLines,
    TopBlocks,
    VerticalSlash,
    compare_patterns,
)
from dyncomp.attention.search import whole
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Ledger
from dyncomp.experts import SwiGLU

T, TILE, D = 40, 8, 16
PATTERNS = (
    Everything(tile=TILE), AShape(window=1, tile=TILE),
    VerticalSlash(vertical=1, slash=2, sink=1, local=2, probe=4, tile=TILE),
    TopBlocks(1, tile=TILE, sink=0),
)  # fmt: skip
mixer = functools.partial(Attention, heads=2, kv_heads=1)
block = functools.partial(models.Block, mixer=mixer, ffn=functools.partial(SwiGLU, hidden=12))
GROUPS = [models.Group([block, block], 2), models.Group([block], 1)]
MODEL = models.DecoderLM(vocab_size=13, d_model=D, groups=GROUPS)
TOKENS = jax.random.randint(jax.random.key(1), (1, T), 0, 13)


@pytest.fixture(scope="module")
def variables():
    drawn = nn.unbox(jax.jit(MODEL.init)(jax.random.key(0), TOKENS))
    return jax.tree.map(lambda x: 6.0 * x if x.ndim == 4 else x, drawn)  # livelier attention


def logits(model, variables):
    return jax.jit(functools.partial(models.apply, model))(variables, TOKENS)[0]


@pytest.fixture(scope="module")
def layers(variables):
    return list(models.read_heads(MODEL, variables, TOKENS))


def test_heads_are_those_of_the_model(variables, layers):
    _, aux = models.apply(MODEL, variables, TOKENS, capture=("heads",))
    assert len(layers) == 5
    own = [aux.plans["group_0"][f"block_{j}"]["mixer"]["heads"] for j in range(2)]
    own = [jax.tree.map(lambda x, i=i: x[i], own[j]) for i in range(2) for j in range(2)]
    own += [jax.tree.map(lambda x: x[0], aux.plans["group_1"]["block_0"]["mixer"]["heads"])]
    for found, want in zip(layers, own, strict=True):
        for name, one in zip("qkv", found, strict=True):
            np.testing.assert_allclose(one, want[name], atol=2e-5)
    again = models.read_heads(MODEL, models.unstack(variables), TOKENS)
    np.testing.assert_array_equal(next(iter(again))[0], layers[0][0])


@pytest.mark.parametrize("execution", ["scan", "unroll"])
def test_dense_heads_change_nothing(variables, execution):
    found = models.HeadPatterns(PATTERNS, np.zeros((5, 2)))
    sparse = models.with_patterns(MODEL.clone(layers=execution), variables, found, pattern_from=2)
    np.testing.assert_allclose(logits(*sparse), logits(MODEL, variables), atol=5e-4)


def test_short_prompts_stay_dense(variables):
    found = models.HeadPatterns(PATTERNS, np.ones((5, 2)))
    sparse = models.with_patterns(MODEL, variables, found)
    np.testing.assert_array_equal(logits(*sparse), logits(MODEL, variables))


def test_each_row_is_for_its_block(variables):
    """One sparse head at a time: as the same model with blocks `apart`; nothing compiles again."""
    table, call = np.zeros((5, 2), int), None
    outs = []
    for at in range(5):
        table[:] = 0
        table[at, at % 2] = 1
        found = models.HeadPatterns(PATTERNS, table)
        model, own = models.with_patterns(MODEL, variables, found, pattern_from=2)
        call = call or jax.jit(functools.partial(models.apply, model))
        outs.append(call(own, TOKENS)[0])
        assert call._cache_size() == 1
    assert len({np.asarray(out).tobytes() for out in outs}) == 5
    apart, parts = models.apart(MODEL, variables)
    told = [{"heads": row} for row in table]
    fixed = models.with_told(apart, parts, functools.partial(Assigned, PATTERNS), told)
    np.testing.assert_allclose(outs[-1], logits(*fixed), atol=1e-4)


def test_counts_are_of_what_is_chosen(variables):
    found = models.HeadPatterns(PATTERNS, np.full((5, 2), 1))
    model, own = models.with_patterns(MODEL, variables, found, pattern_from=2)
    _, aux = jax.jit(functools.partial(models.apply, model))(own, TOKENS)
    ledger = Ledger(model.cost((1, T))).record(aux.events)
    assert (
        ledger.events("needed", under="pair") == 5 * 5 * TILE**2
    )  # five diagonal tiles a head and block


def test_the_search_takes_the_least_error(layers):
    found = models.search_patterns(layers, PATTERNS[1:])
    errors = np.asarray(compare_patterns(layers, PATTERNS[1:]).error)
    assert found.heads.shape == (5, 2)
    for place in np.ndindex(5, 2):
        assert errors[(int(found.heads[place]), *place)] == errors[(slice(None), *place)].min()


def test_planted_heads_get_their_pattern():
    """Head 0 looks at one early key, head 1 at the first keys and its neighbours, at about equal cost."""
    t, p, tile = 128, 8, 8
    keys = jax.random.split(jax.random.key(3), 4)
    q, k, v = (jax.random.normal(key, (1, t, 2, p)) for key in keys[:3])
    target = 3 * jnp.ones((p,))
    q = q.at[:, :, 0].set(0.1 * q[:, :, 0] + target / 3)
    k = k.at[:, 53, 0].set(target)
    walk = jnp.cumsum(jax.random.normal(keys[3], (t, p)), axis=0)
    walk = walk / jnp.linalg.norm(walk, axis=-1, keepdims=True) * 6
    q = q.at[:, :, 1].set(walk[None])
    k = k.at[:, :, 1].set(walk[None]).at[:, :2, 1].set(walk.mean(0))
    lines = VerticalSlash(vertical=8, slash=2, sink=1, local=2, probe=8, tile=tile)
    band = AShape(window=tile + 1, sink=1, tile=tile)
    tiles = [float(x.choose(q, k, whole(t)).tiles().mean()) for x in (band, lines)]
    assert 0.7 < tiles[0] / tiles[1] < 1.4
    assert models.search_patterns([(q, k, v)], (band, lines)).heads.tolist() == [[1, 0]]


def test_a_file_and_back(tmp_path):
    table = np.random.default_rng(0).integers(0, 4, (5, 2))
    kept = models.HeadPatterns(PATTERNS, table)
    kept.save(tmp_path / "a.json")
    again = models.HeadPatterns.load(tmp_path / "a.json")
    assert again.patterns == PATTERNS and again.heads.tolist() == table.tolist()


def test_the_released_rewriting():
    kept = models.HeadPatterns(PATTERNS, [[0, 1], [2, 3]]).released(columns=2, blocks=0)
    assert kept.heads.tolist() == [[0, 2], [2, 0]]


def test_what_is_wrong_is_said(tmp_path, variables):
    with pytest.raises(DyncompError, match="index 4"):
        models.HeadPatterns(PATTERNS, [[4]])
    with pytest.raises(DyncompError, match="has 5"):
        models.with_patterns(MODEL, variables, models.HeadPatterns(PATTERNS, [[0, 0]]))
    for text in (
        "{",
        '{"patterns": [{"kind": "Os"}], "heads": [[0]]}',
        '{"patterns": [], "heads": 3}',
    ):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(DyncompError, match="no file of patterns|give patterns"):
            models.HeadPatterns.load(tmp_path / "b.json")
    with pytest.raises(DyncompError, match="no file of patterns"):
        models.HeadPatterns.load(tmp_path / "none.json")
    frozen = models.HeadPatterns((FrozenLines(PATTERNS[2]),), [[0]])
    with pytest.raises(DyncompError, match="not FrozenLines"):
        frozen.save(tmp_path / "c.json")
