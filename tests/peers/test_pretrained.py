"""pretrained.load and export against transformers: tiny random models of every architecture."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp import models, pretrained

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
