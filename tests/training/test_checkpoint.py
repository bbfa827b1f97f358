"""Damaged, foreign and incomplete checkpoints."""

import json
import random
import shutil

import jax
import numpy as np
import pytest
from tiny import Net, make_run

from dyncomp.core.errors import DyncompError
from dyncomp.core.workdir import steps_in
from dyncomp.training import integrity
from dyncomp.training.checkpoint import Checkpointer, flat, read_newest
from dyncomp.training.engine import Engine
from dyncomp.training.loop import train
from dyncomp.training.restore import load

TRIALS = 120


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A finished run with two steps, and what both hold."""
    workdir = tmp_path_factory.mktemp("run")
    train(make_run(steps=4), workdir, progress=False, config_text="some = 'config'\n")
    assert steps_in(workdir) == [2, 4]
    checkpoints = Checkpointer(workdir)
    like = Engine(make_run(steps=4)).like
    states = {s: checkpoints._restore(checkpoints.root / str(s), like(s)) for s in (2, 4)}
    checkpoints.close()
    return workdir, states


def equal(a, b):
    left, right = flat(a), flat(b)
    return left.keys() == right.keys() and all(
        np.asarray(left[p]).tobytes() == np.asarray(right[p]).tobytes() for p in left
    )


def damage(rng, folder):
    """Flips a bit or cuts a file off, files drawn by their sizes; returns what it did."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    path = rng.choices(files, [p.stat().st_size for p in files])[0]
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data))
    if rng.random() < 0.5:
        data[place] ^= 1 << rng.randrange(8)
        what = f"bit flipped at {place}"
    else:
        del data[place:]
        what = f"cut to {place}"
    path.write_bytes(bytes(data))
    return path, what


def test_random_damage_never_gives_a_wrong_value(saved, tmp_path):
    workdir, states = saved
    rng, fallbacks, hit = random.Random(0), 0, set()
    work = tmp_path / "run"
    shutil.copytree(workdir, work)
    checkpoints = Checkpointer(work)
    like = Engine(make_run(steps=4)).like
    for trial in range(TRIALS):
        folder = work / "checkpoints" / "4"
        path, what = damage(rng, folder)
        said = []
        checkpoints.say = said.append
        state, extra = checkpoints.restore(like)
        step = int(state.step)
        label = f"trial {trial}: {path.relative_to(folder)} {what}"
        assert equal(state, states[step][0]) and extra == states[step][1], label
        # Every byte of every file is under a digest, so no damage at all goes unnoticed.
        assert step == 2 and len(said) == 1 and "\n" not in said[0], label
        name = path.relative_to(folder).as_posix()
        assert name in said[0] and "checkpoints/4" in said[0], (label, said)
        hit.add(name)
        fallbacks += 1
        path.write_bytes((workdir / path.relative_to(work)).read_bytes())
    checkpoints.say = pytest.fail
    state, _ = checkpoints.restore(like)
    assert int(state.step) == 4 and fallbacks == TRIALS and len(hit) > 5
    checkpoints.close()


def test_array_digests_catch_what_file_digests_cannot(saved):
    """Arrays that a library hands back wrong although its files are intact."""
    workdir, _ = saved
    manifest = integrity.read_manifest(workdir / "checkpoints" / "4")
    arrays = read_newest(workdir)
    integrity.verify_leaves(arrays, manifest)
    path = "params/hidden/kernel"
    flipped = arrays[path].copy()
    flipped.view(np.uint8)[0, 0] ^= 1
    with pytest.raises(integrity.DamageError, match=path):
        integrity.verify_leaves({**arrays, path: flipped}, manifest)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool", "complex128"])
def test_the_sum_of_an_array_does_not_depend_on_its_parts(dtype):
    drawn = np.random.default_rng(0).normal(size=(8, 4, 10)).round()
    whole = drawn.astype(jax.numpy.dtype(dtype))
    total = integrity.leaf_sum(whole)
    mesh = jax.make_mesh((2, 2), ("a", "b"))
    for spec in (("a",), (("a", "b"),), ("b", "a"), (None, "a", "b"), ()):
        where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        if dtype != "complex128":  # jax has 64 bits off
            assert integrity.leaf_sum(jax.device_put(whole, where)) == total, spec
    uneven = [(slice(0, 2), slice(1, 4)), (slice(0, 2), slice(0, 1)), (slice(2, 8), slice(0, 4))]
    place = lambda a, b: (a.start, b.start, 0)
    parts = [integrity.element_sum(whole[a, b], place(a, b), whole.shape) for a, b in uneven]
    assert sum(parts) % 2**64 == total
    for byte in range(0, whole.nbytes, 7):
        changed = whole.copy()
        changed.reshape(-1).view(np.uint8)[byte] ^= 1
        assert integrity.leaf_sum(changed) != total
    exchanged = whole.copy()
    exchanged[0], exchanged[7] = whole[7], whole[0]
    assert integrity.leaf_sum(exchanged) != total


def test_a_checkpoint_of_the_first_format_is_read(saved, tmp_path):
    work = tmp_path / "run"
    shutil.copytree(saved[0], work)
    path = work / "checkpoints" / "4" / integrity.MANIFEST
    body = json.loads(json.loads(path.read_text())["body"])
    leaves = {p: {**r, "digest": "0"} for p, r in body["leaves"].items()}
    text = json.dumps({**body, "format": 1, "leaves": leaves}, sort_keys=True)
    path.write_text(json.dumps({"digest": integrity.digest(text.encode()), "body": text}))
    assert int(read_newest(work)["step"]) == 4


def test_without_a_manifest_a_step_does_not_count(saved, tmp_path):
    work = tmp_path / "run"
    shutil.copytree(saved[0], work)
    (work / "checkpoints" / "4" / integrity.MANIFEST).unlink()
    assert steps_in(work) == [2]
    assert int(read_newest(work)["step"]) == 2


def test_when_nothing_good_is_left_it_says_so_and_deletes_nothing(saved, tmp_path):
    work = tmp_path / "run"
    shutil.copytree(saved[0], work)
    for step in (2, 4):
        (work / "checkpoints" / str(step) / integrity.MANIFEST).write_text("{}")
    (work / "summary.json").unlink()
    with pytest.raises(
        DyncompError, match="every checkpoint.*is damaged; restore a copy"
    ) as caught:
        train(make_run(steps=4), work, progress=False, config_text="some = 'config'\n")
    assert "\n" not in str(caught.value) and steps_in(work) == [2, 4]


def test_a_run_goes_on_from_the_step_before_the_damaged_one(saved, tmp_path, capsys):
    work = tmp_path / "run"
    shutil.copytree(saved[0], work)
    (work / "summary.json").unlink()
    (work / "checkpoints" / "4" / "loop.json").write_text("x")
    train(make_run(steps=4), work, progress=False, config_text="some = 'config'\n")
    assert "loop.json is damaged; trying the one before" in capsys.readouterr().err
    assert (work / "metrics.jsonl").read_bytes() == (saved[0] / "metrics.jsonl").read_bytes()
    a, b = read_newest(work), read_newest(saved[0])
    assert all(a[p].tobytes() == b[p].tobytes() for p in b)


def test_a_checkpoint_of_another_model_is_refused_by_name(saved, tmp_path):
    work = tmp_path / "run"
    shutil.copytree(saved[0], work)
    other = make_run(model=Net(hidden=9), steps=6)
    with pytest.raises(
        DyncompError, match=r"of another model: .*hidden/bias.*\(8,\).*\(9,\)"
    ) as caught:
        train(other, work, progress=False, config_text="some = 'config'\n")
    assert "\n" not in str(caught.value) and steps_in(work) == [2, 4]
    with pytest.raises(DyncompError, match="of another model: params/hidden/bias"):
        load(work, other)


def test_a_newer_format_is_refused(saved, tmp_path):
    work = tmp_path / "run"
    shutil.copytree(saved[0], work)
    path = work / "checkpoints" / "4" / integrity.MANIFEST
    body = json.loads(json.loads(path.read_text())["body"])
    text = json.dumps({**body, "format": 99}, sort_keys=True)
    path.write_text(json.dumps({"digest": integrity.digest(text.encode()), "body": text}))
    with pytest.raises(DyncompError, match="checkpoint format 99"):
        train(make_run(steps=6), work, progress=False)


def test_restores_onto_another_number_of_devices(tmp_path):
    from dyncomp.parallel import MeshSpec

    train(make_run(steps=4), tmp_path / "one", progress=False)
    shutil.copytree(tmp_path / "one", tmp_path / "four")
    assert jax.device_count() == 4
    train(make_run(steps=8, mesh=MeshSpec()), tmp_path / "four", progress=False)
    train(make_run(steps=8), tmp_path / "one", progress=False)
    a, b = read_newest(tmp_path / "one"), read_newest(tmp_path / "four")
    assert int(a["step"]) == int(b["step"]) == 8
    for path in a:
        np.testing.assert_allclose(a[path], b[path], rtol=1e-4, atol=1e-6, err_msg=path)


def test_loading_needs_a_run_or_a_loader(saved):
    loaded = load(saved[0], loader=lambda text: make_run(steps=4))
    assert loaded.config_text == "some = 'config'\n"
    with pytest.raises(DyncompError, match="needs the run, or a loader"):
        load(saved[0])
    with pytest.raises(DyncompError, match="no readable checkpoint"):
        load(saved[0].parent / "nothing", make_run())
