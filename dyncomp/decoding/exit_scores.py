"""How good exits are on a text, and what a threshold on their confidence would save there."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp.core.typing import Array, Float, Int
from dyncomp.decoding.exit_maps import ExitMaps
from dyncomp.decoding.exit_training import ExitStates
from dyncomp.decoding.net import Net
from dyncomp.decoding.rules import mapped


class Leaving(NamedTuple):
    """What a threshold does.

    Attributes:
      blocks: mean blocks before the token is said.
      heads: mean heads read for it.
      agreement: share of tokens that full depth would have said too.
      shares: [y+1], share of the tokens said at each exit and at full depth.
    """

    blocks: float
    heads: float
    agreement: float
    shares: Float[np.ndarray, "y1"]


@dataclasses.dataclass(frozen=True)
class ExitScores:
    """What exits and full depth (last) say at n positions of a text; on the host.

    Attributes:
      depths: [y+1] blocks that have run.
      nats: float32 [y+1 n], of the text's next token.
      best: int32 [y+1 n], the likeliest token.
      confidence: float32 [y+1 n], its probability.
    """

    depths: tuple[int, ...]
    nats: Float[np.ndarray, "y1 n"]
    best: Int[np.ndarray, "y1 n"]
    confidence: Float[np.ndarray, "y1 n"]

    def agreement(self) -> Float[np.ndarray, "y1"]:
        """Share of positions where the likeliest token is full depth's."""
        return np.mean(self.best == self.best[-1], axis=1)

    def leaving(self, threshold: float, exits: tuple[int, ...] | None = None) -> Leaving:
        """Leaves at the first exit whose confidence reaches ``threshold`` (`rules.Confident`); caches are exact.

        Args:
          threshold: a probability.
          exits: depths to use; all where None.
        """
        used = self.depths[:-1] if exits is None else exits
        places = np.array([*(self.depths.index(n) for n in used), len(self.depths) - 1])
        sure = self.confidence[places] >= threshold
        sure[-1] = True
        first = np.argmax(sure, axis=0)
        said = np.take_along_axis(self.best[places], first[None], axis=0)[0]
        return Leaving(
            float(np.mean(np.asarray(self.depths)[places][first])),
            float(np.mean(first + 1)),
            float(np.mean(said == self.best[-1])),
            np.bincount(first, minlength=len(places)) / len(first),
        )


def score_exits(
    net: Net, found: ExitStates, maps: ExitMaps | None = None, batch: int = 512
) -> ExitScores:
    """Reads the exits at all positions.

    Args:
      net: of `net.separate`.
      found: what the model read.
      maps: None reads the raw states by the last norm and head.
      batch: positions whose logits are alive at a time.
    """
    y, d = len(found.exits), net.model.d_model
    own = jnp.zeros((y, d, d)) if maps is None else jnp.asarray(maps.maps)
    own = jnp.concatenate([own, jnp.zeros((1, d, d))])
    run = jax.jit(lambda variables, *given: _score(Net(net.model, variables), *given))
    parts = []
    for n in range(0, len(found.targets), batch):
        part = found.states[:, n : n + batch], found.targets[n : n + batch]
        parts.append(jax.device_get(run(net.variables, own, *part)))
    nats, best, confidence = (np.concatenate(kind, axis=1) for kind in zip(*parts, strict=True))
    return ExitScores((*found.exits, net.model.depth), nats, best, confidence)


def _score(net: Net, maps: Array, states: Float[Array, "y1 n d"], targets: Int[Array, "n"]) -> Any:
    def one(given: tuple[Array, Array]) -> Any:
        x = mapped(given[1], given[0]).astype(net.model.dtypes.compute)
        likely = jax.nn.log_softmax(net.classify(x[None])[0])
        best = jnp.argmax(likely, axis=-1).astype(jnp.int32)
        nats = -jnp.take_along_axis(likely, targets[:, None], axis=-1)[:, 0]
        return nats, best, jnp.exp(jnp.max(likely, axis=-1))

    return jax.lax.map(one, (maps, states))
