"""Random networks of segments, and what each example should do, walked one by one in numpy."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from dyncomp.core.ledger import Cost
from dyncomp.runtime import END, Segment, Segmented

WIDTH = 6


@dataclasses.dataclass
class Part:
    """What a random segment is made of."""

    weights: np.ndarray
    targets: tuple[str, ...]
    max_trips: int


def random_parts(rng, segments=4, loops=True):
    """Parts that lead forward to one to three others, one of them back where ``loops``; each is reached."""
    names = [f"s{n}" for n in range(segments)]
    parts = []
    for n in range(segments):
        later = [*names[n + 2 :], END]
        some = rng.choice(later, size=min(len(later), rng.integers(0, 3)), replace=False)
        targets = (names[n + 1] if n + 1 < segments else END, *(t for t in some))
        targets = tuple(dict.fromkeys(targets))
        weights = rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) * 0.7
        parts.append(Part(weights, targets, 0))
    if loops:
        back = rng.integers(2, segments)
        to = names[rng.integers(1, back + 1)]
        part = parts[back]
        parts[back] = Part(part.weights, (to, *part.targets), int(rng.integers(2, 5)))
    return parts


def network(parts):
    """The parts as segments: x = tanh(x w), and where to go follows from the first number of x."""

    def make(count):
        def run(weights, carry, threshold):
            x = jnp.tanh(jnp.dot(carry["x"], weights))
            score = x[:, 0]
            route = jnp.sum(score[:, None] > threshold + jnp.arange(count - 1) * 0.4, axis=1)
            return {"x": x, "seed": carry["seed"]}, x + carry["seed"][:, None], route, score

        return run

    segments = [
        Segment(make(len(p.targets)), p.weights, Cost(n + 1), f"s{n}", p.targets, p.max_trips)
        for n, p in enumerate(parts)
    ]
    begin = lambda _, inputs: {"x": inputs, "seed": inputs[:, 1]}
    return Segmented(begin, None, segments, [0.0] * len(parts))


def walk(parts, inputs):
    """(outputs, exits, visits, least distance of a score from a threshold) of one example after the other, float64."""
    outputs, exits = np.zeros(inputs.shape), np.zeros(len(inputs), int)
    visits, nearest = np.zeros((len(inputs), len(parts)), int), np.inf
    for b, row in enumerate(inputs.astype(np.float64)):
        x, name = row, "s0"
        while name != END:
            n = int(name[1:])
            part, ways = parts[n], len(parts[n].targets)
            x = np.tanh(x @ part.weights.astype(np.float64))
            visits[b, n] += 1
            bars = np.arange(ways - 1) * 0.4
            route = int((x[0] > bars).sum())
            nearest = min(nearest, np.abs(x[0] - bars).min(initial=np.inf))
            if part.max_trips and visits[b, n] >= part.max_trips:
                route = ways - 1
            name = part.targets[route]
        outputs[b], exits[b] = x + row[1], n
    return outputs, exits, visits, nearest
