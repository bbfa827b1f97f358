"""Guessers of later tokens beside a frozen model, and their training from its own greedy text.

Prompt tokens (arXiv 2405.18628) and, to compare them with, heads on the last token's output (Medusa, arXiv 2401.10774).
Several guessers learn side by side: one reading of each text and one set of labels serve all, so that their data are
equal. Letters: ``c`` positions of a text that guesses are made at, ``k`` distances.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Float, Int
from dyncomp.decoding.net import Net
from dyncomp.decoding.prompt_training import chain_logits, greedy_labels, guessing_loss, read_text
from dyncomp.decoding.reading import Reading
from dyncomp.decoding.tree_replay import guess_ranks
from dyncomp.models import DecoderLM


@runtime_checkable
class Guess(Protocol):
    """Raw logits for 2 .. k + 1 tokens after each cut of a text that was read (`read_text`, room for c k slots)."""

    def __call__(
        self,
        net: Net,
        params: Any,
        reading: Reading,
        outputs: Float[Array, "b t d"],
        cuts: Int[Array, "b c"],
    ) -> Float[Array, "b c k v"]:
        """The logits."""
        ...


def prompt_guesses(net, params, reading, outputs, cuts):
    """What chains of prompt tokens say; ``params`` [k d] are their embeddings (arXiv 2405.18628)."""
    return chain_logits(net, reading, params, cuts, outputs.shape[1])


def head_guesses(net, params, reading, outputs, cuts):
    """What heads on the last real token's output say; ``params`` [k d d], zero at the start.

    Head i is the model's own classifier of x + silu(x M_i): the residual block of Medusa (arXiv 2401.10774), without a
    bias, and without a vocabulary matrix of its own, which Medusa's heads have.
    """
    x = jnp.take_along_axis(outputs, cuts[:, :, None], axis=1)[:, :, None]
    change = jax.nn.silu(jnp.einsum("bcd,kde->bcke", x[:, :, 0], params.astype(x.dtype)))
    b, c, k, d = change.shape
    return net.classify((x + change).reshape(b, c * k, d)).reshape(b, c, k, -1)


@dataclasses.dataclass(frozen=True)
class Learner:
    """A guesser in training.

    Attributes:
      guess: what it says.
      start: its parameters before the first step; one array with a leading axis of k.
      learning_rate: peak of a cosine to 0, AdamW without weight decay or warm-up (the released code: 1e-2).
    """

    guess: Guess
    start: Float[Array, "k ..."]
    learning_rate: float = 1e-2

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """AdamW of ``steps``."""
        rate = optax.cosine_decay_schedule(self.learning_rate, steps)
        return optax.adamw(rate, weight_decay=0.0)


def guessers_loss(
    net: Net,
    guessers: Mapping[str, Guess],
    params: Mapping[str, Any],
    tokens: Int[Array, "b t"],
    cuts: Int[Array, "b c"],
    decay: float = 0.8,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Sum of all guessers' `guessing_loss`, nats, and each alone; no gradient to the model.

    The labels are the frozen model's logits along its own greedy continuation of each cut.
    """
    net = dataclasses.replace(net, variables=lax.stop_gradient(net.variables))
    k = len(jax.tree.leaves(params)[0])
    outputs, reading = read_text(net, tokens, cuts.shape[1] * k)
    teacher, _ = greedy_labels(net, reading, outputs, cuts, k)
    text = reading, outputs, cuts
    each = {
        name: guessing_loss(guess(net, params[name], *text), teacher, decay)
        for name, guess in guessers.items()
    }
    return jnp.sum(jnp.stack(list(each.values()))), each


def guessers_ranks(
    net: Net,
    guessers: Mapping[str, Guess],
    params: Mapping[str, Any],
    tokens: Int[Array, "b t"],
    cuts: Int[Array, "b c"],
) -> dict[str, Int[Array, "b c k"]]:
    """Of each guesser, the rank of the model's own greedy continuation of each cut, 2 .. k + 1 tokens ahead."""
    k = len(jax.tree.leaves(params)[0])
    outputs, reading = read_text(net, tokens, cuts.shape[1] * k)
    _, right = greedy_labels(net, reading, outputs, cuts, k)
    text = reading, outputs, cuts
    return {
        name: guess_ranks(one(net, params[name], *text), right) for name, one in guessers.items()
    }


def train_guessers(
    net: Net,
    learners: Mapping[str, Learner],
    texts: Iterable[Int[np.ndarray, "b t"]],
    steps: int,
    *,
    cuts: int = 16,
    decay: float = 0.8,
    seed: int = 0,
    report: Callable[[int, dict[str, float]], Any] | None = None,
) -> dict[str, Any]:
    """Trains guessers on ``steps`` batches of texts, each cut at ``cuts`` random places; the model stays as it is.

    Args:
      net: the frozen model (`decoding.net.separate`).
      learners: by name; what one learns does not depend on the others.
      texts: int32 token ids, all of one shape, ``steps`` batches at least.
      cuts: of each text, distinct; at most its length.
      decay: weight of one distance over that of the distance before.
      seed: of the cuts.
      report: given the step and the losses of every one of them; waits for the device.

    Returns:
      name -> trained parameters.

    Raises:
      DyncompError: learners that look differently far ahead, or fewer texts or tokens than asked for.
    """
    depths = {name: len(one.start) for name, one in learners.items()}
    if len(set(depths.values())) != 1:
        raise DyncompError(f"train_guessers: {depths} distances; give all learners as many")
    params = {name: jnp.asarray(one.start) for name, one in learners.items()}
    rules = {name: one.optimizer(steps) for name, one in learners.items()}
    states = {name: rule.init(params[name]) for name, rule in rules.items()}
    guessers = {name: one.guess for name, one in learners.items()}
    advance = _step(net.model, guessers, rules, cuts, decay)
    step, root = -1, jax.random.key(seed)
    for step, tokens in zip(range(steps), texts, strict=False):
        if tokens.shape[1] < cuts:
            raise DyncompError(
                f"train_guessers: {cuts} cuts of {tokens.shape[1]} tokens; lower cuts"
            )
        key = jax.random.fold_in(root, step)
        params, states, each = advance(net.variables, params, states, jnp.asarray(tokens), key)
        if report is not None:
            report(step, {name: float(loss) for name, loss in each.items()})
    if step + 1 < steps:
        raise DyncompError(f"train_guessers: {step + 1} batches of texts for {steps} steps")
    return params


def _step(
    model: DecoderLM,
    guessers: Mapping[str, Guess],
    rules: Mapping[str, optax.GradientTransformation],
    cuts: int,
    decay: float,
) -> Callable[..., Any]:
    """One compiled step on a batch of texts."""

    def advance(variables, params, states, tokens, key):
        at = jax.vmap(lambda key: jax.random.permutation(key, tokens.shape[1])[:cuts])
        places = at(jax.random.split(key, len(tokens))).astype(jnp.int32)
        net = Net(model, variables)
        loss = lambda own: guessers_loss(net, guessers, own, tokens, places, decay)
        gradient, each = jax.grad(loss, has_aux=True)(params)
        made = {n: rule.update(gradient[n], states[n], params[n]) for n, rule in rules.items()}
        params = {n: optax.apply_updates(params[n], update) for n, (update, _) in made.items()}
        return params, {n: state for n, (_, state) in made.items()}, each

    return jax.jit(advance)
