"""`dyncomp generate` on a tiny exported model: text, JSON, batches, errors."""

import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from dyncomp import pretrained
from dyncomp.cli.main import main
from dyncomp.decoding.text import TextStream


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of 61 tokens with random weights and a tokenizer of bytes."""
    import functools

    import jax
    import jax.numpy as jnp

    from dyncomp.attention import Attention
    from dyncomp.experts import SwiGLU
    from dyncomp.models import Block, DecoderLM, Group

    mixer = functools.partial(Attention, heads=4, kv_heads=2)
    block = functools.partial(Block, mixer=mixer, ffn=functools.partial(SwiGLU, hidden=48))
    model = DecoderLM(vocab_size=260, d_model=32, groups=[Group([block], 4)], max_length=128)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, "<s>", "</s>"])}
    backend = Backend(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = pretrained.Tokenizer(backend, {"eos": "</s>"})
    path = tmp_path_factory.mktemp("tiny")
    pretrained.export(path, model, variables["params"], tokenizer)
    return str(path)


def test_text_and_json_say_the_same(folder, capsys):
    arguments = ["generate", folder, "--prompt", "def f(", "--max-new", "12"]
    assert main([*arguments, "--json"]) == 0
    (said,) = json.loads(capsys.readouterr().out)["generated"]
    assert said["prompt"] == "def f(" and len(said["tokens"]) == 12 and said["reason"] == "length"
    assert main(arguments) == 0
    found = capsys.readouterr()
    assert said["text"] in found.out and "12 tokens in" in found.err


def test_a_batch_that_skips_layers_and_stops(folder, capsys):
    arguments = ["generate", folder, "--prompt", "a", "--prompt", "import os", "--max-new", "6"]
    assert main([*arguments, "--speedup", "2", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["generated"]
    assert len(first["tokens"]) == len(second["tokens"]) == 6
    stop = second["text"][1:2]
    assert main([*arguments, "--speedup", "2", "--stop", stop, "--json"]) == 0
    _, cut = json.loads(capsys.readouterr().out)["generated"]
    assert cut["text"] == second["text"].split(stop)[0] and cut["reason"] == "stop"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--max-new", "500"], "exceed the model's 128"),
        (["--chat"], "chat template"),
        (["--temperature", "-1"], "temperature"),
        (["--speedup", "9"], "layers"),
    ],
)
def test_errors_are_one_line(folder, capsys, extra, message):
    assert main(["generate", folder, "--prompt", "a", *extra]) == 1
    said = capsys.readouterr().err.strip()
    assert message in said and len(said.splitlines()) == 1


def test_characters_come_whole_and_stop_strings_end():
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

    stream = TextStream(Bytes(), stop=["END"])
    assert [stream.push(b) for b in "é".encode()] == ["", "é"]
    assert [stream.push(b) for b in b"xENxEND"] == ["x", "", "", "ENx", "", "", ""]
    assert stream.stopped and stream.text == "éxENx" and stream.push(65) == stream.finish() == ""
    stream = TextStream(Bytes(), stop=["END"])
    assert [stream.push(b) for b in b"aEN"] == ["a", "", ""] and stream.finish() == "EN"
