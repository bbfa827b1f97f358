"""Exit maps for a frozen language model: what its middle blocks would say if its last norm and head could read them.

The model reads a text once; the outputs of the blocks at the exits and of the last one are kept. The maps start at
the least-squares map from the first to the last (arXiv 2303.09435), rows scaled to unit root mean square, since the
final norm forgets their size. Then they learn by distillation: the divergence of an exit's distribution from that of
full depth (arXiv 2303.08112), not the likelihood of the text, because an exit stands in for the model, right or wrong,
and because a whole distribution a position tells more than one token does. Only the maps learn.

A text's first position is left out. It is an attention sink whose state is orders of magnitude larger than any other,
and no generated token ever stands there.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Float, Int
from dyncomp.decoding.exit_maps import ExitMaps
from dyncomp.decoding.exiting import check_exits
from dyncomp.decoding.fusion import kl_divergence
from dyncomp.decoding.net import Net
from dyncomp.decoding.rules import mapped


class ExitStates(NamedTuple):
    """What blocks said about a text; on the host.

    Attributes:
      exits: blocks that have run at each exit.
      states: float32 [y+1 n d], outputs at the exits and of the last block.
      targets: int32 [n], the text's next token.
    """

    exits: tuple[int, ...]
    states: Float[np.ndarray, "y1 n d"]
    targets: Int[np.ndarray, "n"]


def read_states(
    net: Net,
    exits: tuple[int, ...],
    windows: Int[np.ndarray, "m t"],
    batch: int = 4,
    done: Callable[[], Any] = lambda: None,
) -> ExitStates:
    """Reads windows of text, each on its own, one pass a batch for all exits.

    Args:
      net: of `net.separate`.
      exits: see `exiting.ExitEarly`.
      windows: token ids, t at least 3; a rest smaller than a batch is left out.
      batch: windows of one pass.
      done: called after each pass.

    Raises:
      DyncompError: exits the model does not have, or less than a batch of windows.
    """
    check_exits(exits, net.model.depth)
    m, t = windows.shape
    if m < batch or t < 3:
        raise DyncompError(f"{m} windows of {t} tokens; give at least {batch} of at least 3")
    run = jax.jit(lambda variables, tokens: _outputs(Net(net.model, variables), exits, tokens))
    used = windows[: m // batch * batch]
    rows = batch * (t - 2)
    # Filled in place: twice the states would not fit beside a larger model.
    states = np.empty((len(exits) + 1, len(used) * (t - 2), net.model.d_model), np.float32)
    for n in range(0, len(used), batch):
        found = run(net.variables, used[n : n + batch])
        states[:, n // batch * rows :][:, :rows] = found
        done()
    return ExitStates(exits, states, used[:, 2:].reshape(-1))


def _outputs(net: Net, exits: tuple[int, ...], tokens: Int[Array, "b t"]) -> Float[Array, "y1 n d"]:
    """Outputs at all positions but the first and the last."""
    b, t = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t))
    x, mask, kept = net.embed(tokens, positions), jnp.ones((b, t), bool), []
    for index in range(net.model.depth):
        x, *_ = net.block(index, x, positions, mask, None)
        if index + 1 in (*exits, net.model.depth):
            kept.append(x[:, 1:-1].reshape(b * (t - 2), -1).astype(jnp.float32))
    return jnp.stack(kept)


def least_squares(found: ExitStates, ridge: float = 1e-3) -> ExitMaps:
    """The maps that bring each exit's states closest to the last block's, rows at unit root mean square.

    Args:
      found: what the model read; more rows than the width, or ``ridge`` decides.
      ridge: added to the mean second moments' diagonal.
    """
    unit = lambda x: x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + 1e-12)
    last, d = unit(found.states[-1]), found.states.shape[-1]
    maps = []
    for state in found.states[:-1]:
        x = unit(state)
        moments = x.T @ x / len(x) + ridge * np.eye(d, dtype=np.float32)
        maps.append(np.linalg.solve(moments, x.T @ last / len(x)) - np.eye(d))
    return ExitMaps(found.exits, jnp.asarray(np.stack(maps), jnp.float32))


def divergence(teacher: Float[Array, "n v"], student: Float[Array, "n v"]) -> Float[Array, ""]:
    """KL(teacher || student) of raw logits, nats, mean over rows."""
    return jnp.mean(kl_divergence(jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)))


def distill(
    net: Net,
    start: ExitMaps,
    found: ExitStates,
    *,
    epochs: int = 1,
    batch: int = 512,
    learning_rate: float = 3e-4,
    seed: int = 0,
    done: Callable[[np.ndarray], Any] = lambda losses: None,
) -> ExitMaps:
    """Trains the maps by AdamW on shuffled positions; the rate falls to 0 along a cosine.

    Logits of one exit at a time are alive, with their gradient: some ``6 batch v`` float32.

    Args:
      start: where they begin.
      found: what the model read.
      epochs: times that each position is used.
      batch: positions of one step.
      done: sees each step's divergences, float32 [y] in nats.

    Raises:
      DyncompError: fewer positions than a batch.
    """
    order = list(_batches(len(found.targets), batch, epochs, seed))
    optimizer = optax.adamw(optax.cosine_decay_schedule(learning_rate, len(order)))
    update = jax.jit(_update(net, optimizer), donate_argnums=(1, 2))
    # A copy: the first step gives its buffers away.
    maps = jnp.array(start.maps, jnp.float32, copy=True)
    state = optimizer.init(maps)
    for rows in order:
        maps, state, losses = update(net.variables, maps, state, found.states[:, rows])
        done(np.asarray(losses))
    return ExitMaps(found.exits, maps)


def _batches(n: int, batch: int, epochs: int, seed: int) -> Iterator[Int[np.ndarray, "b"]]:
    if n < batch:
        raise DyncompError(f"{n} positions of text for batches of {batch}; give more text")
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(n)
        yield from np.split(order[: n // batch * batch], n // batch)


def _update(net: Net, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    def update(variables: Any, maps: Array, state: Any, states: Float[Array, "y1 n d"]) -> Any:
        own = Net(net.model, variables)
        teacher = _logits(own, states[-1])

        def loss(one: Float[Array, "d d"], x: Float[Array, "n d"]) -> Float[Array, ""]:
            return divergence(teacher, _logits(own, mapped(x, one)))

        # Not vmap: one exit's logits at a time.
        losses, grads = lax.map(lambda given: jax.value_and_grad(loss)(*given), (maps, states[:-1]))
        change, state = optimizer.update(grads, state, maps)
        return optax.apply_updates(maps, change), state, losses

    return update


def _logits(net: Net, x: Float[Array, "n d"]) -> Float[Array, "n v"]:
    return net.classify(x[None].astype(net.model.dtypes.compute))[0]
