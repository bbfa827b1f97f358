"""The engine, end to end on a fake experiment in a git repository of its own."""

import json

import pytest

from dyncomp.cli.main import main
from dyncomp.core.errors import DyncompError
from dyncomp.core.lock import measuring
from dyncomp.evidence.page import write_page
from dyncomp.evidence.reproduce import reproduce


def test_end_to_end(repository):
    found = reproduce("fake", root=repository.root)
    folder = repository.folder
    assert json.loads((folder / "results.json").read_text()) == found
    assert repository.calls() == [["0", "1"], ["1", "1"], ["2", "1"]]  # one core each
    (claim,) = found["claims"]
    # b - a = -1 - 0.02 seed: mean -1.02, s = 0.02, half width 4.302653 * 0.02 / sqrt(3)
    assert claim["ours"]["mean"] == pytest.approx(-1.02)
    assert claim["ours"]["interval"] == pytest.approx([-1.069683, -0.970317], abs=1e-6)
    assert claim["holds"] is True
    assert found["runs"][2]["arms"]["b"] == {"trials": 2, "figures": {"loss": 2.06, "cost": 2.0}}
    assert found["environment"]["threads"] == 1 and len(found["environment"]["revision"]) == 40
    page = (folder / "README.md").read_text()
    assert "It decides nothing." in page and "figures/dots.svg" in page
    assert "a \\| loss" not in page.split("| arm")[1]
    assert "**Holds** (1 of 1)" in page and "1.01 ± 0.025" in page


def test_the_page_names_the_device(repository):
    found = reproduce("fake", root=repository.root)
    read = lambda: (repository.folder / "README.md").read_text()
    assert "reproduce fake --seeds 0,1,2\n" in read() and "one pinned thread" in read()
    for run in found["runs"]:
        assert (run.pop("device"), run.pop("platform")) == ("cpu", "cpu")
        run |= {"device": "A chip", "platform": "tpu"}
    write_page(repository.folder, found)
    assert "reproduce fake --seeds 0,1,2 --platform tpu\n" in read() and "on A chip:" in read()


def test_the_command_takes_the_seeds_of_the_experiment(repository, capsys):
    assert main(["reproduce", "fake", "--root", str(repository.root)]) == 0
    assert [seed for seed, _ in repository.calls()] == ["0", "1", "2"]


def test_figures_come_out_the_same_again(repository):
    reproduce("fake", root=repository.root)
    picture = repository.folder / "figures" / "dots.svg"
    first = picture.read_bytes()
    reproduce("fake", root=repository.root)
    assert picture.read_bytes() == first and len(repository.calls()) == 3


def test_a_failed_seed_keeps_the_finished_ones(repository):
    with pytest.raises(
        DyncompError, match="seed 13 of fake failed: RuntimeError: unlucky"
    ) as error:
        reproduce("fake", seeds=[0, 13], root=repository.root)
    assert "\n" not in str(error.value)
    assert not (repository.folder / "results.json").exists()
    found = reproduce("fake", seeds=[0, 1], root=repository.root)
    assert [seed for seed, _ in repository.calls()] == ["0", "13", "1"]
    assert found["claims"][0]["holds"] == "unresolved"  # two seeds of three
    assert "2 seeds ran, 3 are needed" in (repository.folder / "README.md").read_text()


def test_without_resume_every_seed_runs_again(repository):
    reproduce("fake", seeds=[0], root=repository.root)
    reproduce("fake", seeds=[0], root=repository.root, resume=False)
    assert len(repository.calls()) == 2


def test_claims_must_be_committed(repository):
    repository.claims.write_text(repository.claims.read_text().replace("0.0", "0.5"))
    with pytest.raises(DyncompError, match="not committed as it stands"):
        reproduce("fake", root=repository.root)
    assert repository.calls() == []


@pytest.mark.parametrize("name", ["claims", "experiment"])
def test_results_of_other_files_are_refused(repository, name):
    reproduce("fake", seeds=[0], root=repository.root)
    before = (repository.folder / "results.json").read_bytes()
    path = getattr(repository, name)
    path.write_text(path.read_text() + "\n# changed\n")
    repository.commit()
    with pytest.raises(DyncompError, match=f"made under another {path.name}"):
        reproduce("fake", root=repository.root)
    assert (repository.folder / "results.json").read_bytes() == before
    assert len(repository.calls()) == 1


def test_quick_writes_nothing_and_needs_no_commit(repository):
    repository.claims.write_text(repository.claims.read_text().replace("0.0", "0.5"))
    before = sorted(repository.root.rglob("*"))
    found = reproduce("fake", quick=True, root=repository.root)
    assert found["quick"] and found["claims"][0]["holds"] == "unresolved"
    assert [p for p in sorted(repository.root.rglob("*")) if "__pycache__" not in str(p)] == before
    assert repository.calls() == [["0q", "1"]] and not (repository.path / "runs").exists()


def test_it_takes_turns_with_benches(repository):
    with measuring("bench x"), pytest.raises(DyncompError, match="bench x"):
        reproduce("fake", root=repository.root)
    assert repository.calls() == []
    with measuring("bench x"):
        assert reproduce("fake", quick=True, root=repository.root)["quick"]


def test_unknown_arm_fails_before_anything_runs(repository):
    repository.claims.write_text(repository.claims.read_text().replace('"b"', '"zzz"'))
    repository.commit()
    with pytest.raises(DyncompError, match="names arm 'zzz'; there are a, b"):
        reproduce("fake", root=repository.root)
    assert repository.calls() == []


def test_unknown_slug(repository):
    with pytest.raises(DyncompError, match="nothing is missing"):
        reproduce("nothing", root=repository.root)
