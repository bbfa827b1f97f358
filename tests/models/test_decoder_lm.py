"""DecoderLM against a compact numpy Llama in float64, and the properties of its executions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp import models
from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Ledger
from dyncomp.models.group import check_execution


def rms(x, scale, eps=1e-6):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def silu(x):
    return x / (1 + np.exp(-x))


def numpy_attention(w, x, theta):
    t, half = x.shape[1], w["q"].shape[-1] // 2
    angle = np.arange(t)[:, None] * theta ** (-np.arange(half) / half)
    turn = np.exp(1j * angle)[None, :, None, :]

    def rotated(y):
        z = (y[..., :half] + 1j * y[..., half:]) * turn
        return np.concatenate([z.real, z.imag], -1)

    q, k, v = (np.einsum("btd,dhp->bthp", x, w[n]) for n in ("q", "k", "v"))
    shared = q.shape[2] // k.shape[2]
    q, k, v = rotated(q), np.repeat(rotated(k), shared, 2), np.repeat(v, shared, 2)
    scores = np.einsum("bthp,bshp->bhts", q, k) / np.sqrt(2 * half)
    scores[..., np.triu_indices(t, 1)[0], np.triu_indices(t, 1)[1]] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhts,bshp,hpd->btd", weights, v, w["out"])


def numpy_llama(variables, tokens, groups, theta=100.0):
    """The whole forward pass; ``groups`` are (period, repeat) pairs."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    x = p["embed"][tokens]
    for index, (period, repeat) in enumerate(groups):
        for layer, j in np.ndindex(repeat, period):
            stacked = p[f"group_{index}"]["layers"][f"block_{j}"]
            w = jax.tree.map(lambda a: a[layer], stacked)
            x = x + numpy_attention(w["mixer"], rms(x, w["mixer_norm"]["scale"]), theta)
            y, f = rms(x, w["ffn_norm"]["scale"]), w["ffn"]
            x = x + (silu(y @ f["gate"]) * (y @ f["up"])) @ f["down"]
    return rms(x, p["final_norm"]["scale"]) @ p.get("head", p["embed"].T)


GROUPS = [(2, 2), (1, 1)]


@pytest.mark.parametrize("tie", [False, True])
def test_matches_numpy(tiny, layers, tie):
    model = tiny.lm(layers=layers, tie_embeddings=tie)
    variables = tiny.init(model, tiny.tokens)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        logits, _ = tiny.apply(model, variables, tiny.tokens)
    assert logits.dtype == jnp.float32
    expected = numpy_llama(variables, np.asarray(tiny.tokens), GROUPS)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_executions_agree(tiny, remat):
    """Scan, unroll and every remat: same outputs, side results and gradients to float32 rounding."""

    def run(model):
        def loss(params):
            logits, aux = tiny.apply(model, {**variables, "params": params}, tiny.tokens)
            return jnp.mean(jnp.sin(logits)) + jnp.sum(
                aux.losses["group_0"]["block_1"]["ffn"]["size"]
            ), (
                logits,
                aux,
            )

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    variables = tiny.init(tiny.lm(), tiny.tokens)
    reference = run(tiny.lm())
    for layers in ("scan", "unroll"):
        result = run(tiny.lm(layers=layers, remat=remat))
        assert jax.tree.structure(result) == jax.tree.structure(reference)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        jax.tree.map(close, result, reference)


def test_gradients_match_numpy(tiny, layers):
    """Directional derivative over all parameters against central differences in float64."""
    model = tiny.lm(layers=layers)
    variables = tiny.init(model, tiny.tokens)
    params, controls = variables["params"], variables["controls"]
    loss = lambda p: jnp.sum(
        jnp.sin(tiny.apply(model, {"params": p, "controls": controls}, tiny.tokens)[0])
    )
    gradient = jax.jit(jax.grad(loss))(params)
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda p: 0.1 * rng.normal(size=p.shape), params)

    def value(step):
        move = lambda p, v: np.asarray(p, np.float64) + step * v
        moved = {"params": jax.tree.map(move, params, direction)}
        return np.sin(numpy_llama(moved, np.asarray(tiny.tokens), GROUPS)).sum()

    expected = (value(1e-4) - value(-1e-4)) / 2e-4
    dot = jax.tree.map(
        lambda g, v: float(np.sum(np.asarray(g, np.float64) * v)), gradient, direction
    )
    np.testing.assert_allclose(sum(jax.tree.leaves(dot)), expected, rtol=2e-3)


def test_cached_decode_equals_full(tiny, layers, counting_jit):
    model = tiny.lm(layers=layers)
    variables = tiny.init(model, tiny.tokens)
    full, _ = tiny.apply(model, variables, tiny.tokens)
    step, traces = counting_jit(
        lambda cache, tokens: tiny.apply(model, variables, tokens, cache=cache)
    )
    logits, aux = step(model.init_cache(2, 8), tiny.tokens[:, :3])
    outputs = [logits]
    for place in range(3, 7):
        logits, aux = step(aux.cache, tiny.tokens[:, place : place + 1])
        outputs.append(logits)
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), full, rtol=1e-4, atol=1e-5)
    assert len(traces) == 2


def test_caches_convert_between_executions(tiny):
    """Prefill scanned, decode unrolled."""
    scanned, separate = tiny.lm(), tiny.lm(layers="unroll")
    variables = tiny.init(scanned, tiny.tokens)
    full, _ = tiny.apply(scanned, variables, tiny.tokens)
    _, aux = tiny.apply(scanned, variables, tiny.tokens[:, :6], cache=scanned.init_cache(2, 8))
    cache = models.unstack(aux.cache)
    logits, aux = tiny.apply(separate, variables, tiny.tokens[:, 6:], cache=cache)
    np.testing.assert_allclose(logits, full[:, 6:], rtol=1e-4, atol=1e-5)
    again = models.stack(aux.cache)
    assert jax.tree.structure(again) == jax.tree.structure(scanned.init_cache(2, 8))


def test_future_does_not_leak(tiny, layers):
    model = tiny.lm(layers=layers)
    variables = tiny.init(model, tiny.tokens)
    logits, _ = tiny.apply(model, variables, tiny.tokens)
    changed = tiny.tokens.at[:, 4:].set((tiny.tokens[:, 4:] + 1) % 11)
    other, _ = tiny.apply(model, variables, changed)
    np.testing.assert_array_equal(logits[:, :4], other[:, :4])
    assert not np.allclose(logits[:, 4], other[:, 4])


def test_padding_changes_nothing(tiny, layers):
    model = tiny.lm(layers=layers)
    variables = tiny.init(model, tiny.tokens)
    mask = jnp.asarray([[1] * 5 + [0] * 2] * 2, jnp.float32)
    garbage = tiny.tokens.at[:, 5:].set(3)
    logits, aux = tiny.apply(model, variables, garbage, mask=mask)
    short, _ = tiny.apply(model, variables, tiny.tokens[:, :5])
    np.testing.assert_allclose(logits[:, :5], short, rtol=1e-4, atol=1e-5)
    assert int(aux.events["head"]["tokens"].needed) == 10
    assert int(aux.events["head"]["tokens"].executed) == 14


def test_bfloat16(tiny, layers):
    model = tiny.lm(layers=layers, dtypes=DTypes(compute="bfloat16"))
    variables = tiny.init(model, tiny.tokens)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        logits, _ = tiny.apply(model, variables, tiny.tokens)
    expected = numpy_llama(variables, np.asarray(tiny.tokens), GROUPS)
    assert logits.dtype == jnp.float32
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    assert 1e-4 < error < 0.05  # rounded, so bfloat16 was used, but not wrong


def test_ledger_by_hand(tiny, layers):
    model = tiny.lm(layers=layers)
    variables = tiny.init(model, tiny.tokens)
    _, aux = tiny.apply(model, variables, tiny.tokens)
    ledger = Ledger(model.cost(tiny.tokens.shape)).record(aux.events)
    b, t, d, h, g, p, f, v, depth = 2, 7, 16, 4, 2, 4, 12, 11, 5
    per_token = 2 * d * p * (h + 2 * g) + 2 * h * p * d + 3 * 2 * d * f
    pair = 2 * 2 * h * p
    head = b * t * 2 * d * v
    assert ledger.total("needed") == depth * b * (t * per_token + t * (t + 1) // 2 * pair) + head
    assert ledger.total("executed") == depth * b * (t * per_token + t * t * pair) + head


def test_capture(tiny, layers):
    model = tiny.lm(layers=layers)
    variables = tiny.init(model, tiny.tokens)
    _, aux = tiny.apply(model, variables, tiny.tokens)
    assert not aux.plans
    _, aux = tiny.apply(model, variables, tiny.tokens, capture=("plan", "hidden"))
    assert aux.plans["group_0"]["block_1"]["hidden"].shape == (2, 2, 7, 16)
    assert aux.plans["group_0"]["block_1"]["ffn"]["mean"].shape == (2, 2, 7)
    logits, _ = tiny.apply(model, variables, tiny.tokens)
    last = aux.plans["group_1"]["block_0"]["hidden"][-1]
    out = tiny.apply(model, variables, last, method="classify")
    np.testing.assert_allclose(out, logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("execution", "remat", "fix"),
    [("loop", "none", "'scan' or 'unroll'"), ("scan", "some", "'none', 'full' or 'dots'")],
)
def test_bad_options_are_refused(execution, remat, fix):
    with pytest.raises(DyncompError, match=fix):
        check_execution(execution, remat)


def test_bad_options_are_refused_at_construction(tiny):
    for fields in ({"layers": "loop"}, {"remat": "some"}, {"norm": "batch"}):
        with pytest.raises(Exception, match="(?s)Literal|use '"):
            tiny.init(tiny.lm(**fields), tiny.tokens)


def test_long_inputs_are_refused(tiny):
    with pytest.raises(DyncompError, match="max_length=3"):
        tiny.init(tiny.lm(max_length=3), tiny.tokens)
