"""Associative recall: what an example is, and the model that adds the embeddings of a token's digits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dyncomp.attention import Attention
from dyncomp.core.aux import Aux
from dyncomp.core.errors import DyncompError
from dyncomp.experts import SwiGLU
from dyncomp.models import Block, FactoredLM, Group, apply
from dyncomp.tasks import Recall, RecallObjective

TASK = Recall(context=40, pairs=5, keys=9, values=4, fillers=3, gap=12, examples=50)


def test_every_key_is_told_once_and_asked_once_behind_the_gap():
    batch = TASK.source("train").batch(np.arange(20))
    left, right = batch["inputs"] % 6, batch["inputs"] // 6
    for row in range(20):
        told = {int(right[row, t]): t for t in range(40) if left[row, t] < 4}
        asked = {int(right[row, t]): t for t in range(40) if left[row, t] == 4}
        assert len(told) == 5 and told.keys() == asked.keys() and max(told) < 9
        for key, place in asked.items():
            assert place - told[key] >= 12
            assert batch["asked"][row, place] == 1
            assert batch["targets"][row, place] == left[row, told[key]]
        assert batch["asked"][row].sum() == 5
        others = [t for t in range(40) if left[row, t] == 5]
        assert len(others) == 30 and (right[row, others] >= 9).all()
    assert batch["inputs"].max() < 6 * 12 and TASK.radices == (6, 12)


def test_examples_depend_on_split_and_index_alone():
    train, other = TASK.source("train"), TASK.source("validation")
    again = train.batch(np.asarray([7, 3]))
    np.testing.assert_array_equal(again["inputs"][0], train.batch(np.asarray([7]))["inputs"][0])
    assert not np.array_equal(again["inputs"][0], other.batch(np.asarray([7]))["inputs"][0])
    assert {k: v.shape for k, v in TASK.spec().items()} == {
        k: v.shape[1:] for k, v in again.items()
    }


def test_only_answers_count():
    batch = TASK.source("train").batch(np.arange(3))
    logits = 9.0 * jax.nn.one_hot(batch["targets"], 18) * batch["asked"][..., None]
    found = TASK.metrics(logits, batch)
    assert found["accuracy"].value() == 1.0 and float(found["accuracy"].count) == 15
    loss, _ = RecallObjective()(logits, Aux(), batch, 0)
    np.testing.assert_allclose(loss, np.log(np.exp(9) + 17) - 9, rtol=1e-3)
    wrong = TASK.metrics(jnp.zeros_like(logits), batch)
    np.testing.assert_allclose(wrong["nll"].value(), np.log(18), rtol=1e-6)


def test_tasks_that_do_not_fit_are_refused():
    with pytest.raises(DyncompError, match="fewer pairs"):
        Recall(context=40, gap=20, pairs=11)
    with pytest.raises(DyncompError, match="1 or more"):
        Recall(values=0)


def test_embeddings_of_digits_add_up():
    block = functools.partial(
        Block, mixer=functools.partial(Attention, heads=1), ffn=functools.partial(SwiGLU, hidden=8)
    )
    model = FactoredLM(vocab_size=20, radices=(6, 12, 2), d_model=4, groups=[Group([block])])
    tokens = jnp.asarray([[5 + 6 * 11 + 72 * 1, 3, 6 * 7]], jnp.int32)
    variables = nn.unbox(jax.jit(model.init)(jax.random.key(0), tokens))
    table = np.asarray(variables["params"]["embed"])
    want = [table[5] + table[17] + table[19], table[3] + table[6] + table[18]]
    want.append(table[0] + table[13] + table[18])
    got = model.apply(variables, tokens, method="embed")
    np.testing.assert_allclose(got[0], want, rtol=1e-6)
    assert apply(model, variables, tokens)[0].shape == (1, 3, 20)
    with pytest.raises(DyncompError, match="add up"):
        FactoredLM(vocab_size=21, radices=(6, 12, 2), d_model=4, groups=[Group([block])])
