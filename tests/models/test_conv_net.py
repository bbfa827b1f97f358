"""The convolutional backbone and its internal classifiers against loops in float64, hand counts and the executors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Ledger
from dyncomp.exits import ConfidenceRule, MapExits
from dyncomp.exits.map_exits import mixed_pool, window_of
from dyncomp.models import ConvNet
from dyncomp.models.exiting import ExitingClassifier
from dyncomp.runtime import HostExecutor, MaskedExecutor, from_model

IMAGES = np.random.default_rng(0).normal(size=(11, 9, 9, 2)).astype(np.float32)
BACKBONE = functools.partial(
    ConvNet, classes=3, blocks=((4,), (6, 6), (8,)), halved=(0, 2), unit="residual", stem=4
)
BANK = functools.partial(MapExits, side=2)


POS = {"pos_weight": np.ones(2, np.float32)}


def drawn(model):
    """Parameters of the right shapes, without compiling their initialisation."""
    shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), IMAGES[:2]))["params"]
    rng = np.random.default_rng(1)
    draw = lambda s: rng.normal(size=s.shape, scale=0.5).astype(np.float32)
    return jax.tree.map(draw, shapes)


def build(**kwargs):
    options = {"backbone": BACKBONE, "exits": BANK, "rule": ConfidenceRule(threshold=0.45)}
    return ExitingClassifier(**{**options, **kwargs})


@pytest.fixture(scope="module")
def variables():
    return {"params": drawn(build()), "controls": {"thresholds": np.float32([0.62, 0.55]), **POS}}


apply = jax.jit(build().apply)


@pytest.fixture(scope="module")
def whole(variables):
    return apply(variables, IMAGES)


# references, one place at a time


def conv(x, p, stride=1):
    kernel = np.asarray(p["kernel"], np.float64)
    size = kernel.shape[0]
    pad = size // 2
    wide = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows = range(0, x.shape[1], stride)
    y = np.stack(
        [
            np.stack(
                [
                    np.einsum("bijd,ijdo->bo", wide[:, r : r + size, c : c + size], kernel)
                    for c in range(0, x.shape[2], stride)
                ],
                axis=1,
            )
            for r in rows
        ],
        axis=1,
    )
    y = y + np.asarray(p["bias"], np.float64)
    y = y - y.mean(-1, keepdims=True)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6)
    return y * np.asarray(p["norm"]["scale"]) + np.asarray(p["norm"]["bias"])


def relu(x):
    return np.maximum(x, 0)


def maps_of(params):
    x, maps = relu(conv(IMAGES.astype(np.float64), params["stem"])), []
    for index, units in enumerate((1, 2, 1)):
        block = params[f"block_{index}"]
        for unit in range(units):
            stride = 2 if index in (0, 2) and unit == 0 else 1
            y = relu(conv(x, block[f"conv_{unit}"], stride))
            y = conv(y, block[f"second_{unit}"])
            if f"short_{unit}" in block:
                x = conv(x, block[f"short_{unit}"], stride)
            x = relu(x + y)
        maps.append(x)
    return maps


def pooled(x, mix, side):
    """Windows as slices, clipped at the border."""
    step = -(-x.shape[1] // side)
    starts = range(0, x.shape[1], step)
    cut = [[x[:, r : r + step, c : c + step] for c in starts] for r in starts]
    of = lambda f: np.stack([np.stack([f(w, axis=(1, 2)) for w in row], 1) for row in cut], 1)
    return mix * of(np.max) + (1 - mix) * of(np.mean)


def test_network_and_exits_equal_loops_in_float64(variables, whole):
    params = variables["params"]
    maps = maps_of(params["net"])
    assert [m.shape[1:] for m in maps] == build().backbone().exit_shapes(IMAGES.shape)
    wanted = []
    for index, x in enumerate(maps[:-1]):
        p = params["bank"][f"exit_{index}"]
        flat = pooled(x, float(p["mix"]), 2).reshape(len(x), -1)
        wanted.append(flat @ np.asarray(p["kernel"], np.float64) + np.asarray(p["bias"]))
    head = params["net"]["linear"]
    wanted.append(maps[-1].mean((1, 2)) @ np.asarray(head["kernel"]) + np.asarray(head["bias"]))
    np.testing.assert_allclose(whole[0]["logits"], np.stack(wanted), atol=2e-4)


def test_windows_cover_the_map():
    assert window_of(14, 4) == (4, 4) and window_of(7, 4) == (2, 4) and window_of(5, 4) == (2, 3)
    x = np.random.default_rng(1).normal(size=(2, 5, 5, 3))
    for mix in (0.0, 0.3, 1.0):
        ours = mixed_pool(jnp.float32(x), jnp.float32(mix), 4)
        np.testing.assert_allclose(ours, pooled(x, mix, 4), atol=1e-6)


def test_the_2x2_maximum():
    net = ConvNet(classes=2, blocks=((3,), (3,)), halved=(1,), halving="pool", norm=None)
    params = drawn(net)
    (first, second), _ = net.apply({"params": params}, IMAGES[:2], method="features")
    most = np.asarray(first)[:, :8, :8].reshape(2, 4, 2, 4, 2, 3).max((2, 4))
    p = params["block_1"]["conv_0"]
    own = np.asarray(second, np.float64)
    assert own.shape == (2, 4, 4, 3)
    wide = np.pad(most, ((0, 0), (1, 1), (1, 1), (0, 0)))
    at = np.einsum("bijd,ijdo->bo", wide[:, 2:5, 1:4], np.asarray(p["kernel"]))
    np.testing.assert_allclose(own[:, 2, 1], relu(at + np.asarray(p["bias"])), atol=1e-5)
    # 3 comparisons a window, 3x3x3x3 products a place; the first block reads two channels at 9x9.
    assert [price.flops for price in net.block_prices(IMAGES.shape)] == [
        2 * 81 * 9 * 2 * 3,
        3 * 16 * 3 + 2 * 16 * 9 * 3 * 3,
    ]


def test_prices_by_hand(variables, whole):
    model = build()
    maps = [(25, 4), (25, 6), (9, 8)]
    stem = 2 * 81 * 9 * 2 * 4
    blocks = [
        2 * 25 * (9 * 16 + 9 * 16 + 16),
        2 * 25 * (9 * 24 + 9 * 36 + 24 + 2 * 9 * 36),
        2 * 9 * (9 * 48 + 9 * 64 + 48),
    ]
    heads = [2 * n * d + 4 * 4 * d + 2 * 4 * d * 3 for n, d in maps[:2]]
    heads.append(9 * 8 + 2 * 8 * 3)
    wanted = [b + h for b, h in zip(blocks, heads, strict=True)]
    wanted[0] += stem
    prices = model.cost(IMAGES.shape)
    assert [price.flops for price in prices.values()] == wanted
    np.testing.assert_allclose(whole[0]["costs"], np.cumsum(wanted) / sum(wanted), rtol=1e-6)
    ledger = Ledger(prices).record(whole[1].events)
    left = np.asarray(whole[0]["exit"])
    assert ledger.total("needed") == sum(np.cumsum(wanted)[left])
    net = model.backbone()
    alone = Ledger(net.cost(IMAGES.shape)).record(
        net.apply({"params": variables["params"]["net"]}, IMAGES[:2])[1].events
    )
    assert alone.total("needed") == 2 * (stem + sum(blocks) + heads[-1])


def test_segments_agree_with_the_whole(variables, whole):
    logits = np.asarray(whole[0]["logits"], np.float64)
    sure = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).max(-1)
    model = build(fallback="most_confident")
    net = from_model(model, variables, IMAGES.shape)
    own = [segment.weights["params"] for segment in net.segments]
    assert [sorted(each["bank"]) for each in own] == [["exit_0"], ["exit_1"], []]
    assert sorted(own[1]["net"]) == ["block_1", "linear"]
    assert sorted(net.begin_weights["params"]["net"]) == ["stem"]
    # Thresholds between the scores, so that some images leave at each exit.
    middle = lambda scores, k: np.sort(scores)[k : k + 2].mean()
    net.thresholds[:] = [middle(sure[0], 7), middle(sure[1], 6)]
    leave = np.stack([*(sure[:2] >= np.asarray(net.thresholds)[:, None]), np.ones(11, bool)])
    left = leave.argmax(0)
    assert set(left[:8]) == {0, 1, 2}
    said = np.where(left == 2, sure.argmax(0), left)
    assert (said != left)[:8].any()
    masked = MaskedExecutor(net)(IMAGES)
    host = HostExecutor(net, IMAGES, capacity=8)(IMAGES[:8])
    np.testing.assert_array_equal(masked.plan.exit, left)
    np.testing.assert_array_equal(host.plan.exit, left[:8])
    np.testing.assert_allclose(masked.outputs[:8], host.outputs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(masked.outputs, logits[said, np.arange(11)], rtol=1e-4, atol=1e-5)
    # The model decides alike when everything runs, and by default the final classifier has the last word.
    controls = {**POS, "thresholds": np.float32(net.thresholds)}
    output, _ = apply({**variables, "controls": controls}, IMAGES)
    np.testing.assert_array_equal(output["exit"], left)
    np.testing.assert_array_equal(model.spoken(output["logits"], output["exit"]), said)
    np.testing.assert_array_equal(
        output["emitted"], np.asarray(output["logits"])[left, np.arange(11)]
    )


def test_bad_fields_are_refused(unchecked):
    with pytest.raises(DyncompError, match="halved"):
        ConvNet(classes=2, blocks=((3,),), halved=(1,))
    with pytest.raises(DyncompError, match="'plain'"):
        ConvNet(classes=2, blocks=((3,),), unit="dense")  # type: ignore[arg-type]
    with pytest.raises(DyncompError, match="'stride'"):
        ConvNet(classes=2, blocks=((3,),), halving="mean")  # type: ignore[arg-type]
    with pytest.raises(DyncompError, match="at least one"):
        ConvNet(classes=2, blocks=((),))
    with pytest.raises(DyncompError, match="side=0"):
        MapExits(exits=1, classes=2, side=0)
    with pytest.raises(DyncompError, match="'most_confident'"):
        build(fallback="surest")
