"""Images for diffusion: range, padding and averaging against numpy; metrics by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.tasks import Denoising, Digits


def test_images_are_padded_averaged_and_scaled():
    task = Denoising(images=Digits(), pad=1, shrink=2)
    batch = task.source("test").batch(np.arange(3))
    raw = Digits().source("test").batch(np.arange(3))["inputs"]
    train = Digits().arrays()["train"]["inputs"]
    scaled = (raw.astype(np.float64) - train.min()) / (train.max() - train.min()) * 2 - 1
    wide = np.full((3, 10, 10, 1), -1.0)
    wide[:, 1:9, 1:9] = scaled
    wanted = sum(wide[:, i::2, j::2] for i in range(2) for j in range(2)) / 4
    np.testing.assert_allclose(batch["inputs"], wanted, atol=1e-6)
    assert batch["inputs"].dtype == np.float32 and batch["mask"].tolist() == [1, 1, 1]
    spec = task.spec()["inputs"]
    assert (3, *spec.shape) == batch["inputs"].shape
    shown = task.describe(batch["inputs"])["images"]
    np.testing.assert_allclose(shown, (wanted + 1) / 2, atol=1e-6)


def test_metrics():
    noise = jnp.zeros((2, 2, 2, 1))
    output = {"noise": noise, "emitted": noise + 2.0, "final": noise.at[1].set(3.0)}
    found = Denoising(images=Digits()).metrics(output, {"mask": np.float32([1, 0])})
    assert found["mse"].value() == 4.0 and found["mse_final"].value() == 0.0


def test_bad_options(unchecked):
    with pytest.raises(DyncompError, match="use"):
        Denoising(images=Digits(), shrink=0)
    with pytest.raises(DyncompError, match="multiple"):
        Denoising(images=Digits(), shrink=3).spec()
