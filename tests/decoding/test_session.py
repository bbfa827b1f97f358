"""Reading several tokens at once and taking them back, against whole forward passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp import models
from dyncomp.attention import Attention
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Ledger
from dyncomp.decoding import (
    Confident,
    ExitEarly,
    FullDepth,
    Generator,
    KeepLayers,
    OtherModel,
    Session,
    SpeculativeGenerator,
)
from dyncomp.decoding.session import width
from dyncomp.experts import SwiGLU
from dyncomp.models import Block, DecoderLM, Group

TEXT = [[1, 2, 3, 9, 8, 7, 6, 5], [5, 6, 7, 8, 9, 10, 11, 12]]


@pytest.fixture(scope="module")
def forward(lm):
    model, variables, _ = lm
    apply = jax.jit(functools.partial(models.apply, model, variables))
    return lambda tokens: np.asarray(apply(jnp.asarray([tokens]))[0][0])


@pytest.fixture(scope="module")
def session(lm):
    return Session(*lm[:2])


def test_pieces_give_the_logits_of_the_whole(session, forward):
    """Rows of different lengths, an empty one, and a padded width."""
    first = session.open([TEXT[0][:3], []], 64)
    np.testing.assert_allclose(first[0], forward(TEXT[0][:3])[-1], atol=1e-5)
    pieces = session.extend([TEXT[0][3:4], TEXT[1][:3]])
    np.testing.assert_allclose(pieces[0, 0], forward(TEXT[0][:4])[-1], atol=1e-5)
    np.testing.assert_allclose(pieces[1], forward(TEXT[1][:3]), atol=1e-5)
    last = session.step([TEXT[0][4:], TEXT[1][3:5]])
    np.testing.assert_allclose(last[0], forward(TEXT[0])[-1], atol=1e-5)
    np.testing.assert_allclose(last[1], forward(TEXT[1][:5])[-1], atol=1e-5)
    assert session.read.tolist() == [8, 5] and session.slots == 3 + 3 + 4


def test_what_is_taken_back_leaves_no_trace(session, forward):
    for row in (0, 1):
        session.open([TEXT[row][:3]], 64)
        session.extend([[40, 41, 42, 43]])
        session.take_back([4])
        assert session.slots == 3
        np.testing.assert_allclose(
            session.step([TEXT[row][3:]])[0], forward(TEXT[row])[-1], atol=1e-5
        )


def test_rows_take_back_different_numbers(session, forward):
    session.open([TEXT[0][:3], TEXT[1][:3]], 64)
    session.extend([[*TEXT[0][3:5], 40], [41, 42, 43]])
    session.take_back([1, 3])
    assert session.read.tolist() == [5, 3] and session.slots == 5
    found = session.extend([TEXT[0][5:], TEXT[1][3:6]])
    np.testing.assert_allclose(found[0], forward(TEXT[0])[5:], atol=1e-5)
    np.testing.assert_allclose(found[1], forward(TEXT[1][:6])[3:], atol=1e-5)
    with pytest.raises(DyncompError, match="take_back"):
        session.take_back([4, 0])


def test_the_ledger_counts_real_tokens_and_pairs(lm, session):
    session.open([TEXT[0][:3], TEXT[1][:2]], 64)
    session.extend([TEXT[0][3:6], TEXT[1][2:3]])
    price = Ledger(lm[0].cost((1, 1)))
    assert session.prompt_ledger.events(under="head") == 5
    assert session.ledger.events(under="head") == 4
    assert session.ledger.events(under="pairs") == 6 * (4 + 5 + 6 + 3)
    assert session.ledger.events("executed", under="head") == 2 * 4 and price.total() == 0


def test_programs_are_few(lm):
    session = Session(*lm[:2])
    for tokens in (1, 1, 3, 4, 2, 1):
        session.open([TEXT[0][:3]], 64)
        session.step([TEXT[0][:tokens]])
        session.take_back([tokens])
    assert session._extend._cache_size() == 3
    assert [width(n) for n in (0, 1, 3, 9, 23, 100)] == [1, 1, 4, 16, 24, 128]


def test_texts_that_fit_are_not_padded_past_the_limit(lm, forward):
    """33 tokens would be padded to 48."""
    text = [1 + n % 60 for n in range(33)]
    short = lm[0].clone(max_length=40)
    session = Session(short, lm[1])
    np.testing.assert_allclose(session.open([text], 64)[0], forward(text)[-1], atol=1e-5)
    assert width(33, 40) == 40 and width(33, 400) == 48 and width(41, 40) == 41
    (want,) = Generator(*lm[:2]).generate([text], 7)
    (got,) = SpeculativeGenerator(short, lm[1], OtherModel(*lm[:2])).generate([text], 7)
    assert got.tokens == want.tokens
    drafter = OtherModel(lm[0].clone(max_length=36), lm[1])
    with pytest.raises(DyncompError, match="exceed the model's 36"):
        SpeculativeGenerator(*lm[:2], drafter).generate([text], 7)


def test_bad_input(lm, session):
    with pytest.raises(DyncompError, match="vocabulary of 61"):
        session.open([[61]], 64)
    with pytest.raises(DyncompError, match="cache of 16"):
        session.open([[1] * 17], 16)
    session.open([[1]], 16)
    with pytest.raises(DyncompError, match="2 rows for a session of 1"):
        session.step([[1], [2]])
    short = Session(lm[0].clone(max_length=4), lm[1])
    with pytest.raises(DyncompError, match="at most 4 tokens"):
        short.open([[1] * 5], 64)
    mixer = functools.partial(Attention, heads=4, window=3)
    block = functools.partial(Block, mixer=mixer, ffn=functools.partial(SwiGLU, hidden=48))
    model = lm[0].clone(groups=(Group([block]),))
    with pytest.raises(DyncompError, match="window of 3 slots"):
        Session(model, lm[1]).open([[1], [2]], 64)


@pytest.fixture(scope="module")
def placed():
    """A model with a table of positions and no RoPE, as GPT-2."""
    mixer = functools.partial(Attention, heads=4, rope_theta=None, bias=True)
    block = functools.partial(
        Block, mixer=mixer, ffn=functools.partial(SwiGLU, hidden=48), norm="layer"
    )
    model = DecoderLM(
        vocab_size=61, d_model=32, groups=[Group([block], 3)], norm="layer", learned_positions=24
    )
    variables = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 4), jnp.int32))
    params = jax.tree.map(lambda x: x, variables["params"])
    params["positions"] = jax.tree.map(lambda x: 40 * x, params["positions"])
    return model, {"params": params}


@pytest.mark.parametrize(
    "policy", [FullDepth(), KeepLayers((0, 1, 2)), ExitEarly((1, 2), rule=Confident())]
)
def test_learned_positions_reach_every_way_of_running_blocks(lm, placed, policy):
    model, variables = placed
    generator = Generator(model, variables, policy, keep_logits=True)
    for prompt, one in zip(lm[2], generator.generate(lm[2], 6), strict=True):
        tokens = jnp.asarray([prompt + one.tokens])
        want = np.asarray(models.apply(model, variables, tokens)[0][0])[len(prompt) - 1 : -1]
        np.testing.assert_allclose(one.logits, want, atol=1e-5)


@pytest.mark.parametrize("policy", [FullDepth(), KeepLayers((0, 2))])
def test_a_text_ends_before_the_table_of_positions_does(placed, policy):
    """A position past the table's end would be NaN."""
    model, variables = placed
    generator = Generator(model, variables, policy)
    (one,) = generator.generate([[1, 2, 3]], 21)
    assert len(one.tokens) == 21
    with pytest.raises(
        DyncompError, match="3 tokens of prompt and 22 new ones exceed the model's 24"
    ):
        generator.generate([[1, 2, 3]], 22)


def test_a_session_ends_with_the_table_of_positions(placed):
    session = Session(*placed)
    assert np.isfinite(session.open([[1] * 23], 64)).all()
    assert np.isfinite(session.step([[2]])).all()
    with pytest.raises(DyncompError, match="at most 24 tokens"):
        session.step([[3]])


def test_a_session_knows_learned_positions(placed):
    session = Session(*placed)
    session.open([TEXT[0][:3]], 64)
    found = session.extend([TEXT[0][3:]])
    want = np.asarray(models.apply(*placed, jnp.asarray(TEXT[:1]))[0][0])
    np.testing.assert_allclose(found[0], want[3:], atol=1e-5)
