"""A small world to act in: a gripper in the plane, coloured blocks and zones, and a sentence that says what to do.

Everything is a pure function of one world's state (`jax.vmap` over many). The sentence names the block by its colour
or by the lamp, the bar along the upper edge that shows a block's colour, and the zone by its colour or as the block's
home, whose colour is the dot on the block: what is told by the picture takes more looking than what is named.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Float, Int, Key

COLOURS = np.asarray(
    [[1.0, 0.15, 0.15], [0.1, 0.9, 0.2], [0.25, 0.35, 1.0], [1.0, 0.9, 0.1]], np.float32
)
NAMES = ("red", "green", "blue", "yellow")
PUT, ON, THE, LAMP, HOME, BLOCK, ZONE = 0, 1, 2, 3, 4, 5, 9
"""Word numbers; the block and the zone of colour k are BLOCK + k and ZONE + k."""
WORDS, LENGTH = 13, 6
PADDING = -1
CELLS = 7
GRIPPER = {False: (1.0, 1.0, 1.0), True: (1.0, 0.3, 1.0)}


@struct.dataclass
class World:
    """One world; positions are (right, down) in 0..1.

    Attributes:
      gripper: float32 [2].
      closed: bool.
      held: int32, the block in the gripper, or -1.
      blocks, zones: float32 [n 2].
      block_colours, zone_colours: int32 [n].
      homes: int32 [n], the zone of each block's dot.
      lamp: int32, a block's colour.
      goal: int32 [2], block and zone.
      words: int32 [6], `PADDING` behind the sentence.
      done: bool, the block lies in its zone; nothing happens any more.
    """

    gripper: Any  # unchecked: numpy once fetched
    closed: Any
    held: Any
    blocks: Any
    zones: Any
    block_colours: Any
    zone_colours: Any
    homes: Any
    lamp: Any
    goal: Any
    words: Any
    done: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class PickPlace:
    """The rules.

    An action is float32 [3]: a velocity (norm at most 1) and the gripper, closed where it is positive. An observation
    is float32 [m]: the pixels of the whole table, those of a window around the gripper, and the word numbers.

    Attributes:
      things: how many blocks, and how many zones (2 to 4).
      side, window: pixels of the two pictures' sides; both show 28 pixels to the length of the table.
      speed: way of a step at full velocity.
      reach: from where a closing gripper takes a block.
      near: from where a block that is let go counts as in its zone.
      direct: probability that a block or a zone is named by its colour.
    """

    things: int = 3
    side: int = 28
    window: int = 12
    speed: float = 0.12
    reach: float = 0.05
    near: float = 0.07
    direct: float = 0.5

    def __post_init__(self):
        if not 2 <= self.things <= len(COLOURS) or not 0 <= self.direct <= 1:
            raise DyncompError(
                f"PickPlace: things={self.things}, direct={self.direct}; use 2 to {len(COLOURS)} and 0 to 1"
            )

    @property
    def cameras(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each picture."""
        return (self.side, self.side), (self.window, self.window)

    @property
    def size(self) -> int:
        """m, numbers of an observation."""
        return 3 * (self.side**2 + self.window**2) + LENGTH

    def reset(self, key: Key[Array, ""]) -> World:
        """A new world: things on distinct cells of a 7 x 7 grid (the lamp has the upper row), and what to do."""
        place, shift, grip, colours, picks, says = jax.random.split(key, 6)
        n = self.things
        cell = jax.random.permutation(place, CELLS * (CELLS - 1))[: 2 * n]
        centre = jnp.stack([cell % CELLS + 0.5, cell // CELLS + 1.5], axis=1) / CELLS
        spots = centre + jax.random.uniform(shift, (2 * n, 2), minval=-0.02, maxval=0.02)
        shades = jax.vmap(lambda k: jax.random.permutation(k, len(COLOURS))[:n])(
            jax.random.split(colours)
        )
        block, zone, lit, *homes = jax.random.randint(picks, (3 + n,), 0, n)
        homes = jnp.stack(homes)
        by_lamp, by_home = ~jax.random.bernoulli(says, self.direct, (2,))
        zone = jnp.where(by_home, homes[block], zone)
        lamp = shades[0][jnp.where(by_lamp, block, lit)]
        first = jnp.where(by_lamp, LAMP, BLOCK + shades[0][block])
        second = jnp.where(by_home, HOME, ZONE + shades[1][zone])
        low = jnp.asarray([0.1, 0.25], jnp.float32)
        return World(
            gripper=jax.random.uniform(grip, (2,), minval=low, maxval=0.9),
            closed=jnp.asarray(False),
            held=jnp.int32(-1),
            blocks=spots[:n],
            zones=spots[n:],
            block_colours=shades[0],
            zone_colours=shades[1],
            homes=homes,
            lamp=lamp,
            goal=jnp.stack([block, zone]),
            words=_sentence(jax.random.fold_in(says, 1), first, second),
            done=jnp.asarray(False),
        )

    def step(self, world: World, action: Float[Array, "3"]) -> World:
        """Moves, then opens or closes; a gripper takes a block only while it closes."""
        way = action[:2] / jnp.maximum(1.0, jnp.linalg.norm(action[:2]))
        gripper = jnp.clip(world.gripper + self.speed * way, 0.0, 1.0)
        close = action[2] > 0
        far = jnp.linalg.norm(world.blocks - gripper, axis=1)
        nearest = jnp.argmin(far).astype(jnp.int32)
        taken = jnp.where(~world.closed & (jnp.min(far) <= self.reach), nearest, -1)
        held = jnp.where(close, jnp.where(world.held >= 0, world.held, taken), -1)
        # What is let go falls where the gripper is.
        moved = jnp.arange(self.things) == jnp.where(world.held >= 0, world.held, held)
        blocks = jnp.where(moved[:, None], gripper, world.blocks)
        block, zone = world.goal
        lies = jnp.linalg.norm(blocks[block] - world.zones[zone]) <= self.near
        new = dataclasses.replace(
            world,
            gripper=gripper,
            closed=close,
            held=held,
            blocks=blocks,
            done=lies & (held != block),
        )
        return jax.tree.map(lambda old, now: jnp.where(world.done, old, now), world, new)

    def expert(self, world: World) -> Float[Array, "3"]:
        """Straight to the block, take it, straight to the zone, let go; opens first after a mistake."""
        block, zone = world.goal
        carries = world.held == block
        way = jnp.where(carries, world.zones[zone], world.blocks[block]) - world.gripper
        there = jnp.linalg.norm(way) <= 0.6 * self.reach
        way = way / self.speed
        way = way / jnp.maximum(1.0, jnp.linalg.norm(way))
        close = jnp.where(carries, ~there, there & ~world.closed)
        return jnp.append(way, jnp.where(close, 1.0, -1.0)).astype(jnp.float32)

    def observe(self, world: World) -> Float[Array, "m"]:
        """What the policy gets."""
        table = self.draw(world, jnp.full((2,), 0.5, jnp.float32), self.side)
        close = self.draw(world, world.gripper, self.window)
        pixels = jnp.concatenate([table.reshape(-1), close.reshape(-1)])
        return jnp.concatenate([pixels, world.words.astype(jnp.float32)])

    def draw(self, world: World, centre: Float[Array, "2"], side: int) -> Float[Array, "h w 3"]:
        """A picture of side x side pixels around ``centre``, in 0..1, edges smoothed over a pixel."""
        steps = (jnp.arange(side, dtype=jnp.float32) - (side - 1) / 2) / 28.0
        x, y = centre[0] + steps[None, :], centre[1] + steps[:, None]

        def square(at: Array, half: float) -> Array:
            edge = lambda way: jnp.clip(0.5 + 28.0 * (half - jnp.abs(way)), 0.0, 1.0)
            return edge(x - at[0]) * edge(y - at[1])

        def paint(picture: Array, cover: Array, colour: Any) -> Array:
            return picture + cover[..., None] * (jnp.asarray(colour, jnp.float32) - picture)

        shades = jnp.asarray(COLOURS)
        bar = (jnp.broadcast_to(y, (side, side)) < 0.9 / CELLS).astype(jnp.float32)
        picture = paint(jnp.zeros((side, side, 3), jnp.float32), bar, shades[world.lamp])
        for n in range(self.things):
            frame = square(world.zones[n], 0.07) - square(world.zones[n], 0.042)
            picture = paint(picture, frame, shades[world.zone_colours[n]])
        for n in range(self.things):
            picture = paint(picture, square(world.blocks[n], 0.06), shades[world.block_colours[n]])
            dot = shades[world.zone_colours[world.homes[n]]]
            picture = paint(picture, square(world.blocks[n], 0.028), dot)
        frame = square(world.gripper, 0.085) - square(world.gripper, 0.062)
        hue = jnp.where(world.closed, *(jnp.asarray(GRIPPER[is_]) for is_ in (True, False)))
        return paint(picture, frame, hue)


def _sentence(key: Array, block: Array, zone: Array) -> Int[Array, "l"]:
    """PUT (THE) block ON (THE) zone, each article there half of the time."""
    first, second = jax.random.bernoulli(key, 0.5, (2,))
    words = jnp.stack([jnp.int32(w) for w in (PUT, THE, block, ON, THE, zone)])
    there = jnp.stack([jnp.asarray(w) for w in (True, first, True, True, second, True)])
    order = jnp.argsort(~there, stable=True)
    return jnp.where(there[order], words[order], PADDING)


def sentence(words: Any) -> str:
    """The words as text."""
    names = ["put", "on", "the", "lamp's block", "its home"]
    names += [f"{name} block" for name in NAMES] + [f"{name} zone" for name in NAMES]
    return " ".join(names[int(word)] for word in words if word >= 0)


@struct.dataclass
class Rollout:
    """What happened, with a leading axis of steps.

    Attributes:
      worlds: before each step.
      alive: bool [t b], whether the episode was still going on.
      actions: float32 [t b 3], as executed.
      told: what the policy told beside its action.
      success: bool [b], at the end.
    """

    worlds: World
    alive: Any  # unchecked: numpy once fetched
    actions: Any
    told: Any
    success: Any


def rollout(
    env: PickPlace,
    worlds: World,
    policy: Callable[[Any, World, Int[Array, ""]], tuple[Any, Array, Any]],
    carry: Any,
    steps: int,
) -> Rollout:
    """Many episodes at once, one scan; those that have ended stand still and are masked.

    Args:
      env: the rules.
      worlds: [b ...], where episodes start.
      policy: (carry, worlds, step) -> (carry, actions [b 3], told).
      carry: what the policy remembers.
      steps: after which everyone stops.
    """

    def body(state: tuple[World, Any], t: Array) -> tuple[Any, Any]:
        worlds, carry = state
        carry, actions, told = policy(carry, worlds, t)
        return (jax.vmap(env.step)(worlds, actions), carry), (worlds, ~worlds.done, actions, told)

    (worlds, _), seen = lax.scan(body, (worlds, carry), jnp.arange(steps))
    return Rollout(*seen, success=worlds.done)
