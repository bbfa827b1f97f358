"""`dyncomp generate` on a tiny exported model: text, JSON, batches, errors."""

import json

import pytest

from dyncomp.cli.main import main
from dyncomp.decoding.text import TextStream, token_pieces


@pytest.fixture
def folder(tiny_model):
    return str(tiny_model)


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


class Bytes:
    """A token a byte."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def test_pieces_give_a_character_to_the_token_that_completes_it():
    assert token_pieces(Bytes(), "aé€".encode()) == ["a", "", "é", "", "", "€"]
    assert token_pieces(Bytes(), "é€".encode()[:-1]) == ["", "é", "", ""]
    stream = TextStream(Bytes(), stop=["END"])
    for byte in b"xyENDz":
        stream.push(byte)
    assert stream.pieces == ["x", "y", "", "", ""] and stream.text == "xy"


def test_characters_come_whole_and_stop_strings_end():
    stream = TextStream(Bytes(), stop=["END"])
    assert [stream.push(b) for b in "é".encode()] == ["", "é"]
    assert [stream.push(b) for b in b"xENxEND"] == ["x", "", "", "ENx", "", "", ""]
    assert stream.stopped and stream.text == "éxENx" and stream.push(65) == stream.finish() == ""
    stream = TextStream(Bytes(), stop=["END"])
    assert [stream.push(b) for b in b"aEN"] == ["a", "", ""] and stream.finish() == "EN"
