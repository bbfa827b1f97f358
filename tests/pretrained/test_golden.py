"""Logits of tiny random models of every architecture, recorded with transformers (tests/peers checks the record)."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp import models, parallel, pretrained
from dyncomp.core.errors import DyncompError
from dyncomp.models import Group

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
TOKENS = jnp.asarray(GOLDEN["tokens"], jnp.int32)
PLACES = (0, 11, 23)


@pytest.fixture
def folder(random_checkpoint, tmp_path):
    def make(case):
        known = GOLDEN["cases"][case]
        return random_checkpoint(tmp_path / case, known["config"], known["scale"])

    return make


def applied(loaded):
    return jax.jit(functools.partial(models.apply, loaded.model))


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_logits(folder, case):
    loaded = pretrained.load(folder(case), layers="scan")
    logits, _ = applied(loaded)(loaded.variables, TOKENS)
    found = np.asarray(logits)[1, PLACES, :4]
    np.testing.assert_allclose(found, GOLDEN["cases"][case]["logits"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.std(logits), GOLDEN["cases"][case]["std"], rtol=1e-4)
    assert loaded.eos_ids == (2,)


@pytest.mark.parametrize(
    ("case", "layers"),
    [("mistral", "scan"), ("qwen2", "unroll"), ("gpt2", "scan"), ("gpt2", "unroll")],
)
def test_cached_decode_equals_full(folder, case, layers):
    loaded = pretrained.load(folder(case), layers=layers)
    apply = applied(loaded)
    full, _ = apply(loaded.variables, TOKENS)
    cache, parts = loaded.model.init_cache(2, TOKENS.shape[1]), []
    for part in jnp.split(TOKENS, 4, axis=1):  # of one shape: one compilation
        logits, aux = apply(loaded.variables, part, cache=cache)
        cache = aux.cache
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_export_and_load_again(folder, tmp_path, case):
    """The same model and the same bits, whatever the architecture is called."""
    loaded = pretrained.load(folder(case))
    params = loaded.variables["params"]
    separate = case in ("llama", "qwen2")
    given = models.unstack(params) if separate else params
    pretrained.export(tmp_path / "out", loaded.model, given)
    again = pretrained.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again.variables["params"], params)
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["model_type"] == GOLDEN["cases"][case]["config"]["model_type"]
    assert again.model.cost((1, 4)) == loaded.model.cost((1, 4))


def test_mixed_layers_make_groups(folder):
    """A dense layer before each sparse one is a period of two; a window from layer 1 on makes runs."""
    moe = pretrained.load(folder("qwen2_moe")).model
    assert [(len(g.blocks), g.repeat) for g in moe.groups] == [(2, 1)]
    assert not hasattr(moe.groups[0].blocks[0].keywords["ffn"](), "router")
    assert hasattr(moe.groups[0].blocks[1].keywords["ffn"](), "router")


def test_bfloat16_keeps_routers_float32(folder):
    loaded = pretrained.load(folder("mixtral"), dtype="bfloat16", layers="scan")
    full = pretrained.load(folder("mixtral"), layers="scan")
    block = loaded.variables["params"]["group_0"]["layers"]["block_0"]
    assert block["mixer"]["q"].dtype == jnp.bfloat16
    assert block["ffn"]["router"]["kernel"].dtype == jnp.float32
    rounded = full.variables["params"]["head"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(loaded.variables["params"]["head"], rounded)
    assert loaded.model.dtypes.compute == "bfloat16"


def test_on_a_mesh(folder):
    """Split over four devices by the rules in force: the same values, each device its own part."""
    plain = pretrained.load(folder("mixtral"), layers="scan")
    mesh = parallel.MeshSpec(tensor=2, expert=2).build(jax.devices()[:4])
    with parallel.use(mesh, parallel.make_rules({"vocab": None})):
        loaded = pretrained.load(folder("mixtral"), layers="scan", mesh=mesh)
    params = loaded.variables["params"]
    jax.tree.map(np.testing.assert_array_equal, params, plain.variables["params"])
    gate = params["group_0"]["layers"]["block_0"]["ffn"]["gate"]
    assert gate.addressable_shards[0].data.shape == (2, 2, 16, 12)
    q = params["group_0"]["layers"]["block_0"]["mixer"]["q"]
    assert q.addressable_shards[0].data.shape == (2, 16, 2, 4)


def test_mesh_that_does_not_split(folder):
    mesh = parallel.MeshSpec(tensor=4).build(jax.devices()[:4])
    with parallel.use(mesh), pytest.raises(DyncompError, match="does not split"):
        pretrained.load(folder("llama"), mesh=mesh)


def special_model(folder):
    from dyncomp.experts import MLP

    loaded = pretrained.load(folder("llama"))
    block = loaded.model.groups[0].blocks[0]
    mixed = functools.partial(
        block.func, **{**block.keywords, "ffn": functools.partial(MLP, hidden=8)}
    )
    return loaded.model.clone(groups=[Group([mixed], 2)]), loaded.variables["params"]


def test_export_refuses_what_no_architecture_has(folder, tmp_path):
    model, params = special_model(folder)
    with pytest.raises(DyncompError, match="none of llama, .* can express it"):
        pretrained.export(tmp_path / "out", model, params)
    loaded = pretrained.load(folder("mixtral"))
    block = loaded.model.groups[0].blocks[0]
    router = functools.partial(block.keywords["ffn"].keywords["router"], jitter=0.1)
    ffn = functools.partial(block.keywords["ffn"], router=router)
    odd = loaded.model.clone(groups=[Group([functools.partial(block, ffn=ffn)], 2)])
    with pytest.raises(DyncompError, match=r"router\.jitter=0\.1"):
        pretrained.export(tmp_path / "out", odd, loaded.variables["params"])
    with pytest.raises(DyncompError, match="export a model with its own parameters"):
        pretrained.export(tmp_path / "out", loaded.model, params)
    assert not (tmp_path / "out").exists()


def test_learned_positions_end(folder):
    """A table of 40 positions: longer inputs are refused, and embedding alone needs to know where."""
    loaded = pretrained.load(folder("gpt2"), layers="scan")
    embed = lambda tokens, **kw: loaded.model.apply(loaded.variables, tokens, method="embed", **kw)
    with pytest.raises(DyncompError, match="learned_positions=40"):
        loaded.model.apply(loaded.variables, jnp.zeros((1, 41), jnp.int32))
    with pytest.raises(DyncompError, match="at positions="):
        embed(TOKENS)
    params = loaded.variables["params"]
    expected = params["embed"][TOKENS[:, :1]] + params["positions"][7]
    np.testing.assert_array_equal(
        embed(TOKENS[:, :1], positions=jnp.full((1, 1), 7)), np.asarray(expected)
    )
