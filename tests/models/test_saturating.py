"""An encoder-decoder that leaves early: decisions against a full pass, caches by hand, prices, segments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dyncomp.attention import Attention
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Ledger
from dyncomp.exits import Decay
from dyncomp.experts import MLP
from dyncomp.models import Block, CrossBlock, EncoderDecoder, ImageTextRow, SaturatingVLM, layout

B, Q, T, V, D, HEADS, HIDDEN, PATCHES = 6, 3, 2, 11, 8, 2, 12, 4
DEPTHS = (3, 3)
ROW = ImageTextRow(height=4, width=4, channels=1, text=Q, answer=T)
attn = functools.partial(Attention, heads=HEADS, rope_theta=None, bias=True)
mlp = functools.partial(MLP, hidden=HIDDEN)
NET = functools.partial(
    EncoderDecoder, vocab_size=V, d_model=D, row=ROW, patch=2, layers="unroll",
    encoder=functools.partial(
        Block, mixer=functools.partial(attn, causal=False), ffn=mlp, norm="layer"
    ),
    decoder=functools.partial(CrossBlock, mixer=attn, ffn=mlp, heads=HEADS),
    encoder_depth=DEPTHS[0], decoder_depth=DEPTHS[1],
)  # fmt: skip
MODEL = SaturatingVLM(net=NET)
RNG = np.random.default_rng(0)
TEXT = np.asarray([[4, 5, 6], [4, 5, 0], [4, 0, 0], [9, 3, 6], [3, 3, 0], [7, 8, 9]], np.int32)
IMAGES = RNG.normal(size=(B, 4, 4, 1)).astype(np.float32)
READS = RNG.integers(3, V, size=(B, T)).astype(np.int32)
INPUTS = ROW.pack(IMAGES, TEXT, READS)
MASK = np.asarray([[1, 1]] * 4 + [[1, 0]] * 2, np.float32)
NEVER = {"image": 2.0, "text": 2.0, "decoder": 2.0}


def draw(shapes, scale=0.25):
    leaves, tree = jax.tree.flatten(shapes)
    return tree.unflatten(
        [jnp.asarray(scale * RNG.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    )


@pytest.fixture(scope="module")
def params():
    shapes = nn.unbox(jax.eval_shape(MODEL.init, jax.random.key(0), INPUTS))["params"]
    drawn = draw(shapes)
    scales = lambda path, leaf: 1 + leaf if "scale" in str(path[-1]) else leaf
    return jax.tree_util.tree_map_with_path(scales, drawn)


@functools.lru_cache
def compiled(model, method, *static):
    """One compiled call of a model for each set of static arguments."""

    def call(params, controls, *args):
        variables = {"params": layout.unstack(params), "controls": controls}
        return model.apply(variables, *args, *static, method=method)

    return jax.jit(call)


def run(params, model=MODEL, inputs=INPUTS, **thresholds):
    controls = {name: jnp.float32(x) for name, x in {**NEVER, **thresholds}.items()}
    call = compiled(model, "__call__", False, ("plan",))
    return call(params, controls, inputs, MASK)


def states_of(params, inputs=INPUTS):
    """Stream -> (states [l+1 b n d], real)."""
    return compiled(MODEL, "states")(params, {}, inputs)


@functools.lru_cache
def behind():
    """One compiled pass of the decoder's first word behind given states: (memory, raw states, logits)."""
    net = MODEL.template()

    def call(params, left, seen):
        inner = {"params": layout.unstack(params)["inner"]}
        memory = net.apply(inner, *left, method="remember")
        x = net.apply(inner, memory, seen, jnp.asarray(READS[:, :1]), method="decode")
        return memory, x, net.apply(inner, x, method="classify")

    return jax.jit(call)


def whole(params):
    """States after the whole encoder, and which positions are real."""
    parts = states_of(params).values()
    return [x[-1] for x, _ in parts], jnp.concatenate([real for _, real in parts], axis=1)


def cosine(x, y, mask=...):
    x, y = (np.asarray(part, np.float64)[mask].ravel() for part in (x, y))
    return x @ y / (np.linalg.norm(x) * np.linalg.norm(y))


def middle(params):
    """Thresholds between the similarities of examples, so that they leave at several depths."""
    found = {}
    for name, (x, real) in states_of(params).items():
        said = [cosine(x[i + 1, b], x[i, b], real[b]) for i in (0, 1) for b in range(B)]
        found[name] = float(np.quantile(said, 0.6))
    plan = run(params)[1].plans["decoder"]
    return {**found, "decoder": float(np.nanquantile(plan.scores, 0.6))}


def test_thresholds_of_one_run_the_whole_network(params):
    output, aux = run(params, image=1.0, text=1.0, decoder=1.0)
    np.testing.assert_allclose(output["emitted"], output["final"], atol=1e-5)
    again, _ = run(params)
    np.testing.assert_array_equal(output["emitted"], again["emitted"])
    assert (np.asarray(output["time"]) == 1.0).all()
    assert (np.asarray(aux.plans["image"].exit) == DEPTHS[0] - 1).all()
    train, _ = compiled(MODEL, "__call__", True)(params, NEVER_CONTROLS, INPUTS, None)
    np.testing.assert_allclose(train["layers"][-1], output["final"], atol=1e-5)
    assert train["layers"].shape == (DEPTHS[1], B, T, V)


NEVER_CONTROLS = {name: jnp.float32(value) for name, value in NEVER.items()}


def test_below_minus_one_everything_leaves_after_its_first_layer(params):
    output, aux = run(params, image=-1.1, text=-1.1, decoder=-1.1)
    for name in ("image", "text", "decoder"):
        assert (np.asarray(output[f"{name}_layers"]) == 1).all()
    np.testing.assert_allclose(output["time"], 2 / sum(DEPTHS), rtol=1e-6)
    ledger = Ledger(MODEL.cost(INPUTS.shape)).record(jax.device_get(aux.events))
    real = (TEXT != 0).sum(1)
    token, pair = 8 * D * D + 4 * D * HIDDEN, 4 * D
    hand = sum(n * token + n * n * pair + 6 * D * n for n in [*real, *[PATCHES] * B])
    memory, words = real + PATCHES, MASK.sum(1)
    hand += (memory * 4 * D * D).sum()  # keys and values of the first layer, once
    hand += (words * (12 * D * D + 4 * D * HIDDEN + 6 * D + pair * memory)).sum()
    hand += pair * (words * (words + 1) / 2).sum()
    hand += words.sum() * 2 * D * V + B * 2 * 16 * D
    assert ledger.total() == hand
    full = Ledger(MODEL.cost(INPUTS.shape)).record(jax.device_get(run(params)[1].events))
    assert full.total("executed") == ledger.total("executed") >= full.total("needed") > 2 * hand


def test_exits_are_those_of_a_full_pass(params):
    thresholds = middle(params)
    output, aux = run(params, **thresholds)
    for name, (x, real) in states_of(params).items():
        wanted = [
            next(
                (i + 1 for i in (0, 1) if cosine(x[i + 1, b], x[i, b], real[b]) > thresholds[name]),
                3,
            )
            for b in range(B)
        ]
        np.testing.assert_array_equal(output[f"{name}_layers"], wanted)
        assert len(set(wanted)) > 1
    # Of the first word no cache exists: its exits are those of a full pass over the memory that was left.
    left = [
        jnp.asarray(np.asarray(x)[output[f"{name}_layers"], np.arange(B)])
        for name, (x, _) in states_of(params).items()
    ]
    _, x, said = behind()(params, left, whole(params)[1])
    wanted = [
        next((i + 1 for i in (0, 1) if cosine(x[i + 1, b], x[i, b]) > thresholds["decoder"]), 3)
        for b in range(B)
    ]
    np.testing.assert_array_equal(output["decoder_layers"][:, 0], wanted)
    said = np.asarray(said)[wanted, np.arange(B), 0]
    np.testing.assert_allclose(output["emitted"][:, 0], said, atol=1e-5)
    depths = np.asarray(output["decoder_layers"])
    assert len(set(depths.ravel())) > 1
    np.testing.assert_array_equal(aux.plans["decoder"].exit, depths.ravel() - 1)
    sizes = np.asarray([PATCHES, 0]) + np.asarray([[0, 1]]) * (TEXT != 0).sum(1)[:, None]
    encoder = (sizes * np.stack([output["image_layers"], output["text_layers"]], 1)).sum(1)
    share = (encoder / sizes.sum(1))[:, None] + depths
    np.testing.assert_allclose(output["time"], share / 6, rtol=1e-5)


def test_streams_decide_by_themselves(params):
    other = ROW.pack(IMAGES, TEXT[::-1].copy(), READS)
    one, two = states_of(params), states_of(params, other)
    np.testing.assert_array_equal(one["image"][0], two["image"][0])
    assert np.abs(np.asarray(one["text"][0]) - two["text"][0]).max() > 0.1
    thresholds = middle(params)
    a, b = run(params, **thresholds)[0], run(params, inputs=other, **thresholds)[0]
    np.testing.assert_array_equal(a["image_layers"], b["image_layers"])
    low = run(params, **{**thresholds, "image": thresholds["image"] - 0.01})[0]
    assert (np.asarray(low["image_layers"]) <= a["image_layers"]).all()
    np.testing.assert_array_equal(low["text_layers"], a["text_layers"])


def written(params, model, threshold):
    """The carry after writing behind the memory of the whole encoder, every state of it, and words read."""
    states, seen = whole(params)
    memory = behind()(params, states, seen)[0]
    carry, scores = compiled(model, "write")(
        params, {}, memory, seen, jnp.asarray(READS), jnp.float32(threshold)
    )
    return jax.device_get(carry), np.asarray(scores), np.asarray(memory)


def test_copied_caches_hold_the_last_layer_that_ran(params):
    carry, scores, memory = written(params, MODEL, middle(params)["decoder"])
    depth, caches = carry["depth"], carry["caches"]
    assert set(depth.ravel()) == {1, 2, 3}
    for b, t, above in np.ndindex(B, T, 3):
        if above >= depth[b, t]:
            for name in ("keys", "values"):
                slot = lambda layer, b=b, t=t, name=name: getattr(caches[layer]["mixer"], name)[
                    b, t
                ]
                np.testing.assert_array_equal(slot(above), slot(depth[b, t] - 1))
    # A layer's own keys and values of the memory are there where it has run, and nowhere else.
    ran = np.maximum.accumulate(depth, axis=1).max(1)
    np.testing.assert_array_equal(carry["made"].sum(1), ran)
    np.testing.assert_array_equal(carry["made"], carry["known"])
    own = layout.unstack(params)["inner"]["writer"]
    for layer in range(3):
        kernel = np.asarray(own[f"layers_{layer}"]["block_0"]["cross"]["k"]["kernel"], np.float64)
        want = np.einsum("bsd,dhp->bshp", memory, kernel)
        for b in range(B):
            wanted = want[b] if layer < ran[b] else np.zeros_like(want[b])
            np.testing.assert_allclose(caches[layer]["keys"][b], wanted, atol=1e-5)
    assert np.isnan(scores[np.arange(1, 4) > depth[..., None]]).all()


def test_recomputed_caches_are_projections_of_the_state_that_left(params):
    model = MODEL.clone(self_fill="recompute", cross_fill="copy")
    carry, _, _ = written(params, model, -1.1)
    assert (carry["depth"] == 1).all() and carry["known"].all()
    np.testing.assert_array_equal(carry["made"], [[True, False, False]] * B)
    for layer in (1, 2):  # of the memory: copies
        np.testing.assert_array_equal(carry["caches"][layer]["keys"], carry["caches"][0]["keys"])
    block = layout.unstack(params)["inner"]["writer"]
    # The state that left at the first word is what the first layer makes of it, by a full pass.
    _, x, _ = behind()(params, *whole(params))
    state = np.asarray(x[1][:, 0], np.float64)
    centred = state - state.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    for layer in (1, 2):
        own = jax.tree.map(
            lambda leaf: np.asarray(leaf, np.float64), block[f"layers_{layer}"]["block_0"]
        )
        rows = normed * own["attn_norm"]["scale"] + own["attn_norm"]["bias"]
        want = np.einsum("bd,dhp->bhp", rows, own["attn"]["k"]) + own["attn"]["k_bias"]
        np.testing.assert_allclose(carry["caches"][layer]["mixer"].keys[:, 0], want, atol=1e-4)


def test_a_joint_encoder_mixes_the_streams(params):
    joint = MODEL.clone(net=functools.partial(NET, streams="joint"))
    apart = states_of(params)
    (x, real), *rest = compiled(joint, "states")(params, {}, INPUTS).values()
    assert not rest and joint.streams == ("joint",) and set(joint.initial()) == {"joint", "decoder"}
    np.testing.assert_allclose(x[0, :, :PATCHES], apart["image"][0][0], atol=1e-6)
    np.testing.assert_allclose(x[0, :, PATCHES:], apart["text"][0][0], atol=1e-6)
    np.testing.assert_array_equal(real[:, PATCHES:], TEXT != 0)
    assert np.abs(np.asarray(x[1, :, :PATCHES]) - apart["image"][0][1]).max() > 1e-3
    assert set(joint.cost(())) == {"joint", "decoder", "fill", "head", "embed"}


def test_options_are_checked_early(unchecked):
    with pytest.raises(DyncompError, match="'copy' or 'recompute'"):
        SaturatingVLM(net=NET, self_fill="none")  # type: ignore[arg-type]
    with pytest.raises(DyncompError, match="'own' or 'copy'"):
        SaturatingVLM(net=NET, cross_fill="none")  # type: ignore[arg-type]
    with pytest.raises(DyncompError, match="image, text, decoder"):
        SaturatingVLM(net=NET, thresholds={"joint": 0.9})
    with pytest.raises(DyncompError, match="'apart' or 'joint'"):
        NET(streams="both")
    assert SaturatingVLM(net=NET, thresholds={"image": 0.9}).initial()["image"] == 0.9


def test_masked_and_host_execution_agree(params):
    from dyncomp.runtime import HostExecutor, MaskedExecutor, from_saturating

    net = functools.partial(NET, encoder_depth=2, decoder_depth=2)
    model = MODEL.clone(net=net, decay=Decay(), end=V - 1)
    stacks = {
        name: jax.tree.map(lambda x: x[:2], params["inner"][name]) for name in ("reader", "writer")
    }
    thresholds = {name: jnp.float32(value) for name, value in middle(params).items()}
    params = {"inner": {**params["inner"], **stacks}}
    net = from_saturating(model, {"params": params, "controls": thresholds})
    masked = MaskedExecutor(net)(INPUTS)
    host = HostExecutor(net, INPUTS, capacity=B, buckets=(B,))(INPUTS)
    np.testing.assert_array_equal(masked.exits, host.exits)
    np.testing.assert_array_equal(masked.visits, host.visits)
    np.testing.assert_allclose(masked.outputs, host.outputs, atol=1e-5)
    np.testing.assert_allclose(masked.scores, host.scores, atol=1e-5)
    # The same as writing freely in one program, behind the memory that `__call__` leaves.
    wrote = jax.device_get(compiled(model, "generate")(params, {}, INPUTS, thresholds))
    np.testing.assert_allclose(host.outputs, wrote["logits"], atol=1e-5)
    visits, depth = dict(zip(host.names, host.visits.T, strict=True)), wrote["decoder_layers"]
    for layer in range(2):
        np.testing.assert_array_equal(visits[f"layer_{layer}"], (depth > layer).sum(1))
        np.testing.assert_array_equal(visits[f"keys_{layer}"], wrote["made"][:, layer])
        for name in ("image", "text"):
            ran = wrote[f"{name}_layers"] > layer
            np.testing.assert_array_equal(visits[f"{name}_{layer}"], ran)
    np.testing.assert_array_equal(visits["head"], (depth > 0).sum(1))
    assert len(set(host.visits.sum(1))) > 1
