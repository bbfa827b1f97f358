"""The stop and exit controller: decisions by hand, prices, and what trains."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dyncomp import models
from dyncomp.attention import Attention
from dyncomp.core.aux import Aux
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Ledger
from dyncomp.depth import STOP, decision, walk
from dyncomp.experts import SwiGLU
from dyncomp.models import Block, DecoderLM, Group, NestedLM, StoppingLM
from dyncomp.tasks import StoppingObjective, exits_right

B, T, V, DEPTHS = 2, 7, 13, (1, 2, 4)

mixer = functools.partial(Attention, heads=2)
block = functools.partial(Block, mixer=mixer, ffn=functools.partial(SwiGLU, hidden=12))
backbone = functools.partial(DecoderLM, vocab_size=V, d_model=8, groups=[Group([block], 4)])
nested = functools.partial(
    NestedLM, backbone=backbone, depths=DEPTHS, own_heads=True, norm_early=False
)
MODEL = StoppingLM(nested=nested)


@pytest.fixture(scope="module")
def variables():
    own = nn.meta.unbox(jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))
    drawn = lambda key, x: x + jax.random.normal(jax.random.key(key), x.shape)
    params = dict(own["params"])
    params |= {name: drawn(i, params[name]) for i, name in enumerate(("exit_heads", "controller"))}
    return {**own, "params": params}


@pytest.fixture(scope="module")
def batch():
    tokens = jax.random.randint(jax.random.key(1), (B, T + 1), 0, V)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": jnp.ones((B, T))}


@functools.lru_cache
def compiled(model):
    call = functools.partial(models.apply, model, capture=("plan", "hidden"))
    return jax.jit(call)


def with_controls(variables, tau_exit, tau_stop):
    taus = {"tau_exit": jnp.float32(tau_exit), "tau_stop": jnp.float32(tau_stop)}
    return {**variables, "controls": {**variables["controls"], **taus}}


def hidden(aux):
    """Raw outputs of the blocks at the exits [x b t d]."""
    outputs = models.block_outputs(backbone(parent=None).groups, aux.plans)
    return np.stack([np.asarray(outputs[depth - 1], np.float64) for depth in DEPTHS])


def test_at_first_everyone_goes_through(variables, batch):
    output, aux = compiled(MODEL)(variables, batch["inputs"])
    plain, _ = jax.jit(functools.partial(models.apply, backbone()))(
        {"params": {k: v for k, v in variables["params"].items() if k not in ("controller", "exit_heads")}},
        batch["inputs"],
    )  # fmt: skip
    np.testing.assert_allclose(output["emitted"], plain, atol=1e-6)
    assert (np.asarray(aux.plans["exit"].exit) == len(DEPTHS) - 1).all()
    assert not aux.plans["stopped"].any()


@pytest.mark.parametrize("taus", [(0.0, 0.0), (0.5, 1.0), (1.0, 0.4)])
def test_decisions_are_of_raw_states_and_answers_of_the_exit_that_decides(variables, batch, taus):
    output, aux = compiled(MODEL)(with_controls(variables, *taus), batch["inputs"])
    states = hidden(aux)
    said = states @ np.asarray(variables["params"]["controller"], np.float64)
    np.testing.assert_allclose(output["decisions"], said, atol=1e-4)
    head = np.asarray(variables["params"]["head"], np.float64)
    own = [states[i] @ (head + np.asarray(variables["params"]["exit_heads"][i])) for i in (0, 1)]
    answers = [*own, np.asarray(output["final"])]
    for n, t in np.ndindex(B, T):
        exit, stopped = len(DEPTHS) - 1, False
        for index in range(len(DEPTHS)):
            p = np.exp(said[index, n, t]) / np.exp(said[index, n, t]).sum()
            stops = p.argmax() == 0 and p[0] > taus[1]
            if stops or (p.argmax() == 1 and p[1] > taus[0]):
                exit, stopped = index, stops
                break
        assert int(aux.plans["exit"].exit.reshape(B, T)[n, t]) == exit
        assert bool(aux.plans["stopped"][n, t]) == stopped
        np.testing.assert_allclose(output["emitted"][n, t], answers[exit][n, t], atol=1e-4)


def test_price_of_what_ran(variables, batch):
    _, aux = compiled(MODEL)(with_controls(variables, 0.0, 0.5), batch["inputs"])
    left = np.asarray(aux.plans["exit"].exit).reshape(B, T)
    assert len(set(left.ravel())) > 1
    ledger = Ledger(MODEL.cost((B, T))).record(jax.device_get(aux.events))
    ran, d = np.asarray(DEPTHS)[left], 8
    token = 2 * (4 * d * d) + 2 * (3 * d * 12)
    pairs = 4 * d * (ran * (np.arange(T) + 1)[None]).sum()
    hand = ran.sum() * token + pairs + B * T * 2 * d * V
    hand += (left + 1).sum() * 2 * 3 * d + (4 - ran).sum() * 4 * d * d
    assert ledger.total("needed") == hand


def test_a_controller_for_each_exit(variables, batch):
    model = MODEL.clone(per_exit=True)
    shared = variables["params"]["controller"]
    params = {**variables["params"], "controller": jnp.stack([shared, 2 * shared, 3 * shared])}
    output, _ = compiled(model)({**variables, "params": params}, batch["inputs"])
    plain, _ = compiled(MODEL)(variables, batch["inputs"])
    times = np.arange(1, 4)[:, None, None, None]
    np.testing.assert_allclose(
        output["decisions"], times * plain["decisions"], rtol=1e-4, atol=1e-5
    )


def test_loss_by_hand(variables, batch):
    output, aux = compiled(MODEL)(variables, batch["inputs"])
    loss, metrics = StoppingObjective()(output, aux, batch, 0)
    right = np.asarray(exits_right(output, batch["targets"])).reshape(len(DEPTHS), -1)
    said = np.asarray(output["decisions"], np.float64).reshape(len(DEPTHS), -1, 3)
    log_p = said - np.log(np.exp(said).sum(-1, keepdims=True))
    total, lost = 0.0, 0
    for n in range(B * T):
        first = right[:, n].argmax() if right[:, n].any() else None
        lost += first is None
        for k in range(len(DEPTHS)):
            label = STOP if first is None else (1 if k >= first else 2)
            total -= (k + 1) / 6 * log_p[k, n, label] / (B * T)
    assert float(loss) == pytest.approx(total, rel=1e-5)
    assert float(metrics["never_right"].total) == lost
    uniform, _ = StoppingObjective("uniform")(output, aux, batch, 0)
    assert float(uniform) != pytest.approx(total)


def test_only_the_controller_is_asked_to_learn(variables, batch):
    def loss(params):
        output, aux = models.apply(
            MODEL, {**variables, "params": params}, batch["inputs"], train=True
        )
        return StoppingObjective()(output, aux, batch, 0)[0]

    found = jax.jit(jax.grad(loss))(variables["params"])
    assert np.abs(found["controller"]).max() > 0 and not np.any(found["exit_heads"])
    assert not np.any(found["head"])


def test_walks_equal_those_of_the_decision_room(variables, batch):
    output, aux = compiled(MODEL)(with_controls(variables, 0.3, 0.3), batch["inputs"])
    said = output["decisions"].reshape(len(DEPTHS), -1, 3)
    want = walk(decision(said, jnp.float32(0.3), jnp.float32(0.3)))
    np.testing.assert_array_equal(aux.plans["exit"].exit, want.exit)


def test_another_models_output_is_refused(batch):
    with pytest.raises(DyncompError, match="models.StoppingLM"):
        StoppingObjective()({"final": jnp.zeros((B, T, V))}, Aux(), batch, 0)
