"""`dyncomp generate` with two models: drafts, turns, who wrote what, errors."""

import json
import re

import pytest

from dyncomp import pretrained
from dyncomp.cli.main import main

NEW = 12
SMALL, LARGE = "the small model", "the large model"
DRAFT, OWN = "the draft, and the model agreed", "the model"


@pytest.fixture(scope="module")
def folder(tiny_model):
    return str(tiny_model)


@pytest.fixture(scope="module")
def stranger(folder, tmp_path_factory):
    """The same model and as many tokens, of which two have changed places."""
    path = tmp_path_factory.mktemp("stranger")
    loaded = pretrained.load(folder)
    pretrained.export(path, loaded.model, loaded.variables["params"], loaded.tokenizer)
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return str(path)


@pytest.fixture(scope="module")
def said(folder):
    """``said(capsys, *words)``: what the command says as JSON."""

    def run(capsys, *words, prompts=("def f(",)):
        given = [word for prompt in prompts for word in ("--prompt", prompt)]
        assert main(["generate", folder, *given, "--max-new", str(NEW), "--json", *words]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize("draft", ["skip:2", "first:1", "FOLDER"])
def test_a_draft_changes_no_greedy_text(said, folder, capsys, draft):
    prompts = ("def f(", "a")
    plain = said(capsys, prompts=prompts)
    drafted = said(capsys, "--draft", draft.replace("FOLDER", folder), prompts=prompts)
    for ours, own in zip(drafted["generated"], plain["generated"], strict=True):
        assert ours["tokens"] == own["tokens"] and ours["text"] == own["text"]
        assert len(ours["by"]) == NEW and set(ours["by"]) <= {DRAFT, OWN} and ours["by"][0] == OWN
        if draft == "FOLDER":  # itself: all guesses are right
            assert DRAFT in ours["by"]
    assert drafted["gflops_generated"] > plain["gflops_generated"]  # drafts count


def test_a_stop_ends_the_text_in_the_middle_of_a_round(said, folder, capsys):
    (whole,) = said(capsys, "--draft", folder)["generated"]
    stop = whole["text"][5]
    (cut,) = said(capsys, "--draft", folder, "--stop", stop)["generated"]
    assert cut["text"] == whole["text"].split(stop)[0] and cut["reason"] == "stop"
    assert len(cut["tokens"]) == len(cut["by"]) <= 6


def test_who_writes_depends_on_the_threshold(said, folder, capsys):
    """Entropies lie between 0 and 8.02 bits; the large model begins, and nobody leaves before 10 tokens."""
    plain = said(capsys)["generated"][0]
    always = said(capsys, "--small", folder, "--threshold", "-1")["generated"][0]
    assert always["by"] == [LARGE] * NEW and always["tokens"] == plain["tokens"]
    (small,) = said(capsys, "--small", folder, "--threshold", "9")["generated"]
    assert small["by"] == [LARGE] * 10 + [SMALL] * 2 and small["tokens"] == plain["tokens"]
    several = said(capsys, "--small", folder, "--threshold", "9", prompts=("def f(", "a"))
    assert [one["by"] for one in several["generated"]] == [small["by"]] * 2


def test_colours_and_the_page_say_who_wrote(folder, tmp_path, capsys):
    page = tmp_path / "page.html"
    words = ["--small", folder, "--threshold", "9", "--colour", "--html", str(page)]
    assert main(["generate", folder, "--prompt", "def f(", "--max-new", str(NEW), *words]) == 0
    err = capsys.readouterr().err
    assert re.search(f"{SMALL} .*17.*{LARGE} .*83", err), err
    text = page.read_text()
    assert "written by" in text and SMALL in text and "threshold 9.0 bits" in text


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--draft", "skip:2", "--small", "FOLDER"], "--draft and --small each say how to write"),
        (["--draft", "skip:2", "--speedup", "2"], "--speedup and --draft each"),
        (["--draft", "skip:2", "--threshold", "1"], "a draft has none"),
        (["--draft", "skip:"], "such as skip:2"),
        (["--draft", "first:0"], "such as first:2"),
        (["--draft", "first:9"], "1 to 3"),
        (["--draft", "missing"], "missing"),
        (["--draft", "STRANGER"], "one tokenizer"),
        (["--small", "STRANGER"], "one tokenizer"),
    ],
)
def test_errors_are_one_line(folder, stranger, capsys, extra, message):
    places = {"FOLDER": folder, "STRANGER": stranger}
    words = [places.get(word, word) for word in extra]
    assert main(["generate", folder, "--prompt", "a", *words]) == 1
    told = capsys.readouterr().err.strip()
    assert message in told and len(told.splitlines()) == 1, told
