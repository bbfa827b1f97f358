"""Shipped configs are accepted and built; two hundred damaged ones are not."""

import shutil

import pytest
from mutate import KINDS, Mutator, closure

from dyncomp import config
from dyncomp.config import source
from dyncomp.training import Run, Suite

COUNT = 200


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the shipped configs."""
    folder = tmp_path_factory.mktemp("tree") / "configs"
    shutil.copytree(config.shipped(), folder)
    return folder


def refused(mutation, tree, folder, monkeypatch):
    """Whether `dyncomp config check` of the whole tree with one file changed finds a problem.

    A file that is included may hold what one of the configs above it does not use, so another one has to notice.
    """
    shutil.copytree(tree, folder)
    (folder / mutation.file).write_text(mutation.text)
    for name, text in mutation.extra:
        (folder / name).write_text(text)
    monkeypatch.setattr(source, "shipped", lambda: folder)
    others = sorted(path.name for path in tree.glob("*.gin") if path.name != mutation.top)
    reach = [top for top in others if mutation.file in closure(tree, top)]
    return any(config.check(folder / top) for top in [mutation.top, *reach])


@pytest.mark.parametrize("kind", KINDS)
def test_no_damaged_config_is_accepted(tree, tmp_path, monkeypatch, kind):
    mutator = Mutator(tree, seed=KINDS.index(kind))
    drawn = [mutator.draw(kind) for _ in range(COUNT // len(KINDS))]
    accepted = [
        str(mutation)
        for number, mutation in enumerate(drawn)
        if not refused(mutation, tree, tmp_path / str(number), monkeypatch)
    ]
    assert not accepted, "\n\n".join(["accepted:", *accepted])
    assert len({(m.top, m.text) for m in drawn}) > len(drawn) // 3


def test_a_tree_that_only_changed_its_comments_is_accepted(tree, tmp_path, monkeypatch):
    """So that the refusals above are of the damage and not of the copy."""
    folder = tmp_path / "copy"
    shutil.copytree(tree, folder)
    for path in folder.rglob("*.gin"):
        path.write_text(f"# A comment.\n{path.read_text()}\n# Another.\n")
    monkeypatch.setattr(source, "shipped", lambda: folder)
    some = (
        "jei_dnn",
        "tutel",
        "minference_paper",
    )  # others take long, and what they include is shared
    assert {slug: config.check(folder / f"{slug}.gin") for slug in some} == dict.fromkeys(some, [])


@pytest.mark.parametrize("slug", config.slugs())
def test_every_shipped_config_is_sound_and_builds(slug):
    assert config.check(slug) == []
    built = config.load(slug)
    assert isinstance(built, Run | Suite)
    runs = built.runs.values() if isinstance(built, Suite) else [built]
    assert all(run.total_steps > 0 for run in runs)
    saved = config.operative(slug)
    assert config.operative(saved) == saved  # loads it too
