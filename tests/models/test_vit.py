"""VisionTransformer against numpy in float64, and its stages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp import models
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Ledger
from dyncomp.models.vit import patches


def norm(x, w, eps=1e-6):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * w["scale"] + w["bias"]


def numpy_vit(variables, images, depth, patch, pool):
    """Logits and the per-block features, in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    e, (b, h, w, _) = p["patches"], images.shape
    rows = [
        np.asarray(images, np.float64)[:, i : i + patch, j : j + patch].reshape(b, -1)
        for i in range(0, h, patch)
        for j in range(0, w, patch)
    ]
    x = np.stack(rows, 1) @ e["kernel"] + e["bias"]
    if pool == "cls":
        x = np.concatenate([np.tile(e["cls"], (b, 1, 1)), x], 1)
    x, seen = x + e["positions"], []
    for layer in range(depth):
        u = jax.tree.map(lambda a: a[layer], p["group_0"]["layers"]["block_0"])
        y, m = norm(x, u["mixer_norm"]), u["mixer"]
        q, k, v = (np.einsum("btd,dhp->bthp", y, m[n]) for n in ("q", "k", "v"))
        scores = np.exp(np.einsum("bthp,bshp->bhts", q, k) / np.sqrt(q.shape[-1]))
        weights = scores / scores.sum(-1, keepdims=True)
        x = x + np.einsum("bhts,bshp,hpd->btd", weights, v, m["out"])
        y, f = norm(x, u["ffn_norm"]), u["ffn"]
        gate = y @ f["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ f["up"])) @ f["down"]
        final = norm(x, p["final_norm"])
        seen.append(final[:, 0] if pool == "cls" else final.mean(1))
    return seen[-1] @ p["head"]["kernel"] + p["head"]["bias"], np.stack(seen)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_matches_numpy(tiny, layers, pool):
    model = tiny.vit(layers=layers, pool=pool)
    variables = tiny.init(model, tiny.images)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        logits, _ = tiny.apply(model, variables, tiny.images)
        features, _ = tiny.apply(model, variables, tiny.images, method="features")
    expected, seen = numpy_vit(variables, np.asarray(tiny.images), 3, 2, pool)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(features, seen, rtol=1e-4, atol=2e-5)


def test_segments_compose_to_the_model(tiny):
    model = tiny.vit(layers="unroll")
    stored = tiny.init(model, tiny.images)
    separate = models.unstack(stored)
    x = tiny.apply(model, separate, tiny.images, method="embed")
    for index in range(model.depth):
        x, aux = tiny.apply(model, separate, index, x, method="run_block")
        assert set(aux.events) == {"mixer", "ffn"}
    whole, _ = tiny.apply(model, stored, tiny.images)
    np.testing.assert_allclose(
        tiny.apply(model, separate, x, method="classify"), whole, rtol=1e-5, atol=1e-6
    )
    with pytest.raises(DyncompError, match="past the last of 3"):
        tiny.apply(model, separate, 3, x, method="run_block")


def test_periods_of_two_keep_execution_order(tiny):
    block = tiny.vit().groups[0].blocks[0]
    model = tiny.vit(
        groups=[models.Group([block, block], 2), models.Group([block])], layers="unroll"
    )
    separate = models.unstack(tiny.init(model, tiny.images))
    features, _ = tiny.apply(model, separate, tiny.images, method="features")
    x = tiny.apply(model, separate, tiny.images, method="embed")
    for index in range(model.depth):
        x, _ = tiny.apply(model, separate, index, x, method="run_block")
        pooled = tiny.apply(model, separate, x, method="pooled")
        np.testing.assert_allclose(features[index], pooled, rtol=1e-5, atol=1e-6)


def test_masked_examples_count_as_executed_only(tiny, layers):
    model = tiny.vit(layers=layers)
    variables = tiny.init(model, tiny.images)
    mask = jnp.asarray([1.0, 1.0, 0.0])
    logits, aux = tiny.apply(model, variables, tiny.images, mask=mask)
    whole, _ = tiny.apply(model, variables, tiny.images)
    np.testing.assert_allclose(logits[:2], whole[:2], rtol=1e-5, atol=1e-6)
    ledger = Ledger(model.cost(tiny.images.shape)).record(aux.events)
    assert 3 * ledger.total("needed") == 2 * ledger.total("executed")
    t, d, h, p, f = 7, 16, 4, 4, 12
    block = t * (8 * d * h * p + 6 * d * f) + t * t * 4 * h * p
    assert ledger.total("executed") == 3 * (3 * block + 6 * 2 * 4 * d + 2 * d * 5)


def test_bad_options(tiny):
    with pytest.raises(Exception, match="(?s)Literal|use 'cls'"):
        tiny.vit(pool="max")
    with pytest.raises(DyncompError, match="choose a divisor"):
        patches(tiny.images, 4)
