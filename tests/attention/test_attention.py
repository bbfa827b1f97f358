"""Attention against numpy in float64, and the properties it must have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dyncomp.attention import Attention, attend, rope_angles, rotate
from dyncomp.attention.attention import pair_events
from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Ledger

B, T, D, H, G, P = 2, 6, 12, 4, 2, 4


@pytest.fixture
def strict_rules():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def layer(strict_rules):
    """A causal GQA layer with biases, its parameters and an input."""
    module = Attention(heads=H, kv_heads=G, head_dim=P, rope_theta=100.0, bias=True)
    x = jax.random.normal(jax.random.key(0), (B, T, D))
    params = nn.unbox(jax.jit(module.init)(jax.random.key(1), x))
    noise = iter(jax.random.split(jax.random.key(2), 20))
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(noise), p.shape), params)
    return module, params, x


def numpy_attention(params, x, *, theta=100.0, causal=True, mask=None):
    """The definition, one head and one query at a time, in float64."""
    w = {name: np.asarray(value, np.float64) for name, value in params["params"].items()}
    x = np.asarray(x, np.float64)
    b, t, _ = x.shape
    project = lambda n: np.einsum("btd,dhp->bthp", x, w[n]) + w.get(f"{n}_bias", 0.0)
    q, k, v = project("q"), project("k"), project("v")

    def turn(vector, place):
        half = len(vector) // 2
        out = np.empty_like(vector)
        for i in range(half):
            angle = place * theta ** (-2 * i / len(vector))
            pair = complex(vector[i], vector[i + half]) * np.exp(1j * angle)
            out[i], out[i + half] = pair.real, pair.imag
        return out

    h, g = q.shape[2], k.shape[2]
    mixed = np.zeros_like(q)
    for n, i, j in np.ndindex(b, t, h):
        keys = [s for s in range(t) if (s <= i or not causal) and (mask is None or mask[n, s])]
        if not keys:
            continue
        group = j // (h // g)
        rotated = turn(q[n, i, j], i) if theta else q[n, i, j]
        scores = np.array(
            [rotated @ (turn(k[n, s, group], s) if theta else k[n, s, group]) for s in keys]
        ) / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        mixed[n, i, j] = weights / weights.sum() @ v[n, keys, group]
    return np.einsum("bthp,hpd->btd", mixed, w["out"]) + w.get("out_bias", 0.0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("theta", [100.0, None])
def test_matches_definition(layer, causal, theta):
    module, params, x = layer
    y, _ = module.clone(causal=causal, rope_theta=theta).apply(params, x)
    expected = numpy_attention(params, x, causal=causal, theta=theta)
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-5)


def test_mask_hides_padding(layer):
    module, params, x = layer
    mask = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], np.float32)
    y, _ = module.apply(params, x, mask=jnp.asarray(mask))
    np.testing.assert_allclose(y, numpy_attention(params, x, mask=mask), rtol=2e-5, atol=2e-5)
    short, _ = module.apply(params, x[:1, :4])
    np.testing.assert_allclose(y[:1, :4], short, rtol=1e-5, atol=1e-6)


def test_future_does_not_leak(layer):
    module, params, x = layer
    y, _ = module.apply(params, x)
    for place in range(1, T):
        z, _ = module.apply(params, x.at[:, place:].add(3.0))
        np.testing.assert_array_equal(y[:, :place], z[:, :place])
        assert not np.allclose(y[:, place], z[:, place])


def test_rope_is_relative():
    q = jax.random.normal(jax.random.key(0), (1, 1, 1, 8))
    k = jax.random.normal(jax.random.key(1), (1, 1, 1, 8))
    at = lambda x, place: rotate(x, rope_angles(jnp.full((1, 1), place), 8, 50.0)).ravel()
    scores = [float(at(q, base + 3) @ at(k, base)) for base in (0, 1, 7, 40)]
    np.testing.assert_allclose(scores, scores[0], rtol=1e-4)
    assert abs(float(at(q, 4) @ at(k, 0)) - scores[0]) > 1e-3
    np.testing.assert_array_equal(at(q, 0), q.ravel())


def test_shifting_all_positions_changes_nothing(layer):
    module, params, x = layer
    y, _ = module.apply(params, x)
    z, _ = module.apply(params, x, positions=jnp.arange(T)[None] + 11)
    np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-5)


def test_grouped_equals_repeated_heads(layer):
    module, params, x = layer
    wide = {"params": dict(params["params"])}
    for name in ("k", "v", "k_bias", "v_bias"):
        wide["params"][name] = jnp.repeat(params["params"][name], H // G, axis=-2)
    y, _ = module.apply(params, x)
    z, _ = module.clone(kv_heads=H).apply(wide, x)
    np.testing.assert_allclose(y, z, rtol=1e-5, atol=1e-6)


def test_one_position_returns_its_value():
    """Softmax over one key is 1, so the output is the projected value."""
    module = Attention(heads=2, rope_theta=None)
    x = jax.random.normal(jax.random.key(0), (1, 1, 4))
    params = nn.unbox(jax.jit(module.init)(jax.random.key(1), x))
    w = params["params"]
    expected = jnp.einsum("btd,dhp,hpo->bto", x, w["v"], w["out"])
    np.testing.assert_allclose(module.apply(params, x)[0], expected, rtol=1e-5, atol=1e-6)


def test_gradients(layer):
    """Directional derivative against central differences of the float64 definition."""
    module, params, x = layer
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(module.apply(params, x)[0])))(x)
    direction = np.random.default_rng(0).normal(size=x.shape)
    wide = np.asarray(x, np.float64)
    value = lambda step: np.sin(numpy_attention(params, wide + step * direction)).sum()
    expected = (value(1e-5) - value(-1e-5)) / 2e-5
    np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-4)


def test_bfloat16_has_float32_softmax(strict_rules):
    """Uniform scores over 512 keys: a bfloat16 sum of the weights would be off by far more than this."""
    q = jnp.zeros((1, 1, 1, 8), jnp.bfloat16)
    k = jax.random.normal(jax.random.key(0), (1, 512, 1, 8)).astype(jnp.bfloat16)
    v = jnp.ones((1, 512, 1, 8), jnp.bfloat16)
    np.testing.assert_array_equal(attend(q, k, v, None), np.ones((1, 1, 1, 8)))
    jaxpr = str(jax.make_jaxpr(lambda q: attend(q, k, v, None))(q))
    assert "exp" in jaxpr
    assert all("f32" in line for line in jaxpr.splitlines() if "= exp " in line)


def test_bfloat16_layer(layer):
    module, params, x = layer
    half = module.clone(dtypes=DTypes(compute="bfloat16"))
    y, _ = half.apply(params, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    expected = numpy_attention(params, x)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("causal", [True, False])
def test_events_are_exact(layer, causal):
    """Hand count: tokens, and pairs that a loop over queries and keys finds."""
    module, params, x = layer
    module = module.clone(causal=causal)
    mask = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1]])
    _, aux = module.apply(params, x, mask=jnp.asarray(mask, jnp.float32))
    pairs = sum(
        int(mask[n, i] and mask[n, j] and (j <= i or not causal))
        for n in range(B)
        for i in range(T)
        for j in range(T)
    )
    ledger = Ledger(module.cost(D, T)).record(aux.events)
    projections = 2 * D * (H * P + 2 * G * P) + 2 * H * P * D
    each = 2 * H * P * 2
    assert ledger.total("needed") == mask.sum() * projections + pairs * each
    assert ledger.total("executed") == B * T * projections + B * T * T * each


def test_large_batches_do_not_overflow():
    module = Attention(heads=1, head_dim=2)
    b, t, d = 512, 4096, 2

    def events(x):
        return module.apply(params, x)[1].events

    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 2, d))))
    shapes = jax.eval_shape(events, jax.ShapeDtypeStruct((b, t, d), jnp.float32))
    assert all(leaf.dtype == jnp.int32 for leaf in jax.tree.leaves(shapes))
    needed = t * (t + 1) // 2
    counts = pair_events(jnp.full((b,), needed, jnp.int32), t * t)
    ledger = Ledger({name: cost for name, cost in module.cost(d, t).items() if "pair" in name})
    ledger.record(counts)
    assert ledger.total("needed") == b * needed * 4 * 2
    assert ledger.total("executed") == b * t * t * 4 * 2


@pytest.mark.parametrize(
    ("fields", "d", "fix"),
    [
        ({"heads": 4, "kv_heads": 3}, 12, "multiple of kv_heads"),
        ({"heads": 5}, 12, "head_dim"),
        ({"heads": 4, "head_dim": 3}, 12, "even head_dim"),
    ],
)
def test_bad_sizes_are_refused(fields, d, fix):
    with pytest.raises((DyncompError, ValueError), match=fix):
        Attention(**fields).init(jax.random.key(0), jnp.zeros((1, 2, d)))
