"""Damaged, hostile and mismatched files: one clear line each, and nothing opened that should not be."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dyncomp import pretrained
from dyncomp.core.errors import DyncompError
from dyncomp.pretrained import architectures, weights
from dyncomp.pretrained.fields import Fields

CONFIG = {
    **{"model_type": "llama", "vocab_size": 19, "hidden_size": 8, "intermediate_size": 12},
    **{"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32},
}


@pytest.fixture(scope="module")
def original(tmp_path_factory, random_checkpoint):
    """One good folder for the module; tests damage copies."""
    return random_checkpoint(tmp_path_factory.mktemp("good"), CONFIG)


@pytest.fixture
def folder(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "model"))


def refused(folder, match):
    with pytest.raises(DyncompError, match=match) as caught:
        pretrained.load(folder)
    assert "\n" not in str(caught.value)


def edit(folder, **changes):
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(config))


def split_header(raw):
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def rewrite(folder, change):
    """Writes the weights with a changed header (a dict, or bytes)."""
    path = folder / "model.safetensors"
    header, data = split_header(path.read_bytes())
    new = change(header) or header
    new = new if isinstance(new, bytes) else json.dumps(new).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + data)


def entry(header):
    return header["model.norm.weight"]


HOSTILE = {
    "not json": lambda h: b"{" * 100,
    "deep": lambda h: b"[" * 100_000,
    "a list": lambda h: b"[1, 2]",
    "not utf-8": lambda h: b'{"a\xff": 1}',
    "twice": lambda h: b'{"a": {}, "a": {}}',
    "an entry that is none": lambda h: h | {"x": 3},
    "unknown dtype": lambda h: entry(h).update(dtype="PICKLE"),
    "dtype of no kind": lambda h: entry(h).update(dtype=["F32"]),
    "negative shape": lambda h: entry(h).update(shape=[-8]),
    "shape of floats": lambda h: entry(h).update(shape=[8.0]),
    "shape of bools": lambda h: entry(h).update(shape=[True]),
    "huge shape": lambda h: entry(h).update(shape=[1 << 59, 1 << 59]),
    "past the end": lambda h: entry(h).update(data_offsets=[1 << 40, (1 << 40) + 32]),
    "backwards": lambda h: entry(h).update(data_offsets=[64, 32]),
    "three offsets": lambda h: entry(h).update(data_offsets=[0, 8, 32]),
    "overlap": lambda h: entry(h).update(data_offsets=[0, 32]),
    "no offsets": lambda h: entry(h).pop("data_offsets") and None,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_header(folder, kind):
    rewrite(folder, HOSTILE[kind])
    refused(folder, "damaged or no safetensors")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated(folder, keep):
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:keep])
    refused(folder, "damaged or no safetensors.*fetch it again")
    path.write_bytes(raw + b"x")
    refused(folder, "damaged or no safetensors")


def test_fuzzed_headers(folder):
    """Random bytes anywhere in the first kilobytes: a DyncompError or a model, never another error."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    size = 8 + int.from_bytes(raw[:8], "little")
    rng = np.random.default_rng(0)
    outcomes = []
    for _ in range(400):
        damaged = bytearray(raw)
        for _ in range(rng.integers(1, 6)):
            damaged[rng.integers(0, size)] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            weights.read_header(path)
            outcomes.append("read")
        except DyncompError as error:
            outcomes.append("refused")
            assert "\n" not in str(error)
    assert outcomes.count("refused") > 300


def test_wrong_shape(folder):
    def change(header):
        entry(header)["shape"] = [4, 2]

    rewrite(folder, change)
    refused(folder, r"model.norm.weight is \(4, 2\), but config.json asks for \(8,\)")


def test_missing_tensor_and_extra_tensor(folder):
    rewrite(folder, lambda h: {n.replace("model.norm", "model.other"): v for n, v in h.items()})
    refused(folder, "tensor model.norm.weight is missing")
    edit(folder, tie_word_embeddings=True, num_hidden_layers=1)
    rewrite(folder, lambda h: {n.replace("model.other", "model.norm"): v for n, v in h.items()})
    refused(folder, r"9 tensors have no place .*model\.layers\.1\.")


def test_integer_weights(folder):
    rewrite(folder, lambda h: entry(h).update(dtype="I32"))
    refused(folder, "is I32; weights must be")


def test_sharded(folder, original):
    """Two files and an index load like one."""
    whole = weights.Weights(folder)
    names = sorted(whole.tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in parts.items():
        planned = {n: ("float32", whole.tensors[n].shape) for n in own}
        weights.write(folder / file, planned, (whole.view(n) for n in own))
    where = {name: file for file, own in parts.items() for name in own}
    (folder / "model.safetensors").unlink()
    refused(folder, "2 .safetensors files and no")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    sharded, single = pretrained.load(folder), pretrained.load(original)
    for name in ("embed", "head"):
        np.testing.assert_array_equal(
            sharded.variables["params"][name], single.variables["params"][name]
        )
    (folder / "b.safetensors").unlink()
    refused(folder, "b.safetensors is missing")
    for name in ("../b.safetensors", "/etc/passwd", "b.bin", 3):
        index.write_text(json.dumps({"weight_map": {"x": name}}))
        refused(folder, "no plain file" if isinstance(name, str) else "no index|no plain file")
    for text in ("[]", "{", '{"weight_map": []}'):
        index.write_text(text)
        refused(folder, "no index of weights")


def test_no_pickle_is_opened(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "0 .safetensors files.*pickled .bin files are not opened")


BAD_CONFIG = {
    "unknown architecture": ({"model_type": "mamba"}, "'mamba' is not supported; known: llama"),
    "no architecture": ({"model_type": None}, "model_type is missing"),
    "a size that is text": ({"hidden_size": "8"}, "hidden_size='8'; expected int"),
    "a negative size": ({"vocab_size": -3}, "vocab_size=-3; expected a positive count"),
    "endless layers": ({"num_hidden_layers": 10**6}, "more than 1000 is not believed"),
    "more layers": ({"num_hidden_layers": 40}, "more layers or experts"),
    "another width": ({"hidden_size": 16}, "config.json asks for"),
    "heads": ({"num_key_value_heads": 3}, "not a multiple"),
    "dynamic": (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        "RoPE scaling 'dynamic' is not supported",
    ),
    "scaling below 1": ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "use 1 or more"),
    "scaling without factor": ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
    "part of a head": ({"partial_rotary_factor": 0.5}, "only 1.0"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias=True is not supported"),
    "theta": ({"rope_theta": -1.0}, "expected a base above 1"),
    "rope by layer": ({"rope_parameters": {"full_attention": {}}}, "each kind of layer"),
}


@pytest.mark.parametrize("kind", BAD_CONFIG)
def test_bad_config(folder, kind):
    changes, match = BAD_CONFIG[kind]
    edit(folder, **changes)
    refused(folder, match)


NONSENSE = [
    *(None, 0, -1, 1, 3, 2**31, 1e30, -0.5, float("nan"), float("inf"), True, "", "x"),
    *([], [1], [None, None], {}, {"factor": 2.0}, ["sliding_attention"] * 2),
]


def test_fuzzed_configs():
    """Any value in any field of any architecture: numbers of a model, or one line."""
    golden = json.loads((Path(__file__).parent / "golden.json").read_text())["cases"]
    rng = np.random.default_rng(0)
    outcomes = []
    for _ in range(1500):
        config = dict(golden[rng.choice(list(golden))]["config"])
        names = [*config, "rope_parameters", "layer_types", "mlp_only_layers", "sliding_window"]
        for name in rng.choice(names, rng.integers(1, 3)):
            config[name] = NONSENSE[rng.integers(len(NONSENSE))]
        try:
            said = Fields(config)
            outcomes.append(len(architectures.find(said).read(said).groups()))
        except DyncompError as error:
            outcomes.append(0)
            assert "\n" not in str(error)
    assert 200 < outcomes.count(0) < 1400


def test_bad_sources(folder, tmp_path):
    (folder / "config.json").write_text("{")
    refused(folder, "is not JSON")
    (folder / "config.json").write_text("[]")
    refused(folder, "not a JSON object")
    (folder / "config.json").unlink()
    refused(folder, "has no config.json")
    refused(str(tmp_path / "nowhere"), "does not exist; give a folder")
    (tmp_path / "a.bin").write_bytes(b"")
    refused(tmp_path / "a.bin", "give a folder, a .gguf file or a .whl")
    (tmp_path / "a.whl").write_bytes(b"PK")
    refused(tmp_path / "a.whl", "is not a wheel")


def test_no_network(monkeypatch, tmp_path):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused("someone/some-model", "cannot fetch 'someone/some-model': no route; with no network")


def test_hub_asks_for_no_pickle(monkeypatch, original):
    import huggingface_hub

    asked = {}

    def give(name, **kwargs):
        asked.update(kwargs, name=name)
        return str(original)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", give)
    assert pretrained.load("someone/some-model").model.vocab_size == 19
    assert asked["name"] == "someone/some-model"
    assert all(p.endswith((".safetensors", ".json", ".jinja")) for p in asked["allow_patterns"])


def test_smollm2_path(monkeypatch, tmp_path):
    monkeypatch.delenv("DYNCOMP_SMOLLM2", raising=False)
    assert pretrained.smollm2() is None
    monkeypatch.setenv("DYNCOMP_SMOLLM2", str(tmp_path / "x.gguf"))
    with pytest.raises(DyncompError, match="does not exist"):
        pretrained.smollm2()
