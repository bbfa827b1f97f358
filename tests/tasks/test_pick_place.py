"""The small world: physics by hand, experts that succeed, pictures, windows and files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.tasks import PickPlace, PickPlaceDemonstrations, RecordedEpisodes, rollout
from dyncomp.tasks.demonstrations import WindowSource
from dyncomp.tasks.pick_place import BLOCK, COLOURS, HOME, LAMP, ON, PUT, THE, ZONE, sentence

ENV = PickPlace()
TASK = PickPlaceDemonstrations(episodes=6, held_out=6, steps=16)


@pytest.fixture(scope="module")
def worlds():
    return jax.device_get(TASK.worlds("test", 40))


@pytest.fixture(scope="module")
def step():
    return jax.jit(ENV.step)


def one(worlds, n=0, **changes):
    world = jax.tree.map(lambda leaf: jnp.asarray(leaf[n]), worlds)
    return world.replace(**{k: jnp.asarray(v, world.__dict__[k].dtype) for k, v in changes.items()})


def act(x, y, close):
    return jnp.float32([x, y, 1.0 if close else -1.0])


def test_the_sentence_says_the_goal(worlds):
    kinds = set()
    for n in range(40):
        words = worlds.words[n]
        said = words[words >= 0]
        assert 4 <= len(said) <= 6 and said[0] == PUT and (words[len(said) :] == -1).all()
        named = [w for w in said if w not in (PUT, ON, THE)]
        block, zone = worlds.goal[n]
        colour = worlds.block_colours[n][block]
        assert named[0] in (LAMP, BLOCK + colour)
        if named[0] == LAMP:
            assert worlds.lamp[n] == colour
        assert named[1] in (HOME, ZONE + worlds.zone_colours[n][zone])
        if named[1] == HOME:
            assert worlds.homes[n][block] == zone
        kinds.add((int(named[0] == LAMP), int(named[1] == HOME)))
        spots = np.concatenate([worlds.blocks[n], worlds.zones[n]])
        gaps = np.linalg.norm(spots[:, None] - spots[None], axis=-1) + np.eye(6)
        assert gaps.min() > 1 / 7 - 0.06 and len(set(worlds.block_colours[n])) == 3
    assert len(kinds) == 4
    assert sentence([PUT, LAMP, ON, THE, ZONE + 2, -1]) == "put lamp's block on the blue zone"


def test_physics(worlds, step):
    world = one(worlds, gripper=[0.5, 0.5], blocks=[[0.5, 0.62], [0.1, 0.9], [0.9, 0.9]],
                zones=[[0.8, 0.62], [0.1, 0.3], [0.9, 0.3]], goal=[0, 0])  # fmt: skip
    moved = step(world, act(0.5, 0.0, False))
    np.testing.assert_allclose(moved.gripper, [0.56, 0.5], atol=1e-6)
    fast = step(world, act(3.0, 4.0, False))  # a velocity of norm 5 is cut to 1
    np.testing.assert_allclose(fast.gripper - world.gripper, [0.072, 0.096], atol=1e-6)
    taken = step(world, act(0.0, 1.0, True))  # there and closing in one step
    assert int(taken.held) == 0
    far = step(world, act(1.0, 0.0, True))
    assert int(far.held) == -1 and bool(far.closed)
    late = step(far.replace(gripper=jnp.float32([0.5, 0.62])), act(0.0, 0.0, True))
    assert int(late.held) == -1  # already closed: it takes nothing
    carried = step(taken, act(1.0, 0.0, True))
    np.testing.assert_allclose(carried.blocks[0], carried.gripper)
    over = one(worlds).replace(**{**taken.__dict__, "gripper": jnp.float32([0.8, 0.62])})
    done = step(over, act(0.0, 0.0, False))
    assert bool(done.done) and int(done.held) == -1
    np.testing.assert_allclose(done.blocks[0], [0.8, 0.62], atol=1e-6)
    still = step(done, act(1.0, 1.0, True))
    assert all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(done), jax.tree.leaves(still), strict=True)
    )


def test_the_expert_always_succeeds_and_ended_episodes_are_masked(worlds):
    expert = lambda carry, worlds, t: (carry, jax.vmap(ENV.expert)(worlds), t)
    found = jax.device_get(jax.jit(lambda w: rollout(ENV, w, expert, None, 32))(worlds))
    assert found.success.all() and (found.alive[0] & ~found.alive[-1]).all()
    assert (np.diff(found.alive.astype(int), axis=0) <= 0).all()
    # Both ways at full speed, a step to take the block and one to let go, at least.
    block = np.take_along_axis(worlds.blocks, worlds.goal[:, :1, None].repeat(2, 2), 1)[:, 0]
    zone = np.take_along_axis(worlds.zones, worlds.goal[:, 1:, None].repeat(2, 2), 1)[:, 0]
    way = np.linalg.norm(block - worlds.gripper, axis=1), np.linalg.norm(zone - block, axis=1)
    least = sum(np.ceil((w - 0.031) / ENV.speed).clip(0) for w in way) + 2
    assert (found.alive.sum(0) >= least - 2).all() and (found.alive.sum(0) <= least + 2).all()


def test_a_picture_shows_things_where_they_are(worlds):
    world = one(worlds, gripper=[0.9, 0.9], blocks=[[0.25, 0.5], [0.5, 0.75], [0.75, 0.5]],
                zones=[[0.1, 0.9], [0.1, 0.3], [0.9, 0.3]])  # fmt: skip
    table, close = jax.jit(
        lambda w: (ENV.draw(w, jnp.full((2,), 0.5), 28), ENV.draw(w, w.gripper, 12))
    )(world)
    assert table.shape == (28, 28, 3) and close.shape == (12, 12, 3)
    np.testing.assert_allclose(table[1, 14], COLOURS[int(world.lamp)], atol=1e-6)
    # The block's middle lies at pixel 6.5, 13.5 (column, row); half of it is 1.68 pixels, of its dot 0.784. So the
    # pixel 1.5 to the left is covered to 0.5 + 1.68 - 1.5, and one next to the middle has 0.784 x 0.784 of the dot.
    block = COLOURS[int(world.block_colours[0])]
    dot = COLOURS[int(world.zone_colours[world.homes[0]])]
    np.testing.assert_allclose(table[14, 5], 0.68 * block, atol=1e-4)
    share = 0.784**2
    np.testing.assert_allclose(table[13, 6], share * dot + (1 - share) * block, atol=1e-4)
    # The gripper's frame, 1.74 to 2.38 pixels from its middle (5.5, 5.5 in the close-up), and nothing inside.
    np.testing.assert_allclose(close[5, 5], 0, atol=1e-6)
    inner, outer = 0.5 + 1.736 - 1.5, 0.5 + 2.38 - 1.5
    assert outer > 1
    np.testing.assert_allclose(close[5, 4], np.full(3, 1 - inner), atol=1e-3)
    observed = jax.jit(ENV.observe)(world)
    assert observed.shape == (ENV.size,) == (3 * (28**2 + 12**2) + 6,)
    np.testing.assert_array_equal(observed[-6:], world.words)


def test_windows_and_their_masks():
    source = WindowSource.of(np.arange(5.0)[:, None], np.arange(5.0)[:, None], [2, 3], 3)
    batch = source.batch(np.asarray([0, 1, 2]))
    assert len(source) == 5
    assert batch["inputs"][..., 0].tolist() == [[0, 1, 1], [1, 1, 1], [2, 3, 4]]
    assert batch["mask"].tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]


def test_demonstrations_are_what_the_expert_says():
    source = TASK.source("train")
    spec, batch = TASK.spec(), source.batch(np.arange(4))
    assert {k: v.shape[1:] for k, v in batch.items()} == {k: v.shape for k, v in spec.items()}
    assert np.isin(source.actions[:, 2], (-1, 1)).all()
    assert np.linalg.norm(source.actions[:, :2], axis=1).max() <= 1 + 1e-5
    lengths = np.unique(np.repeat(source.ends[:, None], 1, 1), return_counts=True)[1]
    assert lengths.sum() == len(source) and len(lengths) == 6
    again = dataclasses.replace(TASK, held_out=7).worlds("test", 3)
    np.testing.assert_array_equal(again.blocks, TASK.worlds("test", 3).blocks)
    assert not np.array_equal(again.blocks, TASK.worlds("validation", 3).blocks)


def test_recorded_episodes(tmp_path):
    task = RecordedEpisodes(path=str(tmp_path), cameras=((4, 4), (2, 2)), words=3, window=2)
    with pytest.raises(DyncompError, match="no .npz files"):
        task.source("train")
    (tmp_path / "train").mkdir()
    arrays = {
        "camera_0": np.full((3, 4, 4, 3), 255, np.uint8), "camera_1": np.zeros((3, 2, 2, 3), np.uint8),
        "words": np.int32([7, 1]), "actions": np.ones((3, 7)),
    }  # fmt: skip
    np.savez(tmp_path / "train" / "a.npz", **arrays)
    batch = task.source("train").batch(np.asarray([0, 2]))
    assert {k: v.shape[1:] for k, v in batch.items()} == {
        k: v.shape for k, v in task.spec().items()
    }
    assert batch["inputs"][0, 0].tolist() == [1.0] * 48 + [0.0] * 12 + [7.0, 1.0, -1.0]
    assert batch["mask"].tolist() == [[1, 1], [1, 0]]
    np.savez(tmp_path / "train" / "b.npz", **{**arrays, "words": np.arange(4)})
    with pytest.raises(DyncompError, match="at most 3 words"):
        task.source("train")
