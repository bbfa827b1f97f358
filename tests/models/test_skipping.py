"""Two passes over prompt and response: against identity blocks, cached decoding, dense networks and by gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dyncomp import models
from dyncomp.attention import Attention
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Ledger
from dyncomp.decoding import Generator, KeepLayers
from dyncomp.experts import SwiGLU
from dyncomp.models import Block, DecoderLM, Group, SkippingLM
from dyncomp.tasks import CodeLM, LMObjective
from dyncomp.tasks.objectives import at_answers, token_nll

B, T, P, LAYERS = 2, 9, 4, 4
KEPT = (0, 1, 3)

mixer = functools.partial(Attention, heads=4, kv_heads=2)
block = functools.partial(Block, mixer=mixer, ffn=functools.partial(SwiGLU, hidden=24))
backbone = functools.partial(
    DecoderLM, vocab_size=31, d_model=16, groups=[Group([block, block], 1), Group([block], 2)]
)


@pytest.fixture(scope="module")
def variables():
    drawn = jax.jit(backbone().init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    return nn.meta.unbox(drawn)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (B, T), 0, 31)


@functools.lru_cache
def compiled(model):
    return jax.jit(functools.partial(models.apply, model))


def skipping(**fields):
    return SkippingLM(backbone=backbone, **{"prefix": P, "kept": KEPT, **fields})


def run(variables, tokens, **fields):
    return compiled(skipping(**fields))(variables, tokens)


def batch_of(tokens):
    ones = jnp.ones(tokens.shape, jnp.float32)
    return {"inputs": tokens, "targets": tokens, "bytes": ones, "mask": ones}


def test_parameters_are_the_backbones(variables, tokens):
    drawn = jax.jit(skipping().init)(jax.random.key(0), tokens)
    jax.tree.map(np.testing.assert_array_equal, nn.meta.unbox(drawn), variables)


@pytest.mark.parametrize("prefix", [0, P])
def test_all_blocks_are_the_dense_network(variables, tokens, prefix):
    """Bit for bit in logits, loss and gradients; as two passes (here forced) to rounding."""
    dense = backbone(layers="unroll")
    model = skipping(prefix=prefix, kept=None, speedup=1)
    batch = batch_of(tokens)

    def loss(params, net):
        output, aux = models.apply(net, {"params": params}, tokens)
        if net is dense:
            output = output[:, max(prefix - 1, 0) :]
        return LMObjective()(output, aux, batch, 0)[0], output

    grad = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    ours, wanted = (grad(variables["params"], net) for net in (model, dense))
    jax.tree.map(np.testing.assert_array_equal, ours, wanted)
    forced = run(variables, tokens, prefix=prefix, kept=None, speedup=1, whole=True)[0]
    for name in ("emitted", "final"):
        np.testing.assert_allclose(forced[name], ours[0][1], atol=1e-5)


@pytest.mark.parametrize("prefix", [0, 1, P])
def test_skipped_blocks_are_identity_after_the_prompt(variables, tokens, prefix):
    """The reference runs whole sequences without caches: skipped blocks change prompt positions only."""
    plain, own = backbone(layers="unroll"), models.unstack(variables)
    call = lambda *args, method: plain.apply(own, *args, method=method)
    x = call(tokens, method="embed")
    prompt = (jnp.arange(T) < prefix)[None, :, None]
    for index in range(LAYERS):
        y, _ = call(index, x, method="run_block")
        x = y if index in KEPT else jnp.where(prompt, y, x)
    wanted = call(x, method="classify")[:, max(prefix - 1, 0) :]
    ours, _ = run(variables, tokens, prefix=prefix)
    assert ours.shape == wanted.shape
    np.testing.assert_allclose(ours, wanted, atol=1e-5)


def test_pruning_runs_no_other_block(variables, tokens):
    plain, own = backbone(layers="unroll"), models.unstack(variables)
    x = plain.apply(own, tokens, method="embed")
    for index in KEPT:
        x, _ = plain.apply(own, index, x, method="run_block")
    wanted = plain.apply(own, x, method="classify")[:, P - 1 :]
    ours, aux = run(variables, tokens, prompt_layers="kept")
    np.testing.assert_allclose(ours, wanted, atol=1e-5)
    assert aux.events["prompt"]["group_0"]["block_0"]["ffn"]["tokens"].needed.tolist() == [B * P]


def test_training_logits_are_those_of_cached_decoding(variables, tokens):
    """Property 5, with prompts of two lengths padded on the left."""
    prompts = [tokens[0, :P].tolist(), tokens[1, : P - 2].tolist()]
    generator = Generator(backbone(), variables, KeepLayers(KEPT), keep_logits=True)
    found = generator.generate(prompts, T - P + 1)
    fed = [[0] * (P - len(p)) + p + one.tokens[:-1] for p, one in zip(prompts, found, strict=True)]
    mask = jnp.asarray([[0.0] * (P - len(p)) + [1.0] * (T - P + len(p)) for p in prompts])
    positions = jnp.maximum(jnp.cumsum(mask, 1).astype(jnp.int32) - 1, 0)
    ours, aux = compiled(skipping())(variables, jnp.asarray(fed), mask=mask, positions=positions)
    for row, one in zip(ours, found, strict=True):
        np.testing.assert_allclose(row, one.logits, atol=1e-5)
    whole = Ledger(skipping().cost((B, T))).record(jax.device_get(aux.events))
    decoded = generator.ledger.total("needed")
    assert whole.total(under="response/") == decoded
    assert whole.total(under="prompt/") < generator.prompt_ledger.total("needed") * 1.01


def test_the_prompt_does_not_know_what_is_kept(variables, tokens):
    """Property 3: the first response token's logits are the same for every keep set."""
    first = [run(variables, tokens, kept=kept)[0][:, 0] for kept in (KEPT, (0, 3), (1, 2))]
    for other in first[1:]:
        np.testing.assert_array_equal(first[0], other)
    pruned = run(variables, tokens, prompt_layers="kept")[0][:, 0]
    assert jnp.abs(pruned - first[0]).max() > 1e-2


@functools.cache
def gradient_of(prefix, prompt_gradient):
    model = skipping(prefix=prefix, prompt_gradient=prompt_gradient)

    def loss(params, tokens):
        output, aux = models.apply(model, {"params": params}, tokens, train=True)
        return LMObjective()(output, aux, batch_of(tokens), 0)[0]

    return jax.jit(jax.grad(loss))


def by_block(grads):
    """Largest gradient of every block, in order of execution."""
    own = models.unstack(grads)
    blocks = [own["group_0"][f"layers_{i}"][f"block_{j}"] for i in (0,) for j in (0, 1)]
    blocks += [own["group_1"][f"layers_{i}"]["block_0"] for i in (0, 1)]
    return [max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(b)) for b in blocks]


@pytest.mark.parametrize(
    ("prefix", "prompt_gradient", "reached"), [(0, True, False), (P, True, True), (P, False, False)]
)
def test_skipped_blocks_learn_through_the_prompt_only(
    variables, tokens, prefix, prompt_gradient, reached
):
    """Property 7."""
    found = by_block(gradient_of(prefix, prompt_gradient)(variables["params"], tokens))
    for index, size in enumerate(found):
        assert (size > 0) == (index in KEPT or reached), (index, size)


def test_gradients_reach_the_prompt_by_finite_differences(variables, tokens):
    grads = gradient_of(P, True)(variables["params"], tokens)
    way = jax.tree.map(lambda g: g / optax_norm(grads), grads)

    @jax.jit
    def loss(scale):
        params = jax.tree.map(lambda p, w: p + scale * w, variables["params"], way)
        output, _ = models.apply(skipping(), {"params": params}, tokens)
        return jnp.mean(token_nll(output, tokens[:, P - 1 :]))

    slope = (loss(2e-4) - loss(-2e-4)) / 4e-4
    np.testing.assert_allclose(slope, optax_norm(grads), rtol=1e-2)


def optax_norm(tree):
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


def test_only_the_response_is_trained(variables, tokens):
    """Targets before the prompt's last position change nothing."""
    output, aux = run(variables, tokens)
    assert output.shape == (B, T - P + 1, 31)
    batch = batch_of(tokens)
    other = {**batch, "targets": batch["targets"].at[:, : P - 1].set(0)}
    loss, metrics = LMObjective()(output, aux, batch, 0)
    assert loss == LMObjective()(output, aux, other, 0)[0]
    wanted = np.mean(token_nll(output, tokens[:, P - 1 :]))
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    assert metrics["nll"].count == B * (T - P + 1)
    judged = CodeLM().metrics(output, batch)
    np.testing.assert_allclose(judged["nll"].value(), wanted, rtol=1e-6)
    assert at_answers(batch, output)["bytes"].shape == (B, T - P + 1)


def test_terms_that_are_off_by_default(variables, tokens):
    both, aux = run(variables, tokens, whole=True)
    only, _ = run(variables, tokens)
    np.testing.assert_allclose(both["emitted"], only, atol=1e-6)
    dense = compiled(backbone(layers="unroll"))(variables, tokens)[0][:, P - 1 :]
    np.testing.assert_allclose(both["final"], dense, atol=1e-5)
    near = float(aux.losses["whole"]["path_similarity"])
    assert -1 < near < 1 and near != 0
    same = run(variables, tokens, whole=True, kept=None, speedup=1)[1]
    np.testing.assert_allclose(same.losses["whole"]["path_similarity"], 1.0, rtol=1e-5)
    batch, plain = batch_of(tokens), LMObjective()(both, aux, batch_of(tokens), 0)[0]
    objective = LMObjective(aux_weights={"path_similarity": -0.5}, final_weight=0.25)
    final = jnp.mean(token_nll(both["final"], tokens[:, P - 1 :]))
    np.testing.assert_allclose(
        objective(both, aux, batch, 0)[0], plain - 0.5 * near + 0.25 * final, rtol=1e-6
    )


def test_price_of_a_response_token(variables, tokens):
    """Property 9: n blocks and the head for each token, counted by hand."""
    _, aux = run(variables, tokens)
    ledger = Ledger(skipping().cost((B, T))).record(jax.device_get(aux.events))
    d, hidden, p, heads, kv = 16, 24, 4, 4, 2
    seen = sum(P + i + 1 for i in range(T - P))
    projections, ffn, head = 2 * d * p * (2 * heads + 2 * kv), 6 * d * hidden, 2 * d * 31
    each = B * ((T - P) * (projections + ffn) + 4 * heads * p * seen)
    assert ledger.total(under="response/") == len(KEPT) * each + B * (T - P) * head
    assert ledger.events(under="prompt/head") == B


def test_which_blocks_are_kept(tokens, variables):
    assert skipping(kept=None, speedup=2).kept_layers() == (0, 3)
    assert skipping(kept=None, speedup=4 / 3, spacing="top").kept_layers() == (0, 2, 3)
    plan = models.apply(skipping(), variables, tokens, capture=("plan",))[1].plans
    assert plan["depth"].tolist() == [4] * P + [3] * (T - P)


def test_recomputing_activations_changes_nothing(variables, tokens):
    again = SkippingLM(functools.partial(backbone, remat="full"), prefix=P, kept=KEPT)
    loss = lambda params, net: jnp.sum(models.apply(net, {"params": params}, tokens)[0] ** 2)
    grad = jax.jit(jax.grad(loss), static_argnums=1)
    ours, wanted = grad(variables["params"], again), grad(variables["params"], skipping())
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3), ours, wanted)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_layers": "none"}, "use 'all' or 'kept'"),
        ({"prefix": -1}, "0 or more"),
        ({"prefix": T}, "leaves no response"),
        ({"kept": (0, 4)}, "layers 0..3"),
        ({"kept": None, "speedup": 3}, "keep 2..4"),
    ],
)
def test_bad_input(unchecked, variables, tokens, fields, message):
    with pytest.raises(DyncompError, match=message):
        models.apply(skipping(**fields), variables, tokens)
