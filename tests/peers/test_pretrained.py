"""pretrained.load and export against transformers: tiny random models of every architecture."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp import models, pretrained
from dyncomp.attention import rope_angles
from dyncomp.pretrained.fields import Fields, read_rope

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peers

V, T = 61, 40
TOKENS = np.random.default_rng(0).integers(0, V, (2, T))
SMALL = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def rope(theta=10_000.0, **scaling):
    return {"rope_parameters": {"rope_theta": theta, "rope_type": "default", **scaling}}


CASES = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-mha-wide-heads": ("Llama", {"num_key_value_heads": 4, "head_dim": 12}),
    "llama-biases": ("Llama", {"attention_bias": True}),
    "llama-theta": ("Llama", {**rope(500.0), "rms_norm_eps": 1e-5}),
    "llama-linear": ("Llama", rope(rope_type="linear", factor=3.0)),
    "llama-llama3": ("Llama", rope(500.0, **LLAMA3)),
    "llama-yarn": ("Llama", rope(500.0, **YARN)),
    "llama-yarn-told": ("Llama", rope(500.0, **YARN, attention_factor=0.7, beta_fast=16.0)),
    "llama-yarn-mscale": ("Llama", rope(500.0, **YARN, mscale=1.5, mscale_all_dim=0.5)),
    "llama-yarn-smooth": ("Llama", rope(500.0, **YARN, truncate=False)),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-biases": ("Qwen3", {"head_dim": 8, "attention_bias": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral-window": ("Mixtral", {"num_local_experts": 4, "sliding_window": 5}),
    "qwen2-moe": (
        "Qwen2Moe",
        {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 40},
    ),
    "qwen2-moe-mixed": (
        "Qwen2Moe",
        {
            **{**MOE, "num_experts": 4, "shared_expert_intermediate_size": 40},
            **{"num_hidden_layers": 4, "decoder_sparse_step": 2, "norm_topk_prob": True},
        },
    ),
    "qwen3-moe": ("Qwen3Moe", {**MOE, "num_experts": 4, "head_dim": 8, "norm_topk_prob": True}),
    "qwen3-moe-mixed": (
        "Qwen3Moe",
        {**MOE, "num_experts": 4, "head_dim": 8, "mlp_only_layers": [0]},
    ),
    "gpt2": ("GPT2", {}),
    "gpt2-untied": ("GPT2", {"tie_word_embeddings": False, "n_inner": 40}),
}


def make_theirs(peer, case):
    name, changes = CASES[case]
    if name == "GPT2":
        sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
        config = transformers.GPT2Config(
            vocab_size=V, bos_token_id=1, eos_token_id=2, **sizes, **changes
        )
        cls = transformers.GPT2LMHeadModel
    else:
        config = getattr(transformers, f"{name}Config")(**{**SMALL, **changes})
        cls = getattr(transformers, f"{name}ForCausalLM")
    config._attn_implementation = "eager"
    return peer.randomize(cls(config), scale=0.4 if name == "GPT2" else 0.15)


def their_logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def our_logits(loaded):
    apply = jax.jit(functools.partial(models.apply, loaded.model))
    return apply(loaded.variables, jnp.asarray(TOKENS, jnp.int32))[0]


@pytest.fixture
def saved(peer, tmp_path, request):
    """Their model and the folder they saved it to."""
    theirs = make_theirs(peer, request.param)
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs, tmp_path / "theirs"


@pytest.mark.parametrize("saved", CASES, indirect=True)
def test_logits_and_export(saved, tmp_path):
    """Theirs -> ours -> theirs: the same logits at both ends, the same weights bit for bit."""
    theirs, folder = saved
    expected = their_logits(theirs)
    assert expected.std() > 0.3
    loaded = pretrained.load(folder, layers="scan")
    np.testing.assert_allclose(our_logits(loaded), expected, rtol=1e-4, atol=1e-4)
    assert loaded.eos_ids == (2,) and loaded.tokenizer is None
    pretrained.export(tmp_path / "ours", loaded.model, loaded.variables["params"])
    again = reloaded(tmp_path / "ours", theirs)
    np.testing.assert_allclose(their_logits(again), expected, rtol=1e-5, atol=1e-5)


def reloaded(folder, like):
    """What transformers makes of an exported folder; a model without what sets its family apart is a plain one."""
    auto = transformers.AutoModelForCausalLM
    model, report = auto.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    ours, theirs = dict(model.named_parameters()), dict(like.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    return model.eval()


GOLDEN = json.loads((Path(__file__).parents[1] / "pretrained" / "golden.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_golden_numbers_are_transformers(random_checkpoint, tmp_path, case):
    """What tests/pretrained compares with, computed again; these configs are of transformers 4's style."""
    known = GOLDEN["cases"][case]
    folder = random_checkpoint(tmp_path, known["config"], known["scale"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        logits = model.eval()(torch.tensor(GOLDEN["tokens"])).logits.numpy()
    np.testing.assert_allclose(logits[1, (0, 11, 23), :4], known["logits"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits.std(), known["std"], rtol=1e-4)


PUBLISHED = {
    "llama-3.1": (5e5, 128, {**LLAMA3, "original_max_position_embeddings": 8192}),
    "llama-3.2": (5e5, 64, {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}),
    "qwen2.5-yarn": (1e6, 128, {**YARN, "original_max_position_embeddings": 32768}),
    "linear": (1e4, 128, {"rope_type": "linear", "factor": 4.0}),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_published_rope_scaling(peer, case):
    """The frequencies and the attention factor themselves, at the sizes of published models."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theta, width, scaling = PUBLISHED[case]
    said = {"rope_theta": theta, **scaling}
    config = transformers.LlamaConfig(
        **{**SMALL, "head_dim": width, "max_position_embeddings": 131072}, rope_parameters=said
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")
    values = {"rope_parameters": said, "max_position_embeddings": 131072}
    found_theta, found = read_rope(Fields(values))
    angles = rope_angles(jnp.ones((1,), jnp.int32), width, found_theta, found)[0]
    np.testing.assert_allclose(angles, frequencies.numpy(), rtol=2e-5)
    assert found.amplitude == pytest.approx(factor)


def test_cached_decode_with_a_window(peer, tmp_path):
    """A prompt longer than the window, then token by token, against their cache."""
    theirs = make_theirs(peer, "mistral-window")
    theirs.save_pretrained(tmp_path)
    loaded = pretrained.load(tmp_path)
    apply = jax.jit(functools.partial(models.apply, loaded.model))
    cache, past, start = loaded.model.init_cache(2, 20), None, 0
    for stop in (14, 15, 16, 17, 18):
        part = TOKENS[:, start:stop]
        logits, aux = apply(loaded.variables, jnp.asarray(part, jnp.int32), cache=cache)
        out = theirs(torch.from_numpy(part), past_key_values=past, use_cache=True)
        np.testing.assert_allclose(logits, out.logits.detach().numpy(), rtol=1e-4, atol=1e-4)
        cache, past, start = aux.cache, out.past_key_values, stop


def test_their_sharded_files(peer, tmp_path):
    theirs = make_theirs(peer, "llama")
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = (pretrained.load(tmp_path / n).variables["params"] for n in ("one", "many"))
    jax.tree.map(np.testing.assert_array_equal, one, many)


def test_older_gpt2_names(peer, tmp_path):
    """The published GPT-2 leaves out the prefix of its tensors and keeps its causal masks as buffers."""
    from safetensors.torch import load_file, save_file

    theirs = make_theirs(peer, "gpt2")
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    plain = pretrained.load(tmp_path).variables["params"]
    old = {n.removeprefix("transformer."): t for n, t in load_file(path).items()}
    save_file(old | {"h.0.attn.bias": torch.ones(1, 1, 64, 64)}, path)
    jax.tree.map(
        np.testing.assert_array_equal, pretrained.load(tmp_path).variables["params"], plain
    )


def test_bfloat16_files(peer, tmp_path):
    """Stored in bfloat16 by transformers, read in float32 by both."""
    theirs = make_theirs(peer, "llama").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    loaded = pretrained.load(tmp_path, layers="scan")
    wide = type(theirs).from_pretrained(tmp_path, dtype=torch.float32).eval()
    np.testing.assert_allclose(our_logits(loaded), their_logits(wide), rtol=1e-4, atol=1e-4)
