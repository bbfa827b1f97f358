"""Groups and the conversions between stacked and separate layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dyncomp import models
from dyncomp.core.errors import DyncompError


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(
            np.asarray(x).ravel().view(np.uint8), np.asarray(y).ravel().view(np.uint8)
        ),
        a,
        b,
    )


@pytest.fixture
def variables(tiny):
    stored = tiny.init(tiny.lm(), tiny.tokens)
    odd = iter([np.nan, -0.0, np.inf, 1e-42] * 100)
    poison = lambda p: p.reshape(-1).at[0].set(next(odd)).reshape(p.shape)
    return jax.tree.map(poison, stored)


def test_round_trip_is_bit_exact(variables):
    separate = models.unstack(variables)
    assert set(separate["params"]["group_0"]) == {"layers_0", "layers_1"}
    assert not models.is_stacked(separate)
    same_bits(models.stack(separate), variables)
    same_bits(models.unstack(models.stack(separate)), separate)


def test_layers_are_the_slices(variables):
    separate = models.unstack(variables)
    for layer in range(2):
        expected = jax.tree.map(lambda p: p[layer], variables["params"]["group_0"]["layers"])
        same_bits(separate["params"]["group_0"][f"layers_{layer}"], expected)


def test_more_than_ten_layers_keep_their_order():
    tree = {"layers": {"w": jnp.arange(12.0)}}
    separate = models.unstack(tree)
    assert [float(separate[f"layers_{i}"]["w"]) for i in range(12)] == list(range(12))
    same_bits(models.stack(dict(reversed(separate.items()))), tree)


def test_gradient_of_unstack_is_a_concatenation():
    loss = lambda t: sum(i * jnp.sum(v["w"]) for i, v in enumerate(models.unstack(t).values()))
    tree = {"layers": {"w": jnp.ones((3, 2))}}
    np.testing.assert_array_equal(jax.grad(loss)(tree)["layers"]["w"], [[0, 0], [1, 1], [2, 2]])
    text = str(jax.make_jaxpr(jax.grad(loss))(tree))
    assert "concatenate" in text
    assert "scatter" not in text and "dynamic_update_slice" not in text


def test_initialisation_does_not_depend_on_execution(tiny):
    same_bits(tiny.init(tiny.lm(), tiny.tokens), tiny.init(tiny.lm(layers="unroll"), tiny.tokens))


def test_parameters_carry_axis_names(tiny):
    boxed = jax.eval_shape(tiny.lm().init, jax.random.key(0), tiny.tokens)
    leaf = boxed["params"]["group_0"]["layers"]["block_0"]["mixer"]["q"]
    assert leaf.names == ("layers", "embed", "heads", "head_dim")
    boxes = jax.tree.leaves(boxed["params"], is_leaf=lambda n: isinstance(n, nn.meta.AxisMetadata))
    assert all(len(box.names) == len(box.value.shape) for box in boxes)


def test_mutated_controls_come_back_stacked(tiny, layers):
    model = tiny.lm(layers=layers)
    stored = tiny.init(model, tiny.tokens)
    _, updates = tiny.apply(model, stored, tiny.tokens, mutable=("controls",))
    same_bits(updates["controls"], stored["controls"])


def test_controls_are_arguments(tiny, layers, counting_jit):
    """Another value of a control needs no other program, and has an effect."""
    model = tiny.lm(layers=layers)
    stored = tiny.init(model, tiny.tokens)
    run, traces = counting_jit(lambda v: models.apply(model, v, tiny.tokens)[0])
    y = run(stored)
    halved = {**stored, "controls": jax.tree.map(lambda c: c / 2, stored["controls"])}
    assert not np.allclose(run(halved), y)
    assert len(traces) == 1


def test_every_layer_draws_its_own_noise(tiny, layers):
    model = tiny.lm(layers=layers)
    stored = tiny.init(model, tiny.tokens)
    run = lambda seed: tiny.apply(
        model, stored, tiny.tokens, train=True, rngs={"router": jax.random.key(seed)}
    )
    y, aux = run(0)
    np.testing.assert_array_equal(y, run(0)[0])
    assert not np.allclose(y, run(1)[0])


def test_instances_are_refused(tiny):
    with pytest.raises(DyncompError, match="pass the factory TinyFFN"):
        models.Block(mixer=tiny.causal, ffn=tiny.ffn())
    with pytest.raises(DyncompError, match="Block.mixer"):
        models.Block(mixer=tiny.causal(), ffn=tiny.ffn)
    with pytest.raises(DyncompError, match=r"Group.blocks\[0\]"):
        models.Group([tiny.block()])
    with pytest.raises(DyncompError, match="repeat >= 1"):
        models.Group([tiny.block], 0)


def test_single_blocks_need_separate_weights(tiny):
    model = tiny.vit()
    stored = tiny.init(model, tiny.images)
    x = tiny.apply(model, stored, tiny.images, method="embed")
    with pytest.raises(DyncompError, match="layers='unroll'"):
        tiny.apply(model, stored, 0, x, method="run_block")


def test_scan_traces_a_period_once(tiny):
    """Depth is not in the program: 24 layers trace the block as often as 4 (what keeps compile time flat)."""

    def size(repeat):
        block = functools.partial(models.Block, mixer=tiny.causal, ffn=tiny.ffn)
        model = tiny.lm(groups=[models.Group([block], repeat)])
        stored = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tiny.tokens))
        lowered = jax.jit(lambda v: model.apply(v, tiny.tokens)[0]).lower(stored)
        return len(lowered.as_text().splitlines())

    assert size(24) == size(4)
