"""A U-ViT with exits: executions agree, options do what they say, prices are XLA's, sampling is per image."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from dyncomp.attention import Attention
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Ledger
from dyncomp.diffusion import (
    CertaintyProbes,
    CertaintyRule,
    DenoisingObjective,
    EulerMaruyama,
    sample,
)
from dyncomp.experts import MLP
from dyncomp.models import Block, ExitingDenoiser, UViT, layout
from dyncomp.models.denoising import packed
from dyncomp.models.uvit import unpatched
from dyncomp.models.vit import patches
from dyncomp.runtime import HostExecutor, MaskedExecutor, from_model

DEPTH = 3


def build(layers="unroll", **fields):
    block = functools.partial(
        Block,
        mixer=functools.partial(Attention, heads=2, rope_theta=None, causal=False),
        ffn=functools.partial(MLP, hidden=16),
        norm="layer",
    )
    net = functools.partial(
        UViT, size=4, channels=1, patch=2, d_model=8, depth=DEPTH - 1, block=block, layers=layers
    )
    return ExitingDenoiser(backbone=net, **fields)


IMAGES = np.random.default_rng(0).normal(size=(6, 4, 4, 1)).astype(np.float32)
TIMES = np.linspace(0.1, 0.9, 6, dtype=np.float32)
KEYS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def variables(model):
    shapes = nn.meta.unbox(jax.eval_shape(model.init, KEYS, IMAGES))
    rng = np.random.default_rng(1)
    draw = lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), leaf.dtype)
    params = jax.tree.map(draw, shapes["params"])
    return {"params": params, "controls": {"thresholds": jnp.ones((DEPTH - 1,))}}


@pytest.fixture(scope="module")
def run(model):
    """The model on clean images, compiled."""
    return jax.jit(lambda variables: layout.apply(model, variables, IMAGES, capture=("plan",)))


@pytest.fixture(scope="module")
def everything(model, variables):
    """(inner, certainty) on x_t = IMAGES."""
    call = lambda v: layout.apply(model, v, IMAGES, jnp.asarray(TIMES), method="denoise")
    return jax.jit(call)(variables)


@pytest.fixture(scope="module")
def host(model, variables):
    inputs = packed(IMAGES, TIMES)
    return HostExecutor(
        from_model(model, variables, IMAGES.shape), inputs, capacity=6, buckets=(1, 6)
    )


def halving(means):
    """Thresholds [y] at which half of those still there leave, for means [x b]."""
    left, found = np.arange(means.shape[1]), []
    for row in means[:-1]:
        found.append(np.median(row[left]))
        left = left[row[left] <= found[-1]]
    return np.float32(found)


def test_segments_agree_under_executors(model, variables, host, everything):
    inputs = packed(IMAGES, TIMES)
    thresholds = halving(np.asarray(everything[1]).mean(axis=(2, 3, 4)))
    own = {**variables, "controls": {"thresholds": jnp.asarray(thresholds)}}
    masked = MaskedExecutor(from_model(model, own, IMAGES.shape))(inputs)
    host.thresholds[:] = [*thresholds, 0]
    compact = host(inputs)
    assert set(masked.exits) == {0, 1, 2}
    np.testing.assert_array_equal(masked.exits, compact.exits)
    np.testing.assert_allclose(masked.outputs, compact.outputs, rtol=1e-5, atol=1e-5)
    inner, certainty = (np.asarray(a) for a in everything)
    wanted = inner[masked.exits, np.arange(6)]
    np.testing.assert_allclose(compact.outputs, wanted, rtol=1e-4, atol=1e-5)
    means = certainty.mean(axis=(2, 3, 4)).T
    seen = ~np.isnan(masked.scores)
    np.testing.assert_allclose(masked.scores[seen], means[seen], rtol=1e-5)
    assert seen.sum() == masked.visits.sum()  # a probe for every block that ran


def test_thresholds_of_one_and_zero(host, everything):
    inputs = packed(IMAGES, TIMES)
    host.thresholds[:] = 1.0
    whole = host(inputs)
    assert (whole.exits == DEPTH - 1).all() and not np.isnan(whole.scores).any()
    np.testing.assert_allclose(whole.outputs, everything[0][-1], rtol=1e-4, atol=1e-5)
    host.thresholds[:] = 0.0
    assert (host(inputs).exits == 0).all()


def test_model_decides_and_charges_as_segments_do(model, variables, run, host):
    output, _ = run(variables)
    thresholds = halving(np.asarray(output["certainty"]).mean(axis=(2, 3, 4)))
    output, aux = run({**variables, "controls": {"thresholds": jnp.asarray(thresholds)}})
    noised = model.schedule.noised(jnp.asarray(IMAGES), output["noise"], output["times"])
    host.thresholds[:] = [*thresholds, 0]
    found = host(packed(noised, output["times"]))
    assert set(found.exits) == {0, 1, 2}
    np.testing.assert_array_equal(output["exit"], found.exits)
    np.testing.assert_allclose(output["emitted"], found.outputs, rtol=1e-4, atol=1e-5)
    ledger = Ledger(model.cost(IMAGES.shape)).record(aux.events)
    assert ledger.total("needed") == found.ledger.total("needed")
    whole = sum(price.flops for price in model.cost(IMAGES.shape).values())
    assert ledger.total("executed") == 6 * whole > ledger.total("needed")
    np.testing.assert_array_equal(aux.plans["exit"].exit, output["exit"])
    # A threshold that nobody passes gives the whole network, bit for bit.
    output, _ = run(variables)
    np.testing.assert_array_equal(output["emitted"], output["inner"][-1])
    np.testing.assert_array_equal(output["emitted"], output["final"])


def test_scan_is_unroll(variables, everything):
    call = lambda v: build("scan").apply(v, IMAGES, jnp.asarray(TIMES), method="denoise")
    for one, other in zip(jax.jit(call)(variables), everything, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_each_loss_moves_what_it_should(model, variables):
    objective, mask = DenoisingObjective(), jnp.ones((6,))

    @jax.jit
    def grads(params):
        def output(params):
            return layout.apply(model, {**variables, "params": params}, IMAGES)[0]

        l_u = jax.grad(lambda p: objective.probes(output(p), mask))(params)
        l_ual = jax.grad(lambda p: objective.layers(output(p), mask))(params)
        held = DenoisingObjective(detach_weights=True)
        return l_u, l_ual, jax.grad(lambda p: held.layers(output(p), mask))(params)

    l_u, l_ual, held = grads(variables["params"])
    largest = lambda tree: max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))
    assert largest(l_u["net"]) == 0 < largest(l_u["probes"])
    assert largest(held["probes"]) == 0 < largest(l_ual["probes"])
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    jax.tree.map(same, l_ual["net"], held["net"])
    assert largest(l_ual["net"]) > 0


def test_training_draws_its_own_noise_and_evaluation_the_same(model):
    draw = lambda **rngs: model.apply({}, IMAGES.shape, method="draw", **rngs)
    one, other = (draw(rngs={"dropout": jax.random.key(seed)}) for seed in (2, 3))
    for a, b in zip(one, other, strict=True):
        assert not np.array_equal(a, b)
    assert ((one[0] >= 0) & (one[0] < 1)).all()
    times, noise = draw()
    np.testing.assert_allclose(times, (np.arange(6) + 0.5) / 6, rtol=1e-6)
    np.testing.assert_array_equal(noise, draw()[1])


def test_sampling_in_a_batch_is_sampling_alone(host):
    sampler = EulerMaruyama(steps=3)
    keys = jax.random.split(jax.random.key(5), 6)
    x = np.random.default_rng(3).normal(size=IMAGES.shape).astype(np.float32)
    first = host(packed(x, np.ones(6)))
    host.thresholds[:] = [np.median(first.scores[:, 0]), 1, 0]

    def denoise(x, times, index):
        done = host(packed(x, times))
        return done.outputs, done.exits

    whole, exits = sample(sampler, denoise, x, keys)
    assert len(np.unique(exits)) > 1
    for row in (0, 4):
        alone, own = sample(sampler, denoise, x[row : row + 1], keys[row : row + 1])
        np.testing.assert_array_equal(np.ravel(own), np.stack(exits)[:, row])
        np.testing.assert_allclose(alone[0], whole[row], rtol=1e-4, atol=1e-5)


def test_prices(model):
    """Multiply-adds of a block by hand: t = 5 tokens, d = 8, f = 16, p = 2, two FLOPs each."""
    t, d, f, o, pixels = 5, 8, 16, 4, 16
    block = 2 * t * (4 * d * d + 2 * d * f) + 2 * 2 * t * t * d
    exits = 2 * 4 * d * o + 2 * 4 * d * o + 2 * 9 * pixels  # probe, head's map, its convolution
    skip = 2 * t * 2 * d * d
    embed = 2 * 4 * o * d
    found = [price.flops for price in model.cost(IMAGES.shape).values()]
    plain = block + exits
    assert found == [plain + embed, plain, plain + skip]
    np.testing.assert_allclose(model.cumulative_costs(IMAGES.shape)[-1], 1.0)


def test_skips_are_last_in_first_out(model):
    net = model.backbone()
    assert [net.skip_of(i) for i in range(3)] == [None, None, 0]
    six = functools.partial(model.backbone, depth=6)()
    assert [six.skip_of(i) for i in range(7)] == [None, None, None, None, 2, 1, 0]
    assert (six.blocks, six.half, six.length) == (7, 3, 5)


def test_patches_there_and_back():
    images = jnp.asarray(np.random.default_rng(4).normal(size=(2, 3, 4, 4, 2)).astype(np.float32))
    rows = jnp.stack([patches(one, 2) for one in images])
    np.testing.assert_array_equal(unpatched(rows, 2), images)


def test_a_split_batch_is_never_gathered(model, variables):
    """The head reads all blocks at once: a merged axis with the blocks outside could not stay split."""
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    images, times = jax.device_put((IMAGES, TIMES), split)
    run = jax.jit(lambda v, x, t: layout.apply(model, v, x, t, method="denoise"))
    text = run.lower(variables, images, times).compile().as_text()
    assert "all-reduce(" not in text and "all-gather(" not in text
    for ours, whole in zip(
        run(variables, images, times), run(variables, IMAGES, TIMES), strict=True
    ):
        np.testing.assert_allclose(ours, whole, atol=1e-5)


def test_probe_option_changes_parameters_and_price():
    timed, plain = build(probes=functools.partial(CertaintyProbes, time="concatenated")), build()
    shapes = nn.meta.unbox(jax.eval_shape(timed.init, KEYS, IMAGES))["params"]["probes"]
    assert shapes["kernel"].shape == (DEPTH, 16, 4)
    gap = timed.cost(IMAGES.shape)["segment_1"].flops - plain.cost(IMAGES.shape)["segment_1"].flops
    assert gap == 2 * 8 * 4 * 4


def test_bad_networks(unchecked):
    good = {"size": 4, "channels": 1, "patch": 2, "d_model": 8, "depth": 2}
    for change in ({"depth": 3}, {"patch": 3}, {"layers": "loop"}):
        with pytest.raises(DyncompError):
            UViT(**{**good, **change})
    net = UViT(**good)
    with pytest.raises(DyncompError, match="made for"):
        jax.eval_shape(net.init, jax.random.key(0), np.zeros((1, 6, 6, 1), np.float32), TIMES[:1])
    rule = CertaintyRule(threshold=0.3)
    variables = jax.eval_shape(build(rule=rule).init, KEYS, IMAGES)
    assert variables["controls"]["thresholds"].shape == (DEPTH - 1,)
