"""A model, a task and runs small enough to train in a blink; imported by tests and by the processes they start."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dyncomp.core.aux import Aux, count
from dyncomp.core.ledger import Cost
from dyncomp.core.metrics import Mean
from dyncomp.tasks.base import ArraySource, Task
from dyncomp.training import SGD, AdamW, Run

N, D = 64, 4


class Net(nn.Module):
    """Two layers; one event a row, needed where the first feature exceeds a threshold."""

    hidden: int = 8
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x, mask=None, train=False, capture=()):
        threshold = self.variable("controls", "threshold", lambda: jnp.float32(0.0)).value
        dtypes = {"dtype": "float32", "param_dtype": self.param_dtype}
        hidden = nn.tanh(nn.Dense(self.hidden, name="hidden", **dtypes)(x))
        y = nn.Dense(1, name="out", **dtypes)(hidden)
        live = x[:, 0] > threshold
        plans = {"gate": {"live": live}} if "plan" in capture else {}
        return y[:, 0], Aux(events={"rows": count(jnp.sum(live), x.shape[0])}, plans=plans)

    def cost(self, shape):
        return {"rows": Cost(2 * self.hidden * (shape[-1] + 1))}


@dataclasses.dataclass(frozen=True)
class Squares:
    """Mean squared error."""

    def __call__(self, output, aux, batch, step):
        mean = Mean.of(jnp.square(output - batch["targets"]), batch["mask"])
        return mean.total / jnp.maximum(mean.count, 1.0), {"mse": mean}


@dataclasses.dataclass(frozen=True)
class Regression(Task):
    """A fixed linear map of Gaussian inputs."""

    headline = "mse"
    scale: float = 1.0

    def source(self, split):
        rng = np.random.default_rng(
            {"train": 0, "validation": 1, "calibration": 2, "test": 3}[split]
        )
        x = rng.normal(size=(N, D)).astype(np.float32)
        y = self.scale * (x @ np.arange(1, D + 1)).astype(np.float32)
        return ArraySource({"inputs": x, "targets": y})

    def objective(self):
        return Squares()

    def metrics(self, output, batch):
        return {"mse": Mean.of(jnp.square(output - batch["targets"]), batch["mask"])}


def make_run(**fields):
    """A run; ``steps=None`` with ``stages`` given."""
    default = {
        "model": Net(),
        "task": Regression(),
        "batch_size": 8,
        "log_every": 3,
        "save_every": 2,
    }
    if "stages" not in fields:
        default |= {"optimizer": AdamW(learning_rate=1e-2), "steps": 12}
    return Run(**{**default, **fields})


__all__ = ["SGD", "AdamW", "Net", "Regression", "Run", "Squares", "make_run"]
