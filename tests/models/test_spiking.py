"""The spiking classifier against a simulation in numpy that was written from the recursion, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Ledger
from dyncomp.exits import RunningSumRule
from dyncomp.models import SpikingClassifier
from dyncomp.recurrent import Neuron

STEPS, B, CLASSES = 6, 5, 3
EPS = 1e-5


def make(**options):
    rule = RunningSumRule(classes=CLASSES, temperature=2.0, threshold=0.5)
    sizes = {"widths": (4, 6), "convs": (2, 2), "residual": True, "steps": STEPS, "rule": rule}
    return SpikingClassifier(classes=CLASSES, **{**sizes, **options})


@pytest.fixture(scope="module")
def net():
    return make()


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(B, 6, 6, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def variables(net, images):
    """Parameters, with norms and thresholds that are not those of the start."""
    drawn = nn.meta.unbox(jax.eval_shape(net.init, jax.random.key(0), images))
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        name = path[-1].key
        if name == "kernel" or name == "head":
            fan = np.prod(leaf.shape[:-1])
            return (rng.normal(size=leaf.shape) * np.sqrt(2 / fan)).astype(np.float32)
        if name == "var" or name == "gain":
            return rng.uniform(0.7, 1.5, leaf.shape).astype(np.float32)
        if name.startswith("scale"):
            return np.float32(rng.uniform(0.25, 0.5))
        if name == "threshold":
            return np.float32(0.5)
        return rng.normal(0.2, 0.3, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, drawn)


@pytest.fixture(scope="module")
def call(net):
    return jax.jit(
        lambda variables, images, mask: net.apply(variables, images, mask, capture=("plan",))
    )


@pytest.fixture(scope="module")
def out(call, variables, images):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        output, aux = call(variables, images, np.ones(B, np.float32))
    return jax.device_get(output), aux


# ---- the reference


def conv64(x, kernel, stride):
    """A convolution as a sum over the kernel's places."""
    side, pad = kernel.shape[0], kernel.shape[0] // 2
    wide = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows, columns = (-(-length // stride) for length in x.shape[1:3])
    total = 0.0
    for i in range(side):
        for j in range(side):
            seen = wide[:, i : i + stride * rows : stride, j : j + stride * columns : stride]
            total = total + seen[:, :rows, :columns] @ kernel[i, j]
    return total


def normed64(variables, name, x, stride):
    """Convolution, then the norm by running statistics, one after the other."""
    p, c = variables["params"][name], variables["controls"][name]
    y = conv64(x, np.float64(p["kernel"]), stride)
    return (y - c["mean"]) / np.sqrt(np.float64(c["var"]) + EPS) * p["gain"] + p["shift"]


def currents64(variables, index, below, beside):
    """The layers of make(): a stem, a block of width 4, a block of width 6 with a projection and stride 2."""
    stride = 2 if index == 3 else 1
    y = normed64(variables, f"conv_{index}", below, stride)
    if index == 2:
        y = y + beside
    if index == 4:
        y = y + normed64(variables, "side_4", beside, 2)
    return y


def simulate64(variables, images):
    """V <- V + I - o_prev; o = theta 1[V >= theta]: sums [t b c], spikes so far [t b l], distance to a tie."""
    theta = [3 * float(variables["params"][f"scale_{i}"]) for i in range(5)]
    v, o = [t / 2 for t in theta], [0.0] * 5
    sums, spikes, count, total, near = [], [], np.zeros((B, 5), int), 0.0, np.inf
    for _ in range(STEPS):
        fired = []
        for i in range(5):
            below = fired[-1] if i else np.float64(images)
            v[i] = v[i] + currents64(variables, i, below, fired[-2] if i > 1 else None) - o[i]
            near = min(near, np.abs(v[i] - theta[i]).min())
            o[i] = theta[i] * (v[i] >= theta[i])
            fired.append(o[i])
            count[:, i] += (o[i] > 0).sum(axis=(1, 2, 3))
        total = total + fired[-1].mean(axis=(1, 2)) @ np.float64(variables["params"]["head"])
        sums.append(total)
        spikes.append(count.copy())
    return np.stack(sums), np.stack(spikes), near


@pytest.fixture(scope="module")
def wanted(variables, images):
    return simulate64(variables, images)


# ---- running


def test_every_step_is_that_of_the_recursion(out, wanted):
    output, aux = out
    sums, spikes, near = wanted
    assert near > 1e-5  # no neuron is so near its threshold that rounding decides
    t = np.arange(1, STEPS + 1)[:, None, None]
    np.testing.assert_allclose(output["logits"], sums / t, atol=1e-5)
    assert (spikes[-1] > 0).all() and np.abs(np.diff(sums, axis=0)).max() > 0.01
    np.testing.assert_array_equal(
        np.stack([aux.events["spikes"][f"unit_{i}"].executed for i in range(5)], axis=1), spikes[-1]
    )
    z = np.exp(sums / 2.0 - (sums / 2.0).max(-1, keepdims=True))
    np.testing.assert_allclose(output["scores"], (z / z.sum(-1, keepdims=True)).max(-1), rtol=1e-4)


def test_the_source_is_the_quantised_network(net, variables, images):
    weights = jax.jit(lambda variables: net.apply(variables, method="folded"))(variables)
    found = jax.jit(net.quantised)(weights, images)
    outs = [np.float64(images)]
    for i in range(5):
        y, s = (
            currents64(variables, i, outs[-1], outs[-2] if i > 1 else None),
            variables["params"][f"scale_{i}"],
        )
        outs.append(s * np.clip(np.round(y / s), 0, 3))
    np.testing.assert_allclose(
        found, outs[-1].mean(axis=(1, 2)) @ np.float64(variables["params"]["head"]), atol=1e-5
    )


def test_it_stops_after_the_first_sure_step_and_counts_until_then(out, wanted):
    output, aux = out
    sums, spikes, _ = wanted
    sure = output["scores"] > 0.5
    stop = np.asarray(
        [next((t for t in range(STEPS - 1) if sure[t, b]), STEPS - 1) for b in range(B)]
    )
    assert len(set(stop)) > 1
    np.testing.assert_array_equal(output["exit"], stop)
    np.testing.assert_array_equal(aux.plans["stop"].exit, stop)
    rows = np.arange(B)
    np.testing.assert_allclose(output["emitted"], (sums[stop, rows].T / (stop + 1)).T, atol=1e-5)
    np.testing.assert_array_equal(aux.events["step"].needed, stop + 1)
    np.testing.assert_array_equal(aux.events["step"].executed, STEPS)
    for i in range(5):
        np.testing.assert_array_equal(
            aux.events["spikes"][f"unit_{i}"].needed, spikes[stop, rows, i]
        )


def test_thresholds_at_the_ends(call, variables, images, out):
    for threshold, step in ((1.0, STEPS - 1), (1 / CLASSES - 0.01, 0)):
        controls = {**variables["controls"], "threshold": jnp.float32(threshold)}
        output, _ = call({**variables, "controls": controls}, images, np.ones(B, np.float32))
        np.testing.assert_array_equal(output["exit"], step)
        np.testing.assert_array_equal(output["emitted"], out[0]["logits"][step])
        np.testing.assert_array_equal(output["logits"], out[0]["logits"])


def test_padding_needs_nothing(call, variables, images):
    mask = np.asarray([1, 1, 0, 1, 0], np.float32)
    _, aux = call(variables, images, mask)
    for count in (aux.events["step"], aux.events["first"], aux.events["spikes"]["unit_0"]):
        assert (np.asarray(count.needed)[mask == 0] == 0).all()
        assert (np.asarray(count.needed)[mask == 1] > 0).all()


def test_prices_by_hand():
    """One level of two convolutions on 2 x 2 pixels: n = 4 * 3 = 12 neurons each."""
    net = make(widths=(3,), convs=(2,), residual=False, rule=None)
    table = net.cost((1, 2, 2, 1))
    first = 2 * 12 * 9 * 1 + 12  # multiply-adds and biases
    second = 2 * 12 * 9 * 3 + 12
    head = 12 + 2 * 3 * CLASSES  # the mean over places, and the product
    neurons = 24 * (4 + 1)
    assert table["first"].flops == first
    assert table["step"].flops == second + head + neurons + 7 * CLASSES
    assert table["quantised"].flops == first + second + head + 5 * 24
    costs = net.cumulative_costs((1, 2, 2, 1))
    step = table["step"].flops
    np.testing.assert_allclose(
        costs, [(first + n * step) / (first + 6 * step) for n in range(1, 7)]
    )
    assert net.neurons((1, 2, 2, 1)) == (12, 12)
    assert make().neurons((1, 6, 6, 1)) == (144, 144, 144, 54, 54)
    # A residual block's projection: 4 inputs, and one addition a neuron.
    block = make().cost((1, 6, 6, 1))["step"].flops
    plain = make(residual=False, widths=(4, 4, 6), convs=(1, 2, 2)).cost((1, 6, 6, 1))
    assert make().units[4].macs() == 9 * 6 + 4 and block > 0 and "unit_4" in plain["spikes"]


def test_the_ledger_adds_up_steps(net, out):
    output, aux = out
    ledger = Ledger(net.cost((B, 6, 6, 1))).record(aux.events)
    table = net.cost((B, 6, 6, 1))
    needed = B * table["first"].flops + int((output["exit"] + 1).sum()) * table["step"].flops
    assert ledger.total("needed") == needed
    assert ledger.total("executed") == B * (table["first"].flops + STEPS * table["step"].flops)


# ---- training


@pytest.fixture(scope="module", params=["quantised", "spiking"])
def trained(request, variables, images):
    """(network, gradients of the training loss, moved controls, output)."""
    net = make(training=request.param, neuron=Neuron(leak=0.9), steps=3)
    mask = jnp.ones(B)

    def loss(params):
        variables_ = {"params": params, "controls": variables["controls"]}
        (output, aux), moved = net.apply(variables_, images, mask, train=True, mutable=["controls"])
        return jnp.sum(jnp.square(output["final"])), (moved["controls"], output, aux.events)

    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        step = jax.jit(jax.grad(loss, has_aux=True))
        grads, (controls, output, events) = step(variables["params"])
    return net, jax.device_get(grads), jax.device_get(controls), jax.device_get(output), events


def test_every_parameter_learns(trained):
    net, grads, _, output, events = trained
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path
    spiking = net.training == "spiking"
    assert output["logits"].shape == (3 if spiking else 1, B, CLASSES)
    assert set(events) == ({"first", "step"} if spiking else {"quantised"})


def test_training_and_running_agree_under_the_statistics_of_the_batch(trained, variables, images):
    """Running statistics move a tenth of the way to the batch's; put there, the folded network is the trained one."""
    net, _, controls, output, _ = trained
    there = jax.tree.map(lambda old, new: old + (new - old) / 0.1, variables["controls"], controls)
    there = {"params": variables["params"], "controls": there}
    weights = jax.jit(lambda there: net.apply(there, method="folded"))(there)
    if net.training == "quantised":
        np.testing.assert_allclose(
            jax.jit(net.quantised)(weights, images), output["final"], atol=1e-4
        )
    else:
        found = jax.jit(net.simulate)(weights, images, jnp.float32(1.0))
        np.testing.assert_allclose(found.answers, output["logits"], atol=1e-4)


def test_padding_moves_no_statistics(variables, images):
    net = make()
    run = jax.jit(
        lambda x, mask: net.apply(variables, x, mask, train=True, mutable=["controls"])[1]
    )
    mask = np.asarray([1, 1, 1, 0, 0], np.float32)
    other = np.where(mask[:, None, None, None] > 0, images, 9.0).astype(np.float32)
    for a, b in zip(*(jax.tree.leaves(run(x, mask)) for x in (images, other)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "fix"),
    [
        ({"training": "ann"}, "quantised"),
        ({"convs": (3, 2)}, "two convolutions"),
        ({"widths": (4,)}, "one count"),
        ({"steps": 0}, "1 or more"),
        ({"bits": 0}, "1 or more"),
        ({"rule": RunningSumRule(classes=4)}, "make them equal"),
    ],
)
def test_options_that_do_not_fit_are_refused(wrong, fix, unchecked):
    with pytest.raises(DyncompError, match=fix):
        make(**wrong)
