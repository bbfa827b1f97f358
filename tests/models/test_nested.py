"""Nested models: exits against cut models, the loss against a plain one, gradients by exit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dyncomp import depth, models
from dyncomp.attention import Attention
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Ledger
from dyncomp.experts import SwiGLU
from dyncomp.models import Block, DecoderLM, Group, NestedLM
from dyncomp.tasks import LMObjective, NestedObjective
from dyncomp.tasks.objectives import token_nll

B, T, V, DEPTHS = 2, 6, 31, (1, 3, 4)

mixer = functools.partial(Attention, heads=4, kv_heads=2)
block = functools.partial(Block, mixer=mixer, ffn=functools.partial(SwiGLU, hidden=24))
backbone = functools.partial(DecoderLM, vocab_size=V, d_model=16, groups=[Group([block], 4)])
MODEL = NestedLM(backbone=backbone, depths=DEPTHS)


@pytest.fixture(scope="module")
def variables():
    drawn = jax.jit(backbone().init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    return {**nn.meta.unbox(drawn), "controls": controls(2.0, 2.0)}


def controls(*thresholds):
    return {"thresholds": jnp.asarray(thresholds, jnp.float32)}


@pytest.fixture(scope="module")
def batch():
    tokens = jax.random.randint(jax.random.key(1), (B, T + 1), 0, V)
    mask = jnp.ones((B, T)).at[0, :2].set(0.0)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask}


@functools.lru_cache
def compiled(model):
    return jax.jit(functools.partial(models.apply, model))


@functools.lru_cache
def gradient(model, objective):
    def loss(params, batch, step):
        own = {
            "params": params,
            "controls": controls(*[2.0] * (len(getattr(model, "depths", (0,))) - 1)),
        }
        output, aux = models.apply(model, own, batch["inputs"], train=True)
        return objective(output, aux, batch, step)[0]

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("execution", ["scan", "unroll"])
def test_an_exit_is_the_model_of_its_first_blocks(variables, batch, execution):
    """Property 1: copied norm and head; compiled apart, so to rounding."""
    model = NestedLM(backbone=functools.partial(backbone, layers=execution), depths=DEPTHS)
    output, _ = compiled(model)(variables, batch["inputs"])
    for index, blocks in enumerate(DEPTHS):
        params = jax.tree.map(lambda x: x, variables["params"])
        params["group_0"] = jax.tree.map(lambda x, n=blocks: x[:n], params["group_0"])
        cut = backbone(groups=[Group([block], blocks)])
        wanted, _ = compiled(cut)({"params": params}, batch["inputs"])
        np.testing.assert_allclose(depth.exit_logits(output, index), wanted, atol=1e-5)
    np.testing.assert_array_equal(output["emitted"], depth.exit_logits(output, len(DEPTHS) - 1))


def test_an_exit_has_the_bits_of_its_first_blocks_operation_by_operation(variables, batch):
    plain, own = backbone(layers="unroll"), models.unstack(variables)
    call = lambda *args, method: plain.apply(own, *args, method=method)
    with jax.disable_jit():
        model = NestedLM(backbone=functools.partial(backbone, layers="unroll"), depths=DEPTHS)
        output, _ = model.apply(own, batch["inputs"])
        x = call(batch["inputs"], method="embed")
        for index in range(4):
            x, _ = call(index, x, method="run_block")
            if index + 1 in DEPTHS:
                ours = depth.exit_logits(output, DEPTHS.index(index + 1))
                np.testing.assert_array_equal(ours, call(x, method="classify"))


def test_the_only_exit_is_plain_fine_tuning(variables, batch):
    """Property 2: loss and gradients."""
    whole = MODEL.clone(depths=(4,))
    ours = gradient(whole, NestedObjective())(variables["params"], batch, 0)
    wanted = gradient(backbone(), LMObjective())(variables["params"], batch, 0)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, ours, wanted)


def test_no_parameter_is_added(variables, batch):
    """Property 3."""
    drawn = nn.meta.unbox(jax.jit(MODEL.init)(jax.random.key(0), batch["inputs"]))
    jax.tree.map(np.testing.assert_array_equal, drawn, variables)
    assert drawn["controls"]["thresholds"].tolist() == [2.0, 2.0]
    own = jax.jit(MODEL.clone(own_heads=True).init)(jax.random.key(0), batch["inputs"])
    heads = nn.meta.unbox(own)["params"].pop("exit_heads")
    assert heads.shape == (2, 16, V) and not heads.any()


def test_blocks_learn_from_the_exits_above_them(variables, batch):
    """Property 4: the weight is 1/x; the last block hears of the last exit alone."""

    def losses(params):
        own = {**variables, "params": params}
        output, aux = models.apply(MODEL, own, batch["inputs"], train=True)
        return jnp.stack([NestedObjective(exits=(i,))(output, aux, batch, 0)[0] for i in range(3)])

    together = jax.jit(jax.jacrev(losses))(variables["params"])
    each = [jax.tree.map(lambda g, i=index: g[i], together) for index in range(3)]
    for index, (grads, blocks) in enumerate(zip(each, DEPTHS, strict=True)):
        sizes = [
            jnp.abs(x).max(axis=tuple(range(1, x.ndim))) for x in jax.tree.leaves(grads["group_0"])
        ]  # noqa: E501
        reached = np.max(sizes, axis=0) > 0
        assert reached.tolist() == [layer < blocks for layer in range(4)], index
    total = gradient(MODEL, NestedObjective())(variables["params"], batch, 0)[1]
    mean = jax.tree.map(lambda *g: sum(g) / 3, *each)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), total, mean)


def test_the_loss_is_the_mean_over_exits_of_masked_means(variables, batch):
    output, aux = compiled(MODEL)(variables, batch["inputs"])
    counted = np.asarray(batch["mask"], np.float64)
    wanted = []
    for index in range(3):
        logits = np.asarray(depth.exit_logits(output, index), np.float64)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        chosen = np.take_along_axis(p, np.asarray(batch["targets"])[..., None], -1)[..., 0]
        wanted.append(-(np.log(chosen) * counted).sum() / counted.sum())
    for parts in (1, 2, 3):
        loss, metrics = NestedObjective(parts=parts)(output, aux, batch, 0)
        np.testing.assert_allclose(loss, np.mean(wanted), rtol=1e-5)
        np.testing.assert_allclose([metrics[f"nll_{i}"].value() for i in range(3)], wanted, 1e-5)
    # Property 9: in another order of exits, the same.
    turned = {**output, "states": output["states"][::-1]}
    np.testing.assert_allclose(NestedObjective()(turned, aux, batch, 0)[0], loss, rtol=1e-6)


def test_one_exit_a_step_is_the_mean_in_expectation(variables, batch):
    output, aux = compiled(MODEL)(variables, batch["inputs"])
    draw = NestedObjective(mode="sample", seed=3)
    each = [NestedObjective(exits=(i,))(output, aux, batch, 0)[0] for i in range(3)]
    found = np.asarray(jax.vmap(lambda step: draw(output, aux, batch, step)[0])(jnp.arange(600)))
    assert np.isclose(found[:, None], np.asarray(each)[None], rtol=1e-6).any(axis=1).all()
    shares = [np.isclose(found, one, rtol=1e-6).mean() for one in each]
    np.testing.assert_allclose(shares, 1 / 3, atol=5 * np.sqrt(2 / 9 / 600))
    other = NestedObjective(mode="sample", seed=4)(output, aux, batch, jnp.arange(1)[0])
    assert set(other[1]) == {"nll_drawn"}


def scratch_bytes(fn, *args):
    """Of the compiled program, beside arguments and results."""
    return fn.lower(*args).compile().memory_analysis().temp_size_in_bytes


def test_no_more_than_one_exits_logits_are_held(variables):
    """Six exits need hardly more memory than two where logits are what fills it."""
    wide = functools.partial(backbone, vocab_size=4096, groups=[Group([block], 6)])
    tokens = jnp.zeros((4, 32), jnp.int32)
    batch = {"inputs": tokens, "targets": tokens, "mask": jnp.ones(tokens.shape)}
    drawn = nn.meta.unbox(jax.eval_shape(wide().init, jax.random.key(0), tokens))["params"]
    held = []
    for depths in ((5, 6), (1, 2, 3, 4, 5, 6)):
        model = NestedLM(backbone=wide, depths=depths)
        held.append(scratch_bytes(gradient(model, NestedObjective()), drawn, batch, 0))
    logits = 4 * 32 * 4096 * 4
    assert held[1] - held[0] < logits, held


def test_own_heads_start_at_the_shared_one(variables, batch):
    model = MODEL.clone(own_heads=True)
    own = {**variables, "params": {**variables["params"], "exit_heads": jnp.zeros((2, 16, V))}}
    shared, _ = compiled(MODEL)(variables, batch["inputs"])
    output, _ = compiled(model)(own, batch["inputs"])
    moved = {
        **own,
        "params": {**own["params"], "exit_heads": jnp.zeros((2, 16, V)).at[1, 0, 5].set(1.0)},
    }
    changed, _ = compiled(model)(moved, batch["inputs"])
    for index in range(3):
        ours, wanted = depth.exit_logits(output, index), depth.exit_logits(shared, index)
        np.testing.assert_allclose(ours, wanted, atol=1e-6)
        change = depth.exit_logits(changed, index) - ours
        added = shared["states"][index][..., 0] if index == 1 else jnp.zeros((B, T))
        np.testing.assert_allclose(change[..., 5], added, atol=1e-5)
        np.testing.assert_allclose(change[..., :5], 0, atol=1e-6)


def test_without_the_norm_at_early_exits(variables, batch):
    output, _ = compiled(MODEL.clone(norm_early=False))(variables, batch["inputs"])
    plain, own = backbone(layers="unroll"), models.unstack(variables)
    x = plain.apply(own, batch["inputs"], method="embed")
    x, _ = plain.apply(own, 0, x, method="run_block")
    np.testing.assert_allclose(output["states"][0], x, atol=1e-5)
    normed, _ = compiled(MODEL)(variables, batch["inputs"])
    np.testing.assert_allclose(output["states"][-1], normed["states"][-1], atol=1e-6)


def test_early_heads_are_counted_in_training(variables, batch):
    _, aux = models.apply(MODEL, variables, batch["inputs"], batch["mask"], train=True)
    ledger = Ledger(MODEL.cost((B, T))).record(jax.device_get(aux.events))
    real = int(batch["mask"].sum())
    assert ledger.total(under="exits/") == 2 * real * 2 * 16 * V
    assert ledger.events("executed", under="exits/") == 2 * B * T
    assert aux.plans == {}


def test_confident_tokens_leave_early(variables, batch):
    """Emitted logits, the plan and what is needed, token by token; nothing compiles for other thresholds."""
    call = jax.jit(functools.partial(models.apply, MODEL, capture=("plan",)))
    exits, whole = set(), call(variables, batch["inputs"], batch["mask"])[1].plans["exit"]
    assert (whole.exit == 2).all()
    middle = np.median(whole.scores, axis=0)[:2]
    for tau in ((0.0, 0.0), middle):
        own = {**variables, "controls": controls(*tau)}
        output, aux = call(own, batch["inputs"], batch["mask"])
        read = [np.asarray(depth.exit_logits(output, i)) for i in range(3)]
        p = [np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in read]
        left = aux.plans["exit"].exit.reshape(B, T)
        layers, pairs, asked = [0] * 4, [0] * 4, 0
        for i, j in np.ndindex(B, T):
            early = [e for e in (0, 1) if p[e][i, j].max() >= tau[e]]
            wanted = early[0] if early else 2
            assert left[i, j] == wanted
            np.testing.assert_allclose(output["emitted"][i, j], read[wanted][i, j], atol=1e-6)
            if batch["mask"][i, j]:
                asked += min(wanted + 1, 2)
                for layer in range(DEPTHS[wanted]):
                    layers[layer] += 1
                    pairs[layer] += int(batch["mask"][i, : j + 1].sum())
        found = aux.events["group_0"]["block_0"]
        assert found["ffn"]["tokens"].needed.tolist() == layers
        assert found["mixer"]["projections"].needed.tolist() == layers
        assert found["mixer"]["pairs"].needed.tolist() == pairs
        assert found["ffn"]["tokens"].executed.tolist() == [B * T] * 4
        assert int(aux.events["exits"]["tokens"].needed) == asked
        exits |= set(np.ravel(left).tolist())
    assert exits == {0, 1, 2} and call._cache_size() == 1


def test_permuting_samples_permutes_exits(variables, batch):
    output, _ = compiled(MODEL)(variables, batch["inputs"])
    turned, _ = compiled(MODEL)(variables, batch["inputs"][::-1])
    np.testing.assert_allclose(turned["states"], output["states"][:, ::-1], atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MODEL.clone(depths=(1, 3)), "the last is all 4"),
        (lambda: NestedObjective(exits=(5,)), "names 5"),
        (lambda: NestedObjective(parts=4), "does not divide"),
        (lambda: NestedObjective(parts=0), "1 or more parts"),
        (lambda: NestedObjective(mode="sample", exits=(0,)), "name exits"),
    ],
)
def test_bad_input(variables, batch, make, message):
    with pytest.raises(DyncompError, match=message):
        made = make()
        model, objective = (
            (made, NestedObjective()) if isinstance(made, NestedLM) else (MODEL, made)
        )
        output, aux = models.apply(model, variables, batch["inputs"])
        objective(output, aux, batch, 0)


def test_a_plain_model_has_no_exits(variables, batch):
    output, aux = compiled(backbone())(variables, batch["inputs"])
    with pytest.raises(DyncompError, match="make it the model"):
        depth.exit_logits({"emitted": output}, 0)
    assert token_nll(output, batch["targets"]).shape == (B, T)
