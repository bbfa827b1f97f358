"""Which options an engine needs and takes, early and in one line; files written, commands run."""

import shutil
from pathlib import Path, PurePosixPath

import pytest
from jobs import POINTS

from dyncomp.core.errors import DyncompError
from dyncomp.launch import Machine, Storage, Submission, check, engine
from dyncomp.launch.engines import ENGINES, hand_over
from dyncomp.launch.job import name_of


def test_unknown_engine():
    with pytest.raises(DyncompError, match="no engine 'slrum': did you mean slurm?"):
        engine("slrum")
    with pytest.raises(DyncompError, match="choose out of slurm, submitit, jobset, xpk, sky"):
        engine("zzz")


@pytest.mark.parametrize(
    ("name", "machine", "given", "message"),
    [
        ("slurm", "cpu", {}, "engine slurm needs --partition"),
        ("jobset", "cpu", {"storage": 1}, "engine jobset needs --image"),
        ("xpk", "h100", {"image": "i", "storage": 1}, "engine xpk needs --cluster"),
        ("sky", "cpu", {}, "engine sky needs --storage"),
        ("slurm", "cpu", {"partition": "p", "image": "i"}, "--image is not for engine slurm but for jobset, xpk, sky"),
        ("jobset", "cpu", {"image": "i", "storage": 1, "at_once": 2}, "--jobs is not for engine jobset"),
        ("slurm", "v5e:4x4", {"partition": "p"}, "engine slurm has no v5e; it has cpu, gpu"),
        ("xpk", "cpu", {"cluster": "c", "image": "i", "storage": 1}, "engine xpk has no cpu"),
        ("sky", "tpu7x:2x2x1", {"storage": 1}, "engine sky has no tpu7x"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(name, machine, given, message):
    with pytest.raises(DyncompError, match=message):
        check(name, Machine.parse(machine), given)


def test_defaults_are_those_of_the_engine():
    assert check("slurm", Machine.parse("cpu"), {"partition": "p", "sbatch": {}}) == {
        "minutes": 1440,
        "partition": "p",
    }
    found = check("sky", Machine.parse("cpu"), {"storage": "s", "max_restarts": 0})
    assert found == {"max_restarts": 0, "storage": "s"}


@pytest.mark.parametrize("name", ENGINES)
def test_what_is_read_names_every_file_and_command(name, make):
    submission = engine(name).write(make(name, "h100:2x8", POINTS[1:]))
    text = submission.text()
    assert all(f"# {path}" in text for path in submission.files)
    assert text.count("\n$ ") + text.startswith("$ ") == len(submission.commands)


@pytest.mark.parametrize("text", ["data", ":/data", "x:data", "gs://bucket"])
def test_storage_that_is_none(text):
    with pytest.raises(DyncompError, match="write SOURCE:/PATH"):
        Storage.parse(text)


def test_a_source_may_hold_colons():
    assert Storage.parse("gs://b/x:/data") == Storage("gs://b/x", PurePosixPath("/data"))


def test_jobs_that_would_find_nothing_or_have_no_name(make):
    with pytest.raises(DyncompError, match="is not below /elsewhere"):
        make("jobset", storage="claim:/elsewhere")
    with pytest.raises(DyncompError, match="--minutes 4: use 5 or more"):
        make("slurm", minutes=4)
    with pytest.raises(DyncompError, match="--max-restarts -1"):
        make("sky", max_restarts=-1)


@pytest.mark.parametrize(
    ("text", "name"),
    [("tutel_paper", "tutel-paper"), ("9_Lives", "run-9-lives"), ("x" * 90, "x" * 35)],
)
def test_names(text, name):
    assert name_of(text) == name


def test_a_missing_tool_is_told_before_anything_is_written(make, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    path = tmp_path / "launch" / "x"
    with pytest.raises(DyncompError, match="sbatch is not here"):
        hand_over(make("slurm"), Submission({path: "text"}, [["sbatch", str(path)]]))
    assert not path.exists()


def test_files_are_written_and_commands_run(make, tmp_path):
    path = Path(tmp_path / "launch" / "x")
    hand_over(make("slurm"), Submission({path: "text"}, [["cp", str(path), str(tmp_path / "y")]]))
    assert (tmp_path / "y").read_text() == "text"
    with pytest.raises(DyncompError, match="ended with code 3"):
        hand_over(make("slurm"), Submission({}, [["sh", "-c", "exit 3"]]))
