"""The cache of prepared data: damage, races, unwritable folders."""

import multiprocessing
import os

import numpy as np
import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.tasks import TextFiles, code_lm
from dyncomp.tasks.cache import cached_folder, intact


def build_slowly(folder):
    import time

    (folder / "value").write_text("good")
    time.sleep(0.2)
    with open(os.environ["BUILDS"], "a") as log:
        log.write("built\n")


def take(_):
    return (cached_folder("shared", build_slowly) / "value").read_text()


def test_processes_that_ask_at_once_build_once(tmp_path, monkeypatch):
    monkeypatch.setenv("BUILDS", str(tmp_path / "builds"))
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert pool.map(take, range(6), chunksize=1) == ["good"] * 6
    assert (tmp_path / "builds").read_text() == "built\n"


def damage_flip(file):
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 4
    file.write_bytes(raw)


def damage_cut(file):
    file.write_bytes(file.read_bytes()[:-50])


@pytest.mark.parametrize("damage", [damage_flip, damage_cut, os.remove])
def test_damaged_tables_are_built_again(texts, damage):
    task = TextFiles(path=str(texts), context=16)
    before = task.source("train").batch(np.arange(20))
    folder = code_lm._prepared(task, code_lm.cache_root())
    damage(next((folder / "train").glob("*.arrow")))
    assert not intact(folder)
    code_lm._prepared.cache_clear()  # as in a new process
    after = task.source("train").batch(np.arange(20))
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values)
    assert intact(folder)


def test_failed_build_leaves_nothing(cache):
    def fail(folder):
        (folder / "half").write_text("x")
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        cached_folder("bad", fail)
    assert not (cache / "data" / "bad").exists()
    assert [p.name for p in (cache / "data").iterdir()] == [".bad.lock"]


def test_unwritable_cache_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DYNCOMP_CACHE", str(tmp_path / "file"))
    with pytest.raises(DyncompError, match="set DYNCOMP_CACHE") as error:
        cached_folder("x", lambda folder: None)
    assert "\n" not in str(error.value)
