import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.attention import Attention
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Ledger
from dyncomp.experts import SlicedFFN, SwiGLU
from dyncomp.experts.convert import SliceDense, assign_neurons, cut
from dyncomp.models import Block, DecoderLM, Group
from dyncomp.parallel import MeshSpec, use
from dyncomp.routers import DistilledRouter, Hindsight, Random
from dyncomp.training.state import paths

D, F, N = 6, 16, 4
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, 9, D)), jnp.float32)
DENSE = {
    "gate": RNG.normal(size=(D, F)).astype(np.float32),
    "up": RNG.normal(size=(D, F)).astype(np.float32),
    "down": RNG.normal(size=(F, D)).astype(np.float32),
}


def slice_outputs(params, x):
    """[e n d] in float64."""
    p = {n: np.asarray(params[n], np.float64) for n in DENSE}
    x = np.asarray(x, np.float64).reshape(-1, D)
    g = np.einsum("nd,edf->enf", x, p["gate"])
    hidden = g / (1 + np.exp(-g)) * np.einsum("nd,edf->enf", x, p["up"])
    return np.einsum("enf,efd->end", hidden, p["down"])


def make(
    router=DistilledRouter, k=2, n=N, how="contiguous", dense=DENSE, dispatch="mask", **options
):
    router = functools.partial(router, k=k) if router is not Random else router
    unit = SlicedFFN(router=router, num_slices=n, hidden=F, dispatch=dispatch, **options)
    keys = {"params": jax.random.key(0), "router": jax.random.key(1)}
    variables = nn.unbox(jax.jit(unit.init)(keys, X))
    slices = cut(dense, assign_neurons(dense["gate"], n, how))
    params = {**variables["params"], **jax.tree.map(jnp.asarray, slices)}
    if "teacher" in params:
        params["teacher"] = dense
    return unit, {"controls": {}, **variables, "params": params}


def run(unit, variables, x=X, mask=None, **options):
    """Compiled as one program: much faster than one operation after another."""
    return jax.jit(lambda v, x, m: unit.apply(v, x, m, **options))(variables, x, mask)


def dense_output():
    return SwiGLU(hidden=F).apply({"params": DENSE}, X)[0]


@pytest.mark.parametrize(
    ("how", "dispatch"), [("contiguous", "dropless"), ("random", "mask"), ("clustered", "gather")]
)
def test_all_slices_are_the_dense_network_however_it_was_cut(how, dispatch):
    unit, variables = make(k=N, how=how, dispatch=dispatch)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        y, _ = run(unit, variables)
    np.testing.assert_allclose(y, dense_output(), atol=2e-5)


@pytest.mark.parametrize(("k", "rescale"), [(1, True), (2, False), (3, True)])
def test_unweighted_sum_of_the_chosen_slices_times_n_over_k(k, rescale):
    unit, variables = make(k=k, rescale=rescale)
    y, aux = run(unit, variables, X, capture=("plan",))
    kernel = np.asarray(variables["params"]["router"]["kernel"], np.float64)
    order = np.argsort(-(np.asarray(X, np.float64).reshape(-1, D) @ kernel), axis=1)[:, :k]
    outputs = slice_outputs(variables["params"], X)
    expected = [outputs[order[n], n].sum(0) * (N / k if rescale else 1) for n in range(18)]
    np.testing.assert_allclose(np.asarray(y).reshape(18, D), expected, atol=2e-5)
    load = np.bincount(order.ravel(), minlength=N)
    np.testing.assert_array_equal(aux.plans["load"], load)


def test_the_ratio_is_real_where_k_does_not_divide_n():
    unit, variables = make(k=3)
    plan = run(unit, variables, X, capture=("plan",))[1].plans["route"]
    np.testing.assert_allclose(plan.weights[plan.keep], 4 / 3, rtol=1e-6)


def test_one_slice_is_the_dense_network_and_teaches_nothing():
    unit, variables = make(k=1, n=1)
    y, aux = run(unit, variables, X, train=True)
    np.testing.assert_allclose(y, dense_output(), atol=1e-5)
    assert abs(float(aux.losses["imitation"])) < 1e-6
    assert float(aux.losses["reconstruction"]) < 1e-10


@pytest.mark.parametrize("k", [1, 3])
def test_identical_slices_make_any_choice_exact(k):
    repeat = lambda w, axis: np.concatenate([w] * N, axis=axis)
    part = {"gate": DENSE["gate"][:, :4], "up": DENSE["up"][:, :4], "down": DENSE["down"][:4]}
    dense = {
        "gate": repeat(part["gate"], 1),
        "up": repeat(part["up"], 1),
        "down": repeat(part["down"], 0),
    }
    expected = SwiGLU(hidden=F).apply({"params": dense}, X)[0]
    histogram = tuple(float(i == k - 1) for i in range(k))
    for router in (DistilledRouter, functools.partial(Random, histogram=histogram)):
        if router is DistilledRouter:
            unit, variables = make(k=k, dense=dense)
        else:
            unit = SlicedFFN(router=router, num_slices=N, hidden=F, dispatch="mask")
            variables = {"params": cut(dense, assign_neurons(dense["gate"], N))}
        np.testing.assert_allclose(run(unit, variables)[0], expected, atol=2e-5)


def test_bounds_choose_by_the_outputs_and_the_best_subset_reconstructs_best():
    errors, t = {}, np.asarray(dense_output(), np.float64)
    for name, router in {
        "subset": functools.partial(Hindsight, by="subset"),
        "slice": functools.partial(Hindsight, by="slice"),
        "linear": DistilledRouter,
    }.items():
        unit, variables = make(router)
        found = jax.jit(lambda v, unit=unit: unit.apply(v, X, train=True))
        for k in (1, 2, 3):
            controls = {"router": {"k": jnp.int32(k)}}
            y, aux = found({**variables, "controls": controls})
            errors[name, k] = float(aux.losses["reconstruction"])
            far = ((np.asarray(y, np.float64) - t) ** 2).sum() / (t**2).sum()
            np.testing.assert_allclose(errors[name, k], far, rtol=1e-4)
    for name, k in errors:
        assert errors["subset", k] <= errors[name, k] + 1e-6
    np.testing.assert_allclose(errors["subset", 1], errors["slice", 1], rtol=1e-5)
    unit, variables = make(functools.partial(Hindsight, by="slice"))
    rows = run(unit, variables)[1].events["outputs"]["rows"]
    assert (int(rows.needed), int(rows.executed)) == (0, 18)  # looks at them in evaluation too


def test_events_flops_and_padding():
    mask = jnp.asarray(np.arange(18).reshape(2, 9) < 11, jnp.float32)
    unit, variables = make()
    apply = jax.jit(lambda v: unit.apply(v, X, mask))
    for k in (1, 2, 4):
        y, aux = apply({**variables, "controls": {"router": {"k": jnp.int32(k)}}})
        assert (np.asarray(y).reshape(18, D)[11:] == 0).all() and set(aux.events) == {
            "router",
            "experts",
        }
        used = Ledger(unit.cost(D)).record(aux.events).total("needed")
        dense = 11 * SwiGLU(hidden=F).cost(D)["tokens"].flops
        np.testing.assert_allclose(used / dense, k / N + N / (3 * F), rtol=1e-12)
    assert used > dense  # all slices cost more than the dense network: the router comes on top
    trained = run(unit, variables, X, mask, train=True)[1].events["outputs"]["rows"]
    assert (int(trained.needed), int(trained.executed)) == (11, 18)
    assert unit.cost(D)["outputs"]["rows"].flops == 2 * 6 * D * F
    assert make(teacher="slices")[0].cost(D)["outputs"]["rows"].flops == 6 * D * F


def test_padding_counts_in_no_loss():
    mask = jnp.asarray(np.arange(18).reshape(2, 9) < 11, jnp.float32)
    unit, variables = make()
    flat = X.reshape(18, D)
    other = flat.at[11:].set(7.0).reshape(X.shape)
    first, second = (run(unit, variables, x, mask, train=True)[1].losses for x in (X, other))
    assert set(first) == {"imitation", "winners", "reconstruction"}
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=1e-5)


def test_a_frozen_teacher_stays_when_slices_move_and_shared_ones_do_not():
    for teacher, moves in (("frozen", False), ("slices", True)):
        unit, variables = make(teacher=teacher, states="teacher")
        before, _ = run(unit, variables, X, train=True)
        np.testing.assert_allclose(before, dense_output(), atol=2e-5)
        params = {**variables["params"], "down": variables["params"]["down"] * 2}
        after, _ = run(unit, {**variables, "params": params}, X, train=True)
        assert np.allclose(before, after, atol=1e-5) is not moves
    assert "teacher" not in make(teacher="slices")[1]["params"]


# ---- in a model of two layers


def model(router=DistilledRouter, layers="scan", k=2, **options):
    ffn = functools.partial(
        SlicedFFN,
        router=functools.partial(router, k=k),
        num_slices=N,
        hidden=F,
        dispatch="mask",
        **options,
    )
    block = functools.partial(
        Block, mixer=functools.partial(Attention, heads=2, kv_heads=2), ffn=ffn
    )
    return DecoderLM(vocab_size=11, d_model=D + 2, groups=(Group((block,), 2),), layers=layers)


TOKENS = jnp.asarray(RNG.integers(0, 11, size=(2, 7)), jnp.int32)


def variables_of(net):
    return nn.unbox(jax.jit(net.init)(jax.random.key(0), TOKENS))


def gradients(net, loss_of):
    variables = variables_of(net)

    def loss(params):
        return loss_of(*net.apply({**variables, "params": params}, TOKENS, train=True))

    grads = jax.jit(jax.grad(loss))(variables["params"])
    return dict(zip(paths(grads), map(np.asarray, jax.tree.leaves(grads)), strict=True))


def test_the_language_model_loss_gives_no_router_and_no_teacher_a_gradient():
    grads = gradients(model(), lambda output, aux: -jax.nn.log_softmax(output)[..., 3].mean())
    for path, grad in grads.items():
        for layer in range(2) if "ffn/" in path else ():
            still = "router" in path or "teacher" in path
            assert (grad[layer] == 0).all() == still, (path, layer)


def test_the_imitation_loss_moves_routers_only():
    loss = lambda output, aux: jnp.sum(aux.losses["group_0"]["block_0"]["ffn"]["imitation"])
    for path, grad in gradients(model(), loss).items():
        moved = [(g != 0).any() for g in grad] if "ffn/" in path else [(grad != 0).any()]
        assert all(moved) if "router" in path else not any(moved), path


def test_with_the_label_alone_cut_a_layer_moves_the_slices_below_it():
    net = model(functools.partial(DistilledRouter, detach=False))
    loss = lambda output, aux: aux.losses["group_0"]["block_0"]["ffn"]["imitation"][1]
    grads = gradients(net, loss)
    slices = [g for path, g in grads.items() if path.endswith(("ffn/gate", "ffn/up", "ffn/down"))]
    assert len(slices) == 3
    for grad in slices:
        assert (grad[0] != 0).any() and (grad[1] == 0).all()


def test_a_converted_checkpoint_with_all_slices_is_the_dense_model():
    mixer = functools.partial(Attention, heads=2, kv_heads=2)
    block = functools.partial(Block, mixer=mixer, ffn=functools.partial(SwiGLU, hidden=F))
    dense = DecoderLM(vocab_size=11, d_model=D + 2, groups=(Group((block,), 2),))
    params = variables_of(dense)["params"]
    expected = jax.jit(lambda p: dense.apply({"params": p}, TOKENS)[0])(params)
    there = dict(zip(paths(params), jax.tree.leaves(params), strict=True))
    found = SliceDense(slices=N, how="random")(there)
    net = model(k=N)
    like = variables_of(net)
    leaves, treedef = jax.tree.flatten(like["params"])
    pairs = zip(paths(like["params"]), leaves, strict=True)
    own = jax.tree.unflatten(treedef, [jnp.asarray(found.get(path, leaf)) for path, leaf in pairs])
    y = jax.jit(lambda p: net.apply({**like, "params": p}, TOKENS)[0])(own)
    np.testing.assert_allclose(y, expected, atol=2e-5)


def test_bad_options():
    with pytest.raises(DyncompError, match="divide hidden"):
        make(n=3)
    with pytest.raises(DyncompError, match="factory"):
        SlicedFFN(router=DistilledRouter(num_experts=N), num_slices=N, hidden=F).init(
            jax.random.key(0), X
        )


@pytest.mark.parametrize("mesh", [MeshSpec(fsdp=2)], ids=str)
def test_four_devices_give_what_one_gives(mesh):
    x = jnp.concatenate([X[:, :8]] * 2)  # 4 examples of 8 positions: whole rows on each device
    unit, variables = make(dispatch="dropless")

    def loss(params):
        y, aux = unit.apply({**variables, "params": params}, x, train=True)
        own = jnp.sum(jnp.square(y)) + aux.losses["imitation"] + aux.losses["winners"]
        return own, (y, aux.losses, aux.events["experts"]["rows"].needed)

    value = lambda: jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    alone = value()
    with use(mesh.build()):
        together = value()
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(other, one, rtol=2e-4, atol=2e-4)
