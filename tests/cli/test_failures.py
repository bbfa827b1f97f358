"""Bad input: one line that names the fix, exit code 1, nothing that was saved is lost."""

import pytest
from terminal import ONE, cli, spawn

from dyncomp.core.workdir import steps_in
from dyncomp.training import integrity


def test_unknown_config(here):
    assert "did you mean quickstart?" in cli("run", "quickstrat").error
    assert "`dyncomp list`" in cli("config", "show", "nothing/like/this").error
    assert list(here.iterdir()) == []


def test_unknown_config_in_a_process(here):
    found = spawn("run", "quickstrat")
    assert found.error == "error: no config 'quickstrat': did you mean quickstart?"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tasks.TextFiles.path='{empty}'", "no text under"),
        ("tasks.TextFiles.path='{empty}/gone'", "check TextFiles.path"),
        ("tasks.TextFiles.context=40000", "lower context or add text"),
        ("top_p/routers.TopP.p=1.5", "need 0 <= p <= max_p <= 1"),
        ("top_p/experts.MoE.router=@routers.TopK", ""),
        ("training.Run.batch_size=0", "must be a positive multiple"),
        ("training.Run.stepz=3", "did you mean steps?"),
        ("STEPS=many", "text values need quotes"),
    ],
)
def test_wrong_values(config, here, override, message):
    empty = here / "empty"
    empty.mkdir()
    words = ("run", config, "--no-progress", f"--gin.{override.format(empty=empty)}")
    if override.endswith("TopK"):
        message, words = "TopK.k=9 with num_experts=4: use 1..4", (*words, "--gin.routers.TopK.k=9")
    assert message in cli(*words).error
    assert steps_in(here / "runs" / "tiny" / "top_p") == []


def test_a_later_run_of_a_suite_is_looked_at_before_the_first_trains(config, here):
    found = cli("run", config, "--no-progress", "--gin.dense/models.Block.mixer=@tasks.TextFiles")
    assert "dense: the parts do not fit together" in found.error
    assert not (here / "runs").exists()


def test_a_loss_that_is_no_number(config, tmp_path):
    words = ("run", config, "--workdir", tmp_path, ONE, "--no-progress")
    found = cli(*words, "--gin.training.AdamW.learning_rate=1e30")
    assert "lower the learning rate or set clip_norm" in found.error
    assert cli(*words, "--gin.STEPS=2").code == 0


def test_a_full_disk(config, tmp_path, monkeypatch):
    write = integrity.write_manifest

    def full(folder, leaves, extra):
        if extra["step"] > 2:
            raise OSError(28, "No space left on device")
        write(folder, leaves, extra)

    monkeypatch.setattr(integrity, "write_manifest", full)
    words = ("run", config, "--workdir", tmp_path, ONE, "--no-progress")
    assert "step 2 is safe; free space and run" in cli(*words).error
    assert steps_in(tmp_path) == [2]
    monkeypatch.setattr(integrity, "write_manifest", write)
    assert cli(*words).code == 0 and steps_in(tmp_path)[-1] == 4


def test_a_checkpoint_of_another_model(config, trained):
    workdir = trained[0] / "top_p"
    files = lambda: {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    before = files()
    found = cli("run", config, "--workdir", workdir, ONE, "--no-progress", "--gin.D_MODEL=16")
    *notes, last = found.err.splitlines()
    assert found.code == 1 and last.startswith("error: ") and "another" in last
    assert all(note.startswith("warning: ") for note in notes)
    assert files() == before  # the finished run keeps its config and summary too


def test_debug_shows_the_stack(here):
    with pytest.raises(Exception, match="no config"):
        cli("--debug", "run", "quickstrat")
