"""Modules of several widths, and the router that anneals: against the modules run by hand."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.core.aux import Aux
from dyncomp.core.errors import DyncompError
from dyncomp.experts import Ladder, SwiGLU
from dyncomp.routers import Annealed, Given, Random
from dyncomp.tasks.objectives import LMObjective, budget_losses

B, T, D = 2, 12, 6
WIDTHS = (16, 4, 0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)
KEY = jax.random.key(0)


def made(router, widths=WIDTHS, **options):
    ladder = Ladder(router=router, widths=widths, **options)
    return ladder, nn.unbox(jax.jit(ladder.init)({"params": KEY, "router": KEY}, X))


def module(variables, width):
    if not width:
        return np.zeros_like(X)
    names = ("gate", "up", "down")
    params = {n: variables["params"][f"{n}_{width}"] for n in names}
    return np.asarray(SwiGLU(hidden=width).apply({"params": params}, X)[0])


@pytest.mark.parametrize("choice", [0, 1, 2])
def test_a_given_choice_runs_one_module_everywhere(choice):
    ladder, variables = made(Given)
    variables = {**variables, "controls": {"router": {"choice": jnp.int32(choice)}}}
    y, aux = ladder.apply(variables, X)
    np.testing.assert_allclose(y, module(variables, WIDTHS[choice]), atol=1e-5)
    for width in WIDTHS:
        rows = aux.events[f"width_{width}"]["rows"]
        assert int(rows.needed) == (B * T if width == WIDTHS[choice] else 0)
        assert int(rows.executed) >= int(rows.needed) or width == 0
    assert set(aux.events) == set(ladder.cost(D))
    assert ladder.cost(D)["width_16"]["rows"].flops == 6 * D * 16


def test_random_choices_run_each_token_through_its_own_module():
    for dispatch in ("dropless", "mask"):
        ladder, variables = made(functools.partial(Random, histogram=(1.0,)), dispatch=dispatch)
        call = lambda p, x: ladder.apply(  # noqa: E731
            {"params": p}, x, train=True, rngs={"router": KEY}, capture=("plan",)
        )
        y, aux = call(variables["params"], X)
        chosen = np.asarray(aux.plans["route"].experts).reshape(B, T)
        outputs = np.stack([module(variables, w) for w in WIDTHS])
        expected = np.take_along_axis(outputs, chosen[None, ..., None], axis=0)[0]
        np.testing.assert_allclose(y, expected, atol=1e-5)
        grads = jax.grad(lambda p: jnp.sum(jnp.sin(call(p, X)[0])))(variables["params"])
        flat = np.concatenate([np.ravel(g) for g in jax.tree.leaves(grads)])
        first = flat if dispatch == "dropless" else first  # noqa: F821
    np.testing.assert_allclose(flat, first, rtol=1e-3, atol=1e-5)


def test_annealed_explores_then_mixes_then_decides():
    router = functools.partial(Annealed, explore_steps=2, anneal_steps=4, start=1.0, end=16.0)
    ladder, variables = made(router)
    variables["params"]["router"]["kernel"] *= 40
    h = np.asarray(X.reshape(-1, D) @ variables["params"]["router"]["kernel"], np.float64)
    outputs = np.stack([module(variables, w).reshape(-1, D) for w in WIDTHS], axis=1)
    controls = variables["controls"]

    @jax.jit
    def trained(controls, step):
        given, rngs = {**variables, "controls": controls}, {"router": jax.random.key(step)}
        options = {"train": True, "capture": ("plan",), "mutable": ["controls"]}
        return ladder.apply(given, X, rngs=rngs, **options)

    for step in range(8):
        (y, aux), moved = trained(controls, step)
        weights = np.asarray(aux.plans["route"].weights)
        if step < 2:
            assert (np.sort(weights, axis=1) == [0, 0, 1]).all()
        else:
            s = 16.0 ** min((step - 2) / 4, 1.0)
            z = np.exp(s * (h - h.max(axis=1, keepdims=True)))
            np.testing.assert_allclose(weights, z / z.sum(1, keepdims=True), rtol=1e-3, atol=1e-6)
        mixed = (weights[..., None] * outputs).sum(axis=1)
        np.testing.assert_allclose(np.asarray(y).reshape(-1, D), mixed, atol=1e-4)
        np.testing.assert_allclose(aux.losses["share"], weights[:, 0].mean(), rtol=1e-4)
        controls = moved["controls"]
    assert float(controls["router"]["steps"]) == 8
    y, aux = ladder.apply(variables, X)
    hard = outputs[np.arange(B * T), h.argmax(axis=1)]
    np.testing.assert_allclose(np.asarray(y).reshape(-1, D), hard, atol=1e-5)
    rows = {w: int(aux.events[f"width_{w}"]["rows"].needed) for w in WIDTHS}
    assert list(rows.values()) == np.bincount(h.argmax(axis=1), minlength=3).tolist()


def test_one_budget_for_all_layers():
    aux = Aux(losses={"a": {"share": jnp.float32([0.9, 0.1])}, "b": {"share": jnp.float32(0.2)}})
    found = budget_losses(aux, {"share": (0.5, 3.0)})
    np.testing.assert_allclose(found, 3 * (0.4 - 0.5) ** 2, rtol=1e-5)
    with pytest.raises(DyncompError, match="budgets names 'nothing'"):
        budget_losses(aux, {"nothing": (0.5, 1.0)})
    with pytest.raises(DyncompError, match="give"):
        LMObjective(budgets={"share": (0.5,)})


@pytest.mark.parametrize("widths", [(4,), (4, 4), (4, -1)])
def test_widths_that_make_no_sense_are_refused(widths):
    with pytest.raises(DyncompError, match="Ladder.widths"):
        made(Given, widths)
