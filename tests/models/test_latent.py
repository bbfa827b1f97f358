"""Latent tokens beside a feature map against float64 numpy, and what must not change them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dyncomp.core.errors import DyncompError
from dyncomp.models.bottlenecks import adaptive_pool
from dyncomp.models.latent import AttentionLayer, ReadFeatures, TokenMixer, WriteFeatures

RNG = np.random.default_rng(0)
draw = lambda *shape: RNG.normal(size=shape).astype(np.float32)


def norm(x, p):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * p["scale"] + p["bias"]


def layer(p, q, kv=None, heads=1):
    """The attention layer in float64, example by example and head by head."""
    own = norm(q, p["norm"])
    other = own if kv is None else norm(kv, p["kv_norm"])
    width = p["query"]["kernel"].shape[1] // heads
    y = np.zeros((*q.shape[:2], heads * width))
    for b in range(len(q)):
        for h in range(heads):
            cut = slice(h * width, (h + 1) * width)
            queries, keys, values = (
                rows[b] @ p[name]["kernel"][:, cut]
                for rows, name in ((own, "query"), (other, "key"), (other, "value"))
            )
            if "positions_table" in p:
                keys = keys + p["positions_table"][:, cut]
            weights = np.exp(queries @ keys.T / np.sqrt(width))
            y[b, :, cut] = weights / weights.sum(-1, keepdims=True) @ values
    y = q + y @ p["out"]["kernel"] + p["out"]["bias"]
    hidden = norm(y, p["mlp_norm"]) @ p["mlp"]["up"] + p["mlp"]["up_bias"]
    gelu = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    return y + gelu @ p["mlp"]["down"] + p["mlp"]["down_bias"]


def wide(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


@pytest.fixture(scope="module")
def reading():
    """A layer with a table of keys, its variables, queries [2 5 6] and keys [2 9 4]."""
    module, q, kv = AttentionLayer(positions=9, widening=2), draw(2, 5, 6), draw(2, 9, 4)
    params = tiny_params(module, q, kv)
    return module, params, q, kv, jax.jit(lambda p, q, kv: module.apply({"params": p}, q, kv))


def tiny_params(module, *inputs):
    """Random parameters, none left at its start."""
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs))["params"]
    return jax.tree.map(lambda leaf: jnp.asarray(0.4 * draw(*leaf.shape)), shapes)


def test_layers_equal_numpy(reading, strict):
    module, params, q, kv, run = reading
    np.testing.assert_allclose(run(params, q, kv), layer(wide(params), q, kv), rtol=1e-4, atol=1e-4)
    alone = AttentionLayer(heads=2, widening=4)
    own = tiny_params(alone, q)
    found = jax.jit(lambda p, q: alone.apply({"params": p}, q))(own, q)
    np.testing.assert_allclose(found, layer(wide(own), q, heads=2), rtol=1e-4, atol=1e-4)
    assert "kv_norm" not in own and "positions_table" not in own


def test_without_its_last_products_a_layer_is_the_identity(reading):
    _, params, q, kv, run = reading
    still = {**params, "out": jax.tree.map(jnp.zeros_like, params["out"])}
    ends = {name: jnp.zeros_like(params["mlp"][name]) for name in ("down", "down_bias")}
    still["mlp"] = {**params["mlp"], **ends}
    np.testing.assert_array_equal(run(still, q, kv), q)


def test_tokens_may_change_places_and_keys_only_with_their_table(reading):
    _, params, q, kv, run = reading
    base, tokens, places = run(params, q, kv), RNG.permutation(5), RNG.permutation(9)
    np.testing.assert_allclose(run(params, q[:, tokens], kv), base[:, tokens], rtol=1e-5, atol=1e-5)
    moved = run(params, q, kv[:, places])
    assert np.abs(moved - base).max() > 1e-2
    along = {**params, "positions_table": params["positions_table"][places]}
    np.testing.assert_allclose(run(along, q, kv[:, places]), base, rtol=1e-5, atol=1e-5)


def test_reading_and_mixing_equal_numpy():
    z, x = draw(2, 4, 6), draw(2, 6, 6, 6)
    read, mix = ReadFeatures(side=3, kernel=3), TokenMixer(2, 5)
    params, mixing = tiny_params(read, z, x), tiny_params(mix, z)
    p = wide(params)
    padded, near = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), np.zeros(x.shape)
    for i, j in np.ndindex(3, 3):
        near += padded[:, i : i + 6, j : j + 6] * p["conv"]["kernel"][i, j]
    keys = x + near + p["conv"]["bias"]
    keys = keys.reshape(2, 3, 2, 3, 2, 6).mean((2, 4)).reshape(2, 9, 6)
    found = jax.jit(lambda p, z, x: read.apply({"params": p}, z, x))(params, z, x)
    np.testing.assert_allclose(found, layer(p["attention"], z, keys), rtol=1e-4, atol=1e-4)
    m = wide(mixing)
    y = norm(z.swapaxes(1, 2), m["token_norm"]) @ m["tokens_out"]["kernel"]
    y = (y + m["tokens_out"]["bias"]).swapaxes(1, 2)
    y = norm(y, m["channel_norm"]) @ m["channels_out"]["kernel"] + m["channels_out"]["bias"]
    found = jax.jit(lambda p, z: mix.apply({"params": p}, z))(mixing, z)
    np.testing.assert_allclose(found, y, rtol=1e-4, atol=1e-4)


def test_pooling_has_the_bins_of_adaptive_average_pooling():
    x = draw(1, 5, 4, 2)
    found, wanted = np.asarray(adaptive_pool(jnp.asarray(x), 3)), np.zeros((1, 3, 3, 2))
    rows, columns = [(0, 2), (1, 4), (3, 5)], [(0, 2), (1, 3), (2, 4)]  # by hand, of 5 and of 4
    for (i, (a, b)), (j, (c, d)) in ((r, c) for r in enumerate(rows) for c in enumerate(columns)):
        wanted[:, i, j] = x[:, a:b, c:d].mean((1, 2))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_costs_by_hand():
    # 5 tokens of 6, 9 keys of 4, width 6: q 180, k and v 2 x 216, logits and mix 2 x 270, out 180, MLP 2 x 360.
    layer_cost = AttentionLayer(positions=9, widening=2).cost(5, 6, 9, 4)
    assert layer_cost.flops == 2 * (180 + 432 + 540 + 180 + 720)
    # the same tokens on a 6x6 map of 4 channels: 49 taps, 144 additions of the means, an MLP of widening 1
    read = ReadFeatures(side=3).cost(5, 6, (6, 6, 4))
    assert read.flops == 2 * 49 * 144 + 144 + 2 * (180 + 432 + 540 + 180 + 360)
    # 9 places of 16 channels read 5 tokens of 6 with width 2
    write = WriteFeatures().cost((3, 3, 16), 5, 6)
    assert write.flops == 2 * (
        9 * 16 * 2 + 2 * 5 * 6 * 2 + 2 * 9 * 5 * 2 + 9 * 2 * 16 + 2 * 9 * 256
    )
    assert TokenMixer(2, 5).cost(4, 6).flops == 2 * (4 * 2 * 6 + 2 * 6 * 5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(DyncompError, match="heads=4 do not divide width=6"):
        jax.eval_shape(AttentionLayer(heads=4).init, jax.random.key(0), draw(1, 2, 6))
    with pytest.raises(DyncompError, match="positions=4 for 9 keys"):
        jax.eval_shape(
            AttentionLayer(positions=4).init, jax.random.key(0), draw(1, 2, 6), draw(1, 9, 6)
        )
