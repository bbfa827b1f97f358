"""Two branches: what each exit depends on, what runs for it, what it costs; published sizes of the CNN."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Ledger
from dyncomp.models import ConvLevel, ExitingConvNet, TwoBranchClassifier
from dyncomp.models.two_branch import HandOn, MergeHead
from dyncomp.runtime import HostExecutor, MaskedExecutor, from_model

LEVELS = [ConvLevel(width=w, stride=s) for w, s in ((8, 2), (8, 1), (16, 1), (8, 2))]
SHAPE = (4, 12, 12, 1)


def small(**fields):
    base = {"classes": 3, "levels": LEVELS, "stem": 8, "tokens": 8, "side": 3}
    base |= {"blocks": (1, 1, 1, 1), "heads": (1, 2, 2, 4), "widening": 2}
    return TwoBranchClassifier(**{**base, **fields})


def random_variables(model, shape=SHAPE):
    """Random parameters and running statistics, none left at its start."""
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), images))
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        name = path[-1].key
        if name == "thresholds":
            return jnp.full(leaf.shape, 2.0, jnp.float32)
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        return jnp.asarray(1.0 + 0.1 * noise if name in ("scale", "var") else 0.4 * noise)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def net():
    """The small network, its variables, images, and its call, compiled once (quickly, not well)."""
    model = small()
    images = np.random.default_rng(2).normal(size=SHAPE).astype(np.float32)
    call = lambda v, x, m: model.apply(v, x, mask=m, capture=("plan",))
    run = jax.jit(call, compiler_options={"xla_backend_optimization_level": 0})
    return SimpleNamespace(model=model, variables=random_variables(model), images=images, run=run)


def test_what_each_exit_depends_on(net, strict):
    """Parameters that are no numbers spoil just the exits that use them, and through them alone gradients flow."""
    wanted = {
        "stage_1": [1, 1, 1, 1],
        "stage_2": [0, 1, 1, 1],
        "stage_3": [0, 0, 1, 1],
        "read_2": [1, 1, 1, 1],
        "read_3": [0, 1, 0, 1],  # the CNN's own exit needs tokens up to the entry of stage 4 only
        "write_2": [0, 1, 1, 1],
        "write_3": [0, 0, 0, 1],
        "hand_0": [0, 1, 0, 1],
        "hand_1": [0, 0, 0, 1],
        "head_early": [1, 1, 0, 1],  # its logits are handed on
        "head_latent": [0, 1, 0, 1],
        "head_features": [0, 0, 1, 0],
        "head_merge": [0, 0, 0, 1],
        "latent": [1, 1, 1, 1],
    }
    params, found = net.variables["params"], {}
    for name in wanted:
        spoiled = {**params, name: jax.tree.map(lambda leaf: leaf * jnp.nan, params[name])}
        output, _ = net.run({**net.variables, "params": spoiled}, net.images, jnp.ones(4))
        found[name] = [int(np.isnan(rows).any()) for rows in np.asarray(output["logits"])]
    assert found == wanted


def test_tokens_halve_and_take_the_widths_of_the_cnn(net):
    variables = net.variables
    start = functools.partial(net.model.apply, variables, method="start")
    carry = jax.eval_shape(lambda x: start(x, False), jnp.asarray(net.images))
    assert carry["z"].shape == (4, 2, 8) and carry["late"].shape == (4, 1, 16)
    assert carry["x"].shape == (4, 3, 3, 8) and carry["mid"].shape == (4, 3, 3, 16)
    assert carry["out"].shape == (4, 2, 2, 8)
    mix = variables["params"]
    shapes = [mix[f"mix_{i}"]["tokens_out"]["kernel"].shape for i in range(3)]
    assert shapes == [(8, 4), (4, 2), (2, 1)]
    assert mix["latent"]["tokens"].shape == (8, 8)
    assert mix["write_3"]["attention"]["query"]["kernel"].shape == (8, 1)


def test_thresholds_nobody_reaches_give_the_last_answer_and_the_ledger_counts(net):
    mask = jnp.asarray([1.0, 1.0, 1.0, 0.0])
    output, aux = net.run(net.variables, net.images, mask)
    np.testing.assert_array_equal(output["emitted"], output["logits"][3])
    ledger = Ledger(net.model.cost(SHAPE)).record(aux.events)
    whole = sum(price.flops for price in net.model.cost(SHAPE).values())
    assert ledger.total("needed") == 3 * whole and ledger.total("executed") == 4 * whole
    controls = {**net.variables["controls"], "thresholds": jnp.zeros(3)}
    output, aux = net.run({**net.variables, "controls": controls}, net.images, mask)
    np.testing.assert_array_equal(output["emitted"], output["logits"][0])
    ledger = Ledger(net.model.cost(SHAPE)).record(aux.events)
    assert ledger.total("needed") == 3 * net.model.cost(SHAPE)["segment_0"].flops


def thresholds_between(scores):
    """One a segment, such that some leave at each of the first three exits."""
    first = np.sort(scores[:, 0])[-1]
    second = np.sort(scores[scores[:, 0] < first, 1])[-1]
    rest = scores[(scores[:, 0] < first) & (scores[:, 1] < second), 2]
    return [first, second, np.sort(rest)[-1]]


def test_compacted_execution_equals_masked_execution(net):
    output, aux = net.run(net.variables, net.images, jnp.ones(4))
    scores = np.asarray(aux.plans["exit"].scores)
    thresholds = jnp.asarray(thresholds_between(scores))
    controls = {**net.variables["controls"], "thresholds": thresholds}
    variables = {**net.variables, "controls": controls}
    wanted, _ = net.run(variables, net.images, jnp.ones(4))
    assert sorted(np.asarray(wanted["exit"]).tolist()) == [0, 1, 2, 3]
    described = from_model(net.model, variables, SHAPE)
    host = HostExecutor(described, net.images, capacity=4, buckets=(4,))
    packed = host(net.images)
    np.testing.assert_array_equal(packed.exits, wanted["exit"])
    np.testing.assert_allclose(packed.outputs, wanted["emitted"], rtol=1e-5, atol=1e-5)
    assert packed.needed.tolist() == [4, 3, 2, 1]
    host.thresholds[:3] = 0
    early = host(net.images)
    assert early.executed.tolist() == [4, 0, 0, 0]
    np.testing.assert_allclose(early.outputs, output["logits"][0], rtol=1e-5, atol=1e-5)


def test_who_leaves_first_is_charged_no_third_stage():
    model = small()
    params = random_variables(model)["params"]
    used = {index: set(model.weights_of(params, index)) for index in (None, 0, 1, 2, 3)}
    assert "stage_2" not in used[None] | used[0] and "stage_2" in used[1]
    assert set.union(*used.values()) == set(params)
    moved = small(first_exit="features")
    assert "stage_2" in moved.weights_of(params, 0) and "stage_2" not in moved.weights_of(params, 1)
    # a 3x3 map of 8 channels: 1x1 to 16, 3x3 of 16, 1x1 of 16, and a shortcut to 16
    third = 2 * 9 * (8 * 16 + 9 * 16 * 16 + 16 * 16 + 8 * 16)
    prices, other = model.cost(SHAPE), moved.cost(SHAPE)
    token_exit, map_exit = 2 * 8 + 2 * 8 * 3, 9 * 16 + 2 * 16 * 3
    assert other["segment_0"].flops - prices["segment_0"].flops == third + map_exit - token_exit
    assert prices["segment_1"].flops - other["segment_1"].flops == third


@pytest.mark.parametrize("fields", [{}, {"first_exit": "features"}, {"reads": "first"}])
def test_each_segment_runs_on_its_own_weights_alone(fields):
    """Traced with nothing but what `weights_of` and `controls_of` hand out; more would be missed."""
    model = small(**fields)
    images = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    whole = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), images))
    own = lambda i: {
        "params": model.weights_of(whole["params"], i),
        "controls": model.controls_of(whole["controls"], i),
    }
    begin = functools.partial(model.apply, method="begin")
    carry, level = jax.eval_shape(begin, own(None), images), jax.ShapeDtypeStruct((), jnp.float32)
    for index in range(4):
        call = lambda v, c, t, i=index: model.apply(v, i, c, t, method="segment")
        handed, logits, leave, score = jax.eval_shape(call, own(index), carry, level)
        assert jax.tree.map(lambda leaf: leaf.shape, handed) == jax.tree.map(
            lambda leaf: leaf.shape, carry
        )
        assert logits.shape == (4, 3) and leave.shape == score.shape == (4,)


def test_the_ends_equal_numpy():
    """ReLU(BN(W logits)) that is handed on, and the last classifier with a hidden layer."""
    rng = np.random.default_rng(4)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    x = draw(5, 6)
    stats = {"mean": draw(6), "var": 1 + np.abs(draw(6))}
    affine = {"scale": draw(6), "bias": draw(6)}
    norm = lambda v: (v - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * affine["scale"]
    controls = {"norm": jax.tree.map(jnp.asarray, stats)}
    product = {"kernel": draw(5, 6), "bias": draw(6)}
    told = HandOn(6).apply(
        {"params": {"product": product, "norm": affine}, "controls": controls},
        jnp.asarray(x[:, :5]),
    )
    wanted = np.maximum(norm(x[:, :5] @ product["kernel"] + product["bias"]) + affine["bias"], 0)
    np.testing.assert_allclose(told, wanted, rtol=1e-4, atol=1e-5)
    middle, last = {"kernel": draw(6, 4), "bias": draw(4)}, {"kernel": draw(4, 3), "bias": draw(3)}
    head = MergeHead(3, hidden=4, dropout=0.5)
    params = {"norm": affine, "middle": middle, "product": last}
    variables = {"params": params, "controls": controls}
    found = head.apply(variables, jnp.asarray(x))
    h = (norm(x) + affine["bias"]) @ middle["kernel"] + middle["bias"]
    h = h * np.clip(h + 3, 0, 6) / 6
    np.testing.assert_allclose(found, h @ last["kernel"] + last["bias"], rtol=1e-4, atol=1e-4)
    noisy = functools.partial(head.apply, variables, jnp.asarray(x), True, mutable=["controls"])
    first, again = (noisy(rngs={"dropout": jax.random.key(i)})[0] for i in (0, 1))
    assert np.abs(first - again).max() > 1e-3
    assert head.cost(6).flops == 2 * (6 * 4 + 4 * 3)


def test_reading_once_drops_the_later_readers_and_their_cost():
    every, first = small(), small(reads="first")
    names = set(jax.eval_shape(first.init, jax.random.key(0), jnp.zeros(SHAPE))["params"])
    assert "read_0" in names and not names & {"read_1", "read_2", "read_3"}
    pairs = zip(every.cost(SHAPE).values(), first.cost(SHAPE).values(), strict=True)
    saved = [one.flops - other.flops for one, other in pairs]
    assert saved[0] > 0 and saved[1] > 0 and saved[2:] == [0, 0]


def test_the_cnn_has_the_published_size():
    """RegNetY-800MF: 6,432,512 parameters and 0.834 G multiply-adds at 224 pixels (torchvision's table)."""
    level = functools.partial(ConvLevel, stride=2, group_width=16, squeeze=True)
    widths, blocks = (64, 144, 320, 784), (1, 3, 8, 2)
    levels = [level(width=w, blocks=n) for w, n in zip(widths, blocks, strict=True)]
    model = ExitingConvNet(classes=1000, levels=levels, stem=32)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    exit_head = 320 * 1000 + 1000
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) - exit_head == 6_432_512
    flops = sum(price.flops for price in model.cost(images.shape).values())
    assert round(flops / 2e9, 3) == pytest.approx(0.834, abs=0.004)


def test_a_coupled_cnn_runs_in_segments():
    model = ExitingConvNet(classes=3, levels=LEVELS, stem=8, exits_after=(0, 2))
    variables = random_variables(model)
    images = np.random.default_rng(3).normal(size=SHAPE).astype(np.float32)
    output, _ = jax.jit(model.apply)(variables, images)
    found = MaskedExecutor(from_model(model, variables, SHAPE))(images)
    np.testing.assert_allclose(found.outputs, output["logits"][2], rtol=1e-5, atol=1e-5)
    assert output["logits"].shape == (3, 4, 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"tokens": 12}, "multiple of 8"), ({"blocks": (1, 1)}, "four levels")],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(DyncompError, match=message):
        small(**fields)


def test_options_are_checked_early(unchecked):
    with pytest.raises(DyncompError, match="'every' or 'first'"):
        small(reads="never")
    with pytest.raises(DyncompError, match="'latent' or 'features'"):
        small(first_exit="stem")
    with pytest.raises(DyncompError, match="increasing stages"):
        ExitingConvNet(classes=3, levels=LEVELS, stem=8, exits_after=(3,))
    with pytest.raises(DyncompError, match="must divide width"):
        ConvLevel(width=8, group_width=3)
