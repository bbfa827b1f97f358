"""Windows of text, tokenizers, metrics and hub access."""

import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.tasks import CodeLM, HubText, TextFiles, corpus
from dyncomp.tasks.base import SPLITS
from dyncomp.tasks.code_lm import windows
from dyncomp.tasks.tokens import BPETokenizer, ByteTokenizer


def all_rows(source):
    return source.batch(np.arange(len(source)))


def files(texts, **kwargs):
    return TextFiles(path=str(texts), **kwargs)


def test_windows_by_hand():
    columns = windows([("a", b"abcd"), ("b", b"efg")], ByteTokenizer(), 3)
    np.testing.assert_array_equal(columns["tokens"], [list(b"abcd"), list(b"defg")])
    assert len(windows([("a", b"abc")], ByteTokenizer(), 3)["tokens"]) == 0
    assert len(windows([], ByteTokenizer(), 3)["tokens"]) == 0


@pytest.mark.parametrize("options", [{}, {"tokenizer": "bpe", "vocab_size": 300}])
def test_windows_hold_the_documents_of_their_split(texts, options):
    task = files(texts, context=16, **options)
    parts = corpus.split_documents(task.documents())
    tokenizer = task.load_tokenizer()
    for split in SPLITS:
        rows = all_rows(task.source(split))
        assert rows["inputs"].dtype == rows["targets"].dtype == np.int32
        assert rows["mask"].dtype == rows["bytes"].dtype == np.float32
        assert rows["inputs"].shape[1:] == (16,)
        np.testing.assert_array_equal(rows["inputs"][:, 1:], rows["targets"][:, :-1])
        stream = b"".join(content for _, content in parts[split]).decode()
        covered = np.concatenate([rows["inputs"][0, :1], rows["targets"].ravel()])
        text = tokenizer.decode(covered)
        assert stream.startswith(text) and len(stream) - len(text) < 16 * 30
        first = len(tokenizer.decode(rows["inputs"][0, :1]))
        assert rows["bytes"].sum() == len(text.encode()) - first


def test_no_row_in_two_splits(texts):
    seen = {}
    for split in SPLITS:
        for row in all_rows(files(texts, context=32).source(split))["inputs"]:
            assert seen.setdefault(row.tobytes(), split) == split


def test_code_rows_do_not_leak():
    """Windows of code that occur in training letter by letter: boilerplate of a few lines, under half a percent."""
    task = CodeLM(context=64)
    rows = {s: all_rows(task.source(s))["inputs"].astype(np.uint8) for s in SPLITS}
    train = {row.tobytes() for row in rows["train"]}
    assert len(train) > 50_000
    for split in SPLITS[1:]:
        shared = sum(row.tobytes() in train for row in rows[split])
        assert shared < 0.005 * len(rows[split])


def test_same_text_same_rows_and_fingerprint(texts, tmp_path, monkeypatch):
    task = files(texts, context=16, tokenizer="bpe", vocab_size=280)
    first, mark = all_rows(task.source("train")), task.fingerprint()
    monkeypatch.setenv("DYNCOMP_CACHE", str(tmp_path / "other"))
    again = files(texts, context=16, tokenizer="bpe", vocab_size=280)
    for name, values in all_rows(again.source("train")).items():
        np.testing.assert_array_equal(values, first[name])
    assert again.fingerprint() == mark != files(texts, context=17).fingerprint()


def test_bpe_learns_from_training_text_only(tmp_path):
    """A pair that is frequent in held-out documents only is no token."""
    folder = tmp_path / "split"
    folder.mkdir()
    for number in range(60):
        name = f"{number}.txt"
        held_out = not corpus.split_documents([(name, b"")])["train"]
        word = "qzqz" if held_out else "abcd"
        (folder / name).write_text(f"{number} " + " ".join([word] * 100))
    tokenizer = TextFiles(
        path=str(folder), context=4, tokenizer="bpe", vocab_size=262
    ).load_tokenizer()
    tokens = lambda text: len(tokenizer.encode(text)[0])
    assert tokens(b"abcd") < 4 and tokens(b"qzqz") == 4


def test_bpe_covers_every_byte():
    content = "naïve – 漢字 = 'x'\n\t\x00".encode()
    model = BPETokenizer.train([content, b"x = x + 1"], 280)
    tokens, widths = model.encode(content)
    assert widths.sum() == len(content)
    assert b"".join(model.pieces(tokens)) == content
    assert [len(piece) for piece in model.pieces(tokens)] == list(widths)
    every = bytes(range(256)).decode("latin-1").encode()
    assert b"".join(model.pieces(model.encode(every)[0])) == every


def test_bits_per_byte_closed_form():
    """Two tokens of 3 and 5 bytes at probabilities 1/2 and 1/8: 1 + 3 bits over 8 bytes; a masked one adds nothing."""
    half, eighth = np.log([1 / 2, 1 / 4, 1 / 4]), np.log([1 / 8, 7 / 16, 7 / 16])
    output = jnp.asarray([[half, eighth, eighth]], jnp.float32)
    batch = {
        "targets": np.asarray([[0, 0, 1]], np.int32),
        "bytes": np.asarray([[3, 5, 9]], np.float32),
        "mask": np.asarray([[1, 1, 0]], np.float32),
    }
    task = CodeLM()
    metrics = task.metrics(output, batch)
    assert metrics["bits_per_byte"].value() == pytest.approx(4 / 8, rel=1e-6)
    assert metrics["nll"].value() == pytest.approx(np.log(16) / 2, rel=1e-6)
    assert metrics["accuracy"].value() == pytest.approx(1 / 2)
    merged = metrics["bits_per_byte"].merge(
        task.metrics(output[:, :1], {k: v[:, :1] for k, v in batch.items()})["bits_per_byte"]
    )
    assert merged.value() == pytest.approx(5 / 11, rel=1e-6)
    assert task.headline == "bits_per_byte" and task.minimize


def test_bad_options_are_one_line_errors(texts):
    """In a fresh interpreter: under test, the run-time type checks would speak first."""
    cases = {
        "CodeLM(tokenizer='words')": "use 'bytes' or 'bpe'",
        "CodeLM(vocab_size=300)": "tokenizer='bpe'",
        "CodeLM(tokenizer='bpe', vocab_size=70000)": "at most 65536",
        "CodeLM(context=0)": "context=0",
        "files.source('dev')": "unknown split 'dev': use one of train, validation",
        "LMObjective(aux_reduce='max')": "use 'mean' or 'sum'",
        "ClassificationObjective(label_smoothing=1.0)": "use [0, 1)",
        "ClassificationObjective(answer='last')": "use 'emitted' or 'final'",
        "FeatureTask(arrays={'dev': {}})": "unknown split 'dev'",
    }
    code = (
        "from dyncomp.core.errors import DyncompError\nfrom dyncomp.tasks import *\n"
        f"files = TextFiles(path={str(texts)!r})\n"
        f"for case in {list(cases)!r}:\n"
        "    try:\n        eval(case)\n    except DyncompError as error:\n        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    assert len(lines) == len(cases), done.stdout + done.stderr
    for line, message in zip(lines, cases.values(), strict=True):
        assert message in line


def test_bad_requests(texts):
    with pytest.raises(DyncompError, match="'test' has no window of 100001 tokens"):
        files(texts, context=100_000).source("test")
    with pytest.raises(DyncompError, match="more than 256"):
        files(texts, tokenizer="bpe").source("train")


def test_text_options_may_be_lists(texts):
    task = files(texts, context=16, suffixes=[".txt"])
    assert (
        len(task.source("train"))
        > len(files(texts, context=16, max_bytes=20_000).source("train"))
        > 0
    )


def test_hub_text_reads_local_files(tmp_path, texts):
    """json, parquet and text through the same call as a hub name."""
    import pandas as pd

    rows = [{"body": path.read_text()} for path in sorted(texts.iterdir())]
    (tmp_path / "rows.json").write_text("\n".join(json.dumps(row) for row in rows))
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    made = [
        HubText(name=kind, column="body", data_files=[str(tmp_path / f"rows.{kind}")], context=16)
        for kind in ("json", "parquet")
    ]
    assert made[0].fingerprint() == made[1].fingerprint()
    expected = [row["body"].encode() for row in rows]
    assert [content for _, content in made[0].documents()] == expected
    short = HubText(name="json", column="body", data_files=made[0].data_files, max_documents=7)
    assert [content for _, content in short.documents()] == expected[:7]
    with pytest.raises(DyncompError, match="no column 'text'; it has"):
        HubText(name="json", data_files=made[0].data_files).documents()


def test_hub_offline_is_one_line_and_names_the_way_out(tmp_path):
    code = (
        "from dyncomp.tasks import HubText, HubImages\n"
        "from dyncomp.core.errors import DyncompError\n"
        "for task in (HubText(name='nobody/nothing'), HubImages(name='nobody/nothing')):\n"
        "    try:\n        task.source('train')\n"
        "    except DyncompError as error:\n        print(error)\n"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 2, done.stderr
    assert all("'nobody/nothing'" in line and "data_files" in line for line in lines)


def test_hub_text_needs_a_name():
    with pytest.raises(DyncompError, match="no data set name"):
        HubText().source("train")
