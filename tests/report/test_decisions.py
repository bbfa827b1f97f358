"""From a trained model to the page: what a run of an exiting classifier leaves is drawn, and drawn right."""

import dataclasses
import functools
import re

import numpy as np
import pytest

from dyncomp.attention import Attention
from dyncomp.exits.bank import ExitBank
from dyncomp.exits.objectives import MultiExitObjective
from dyncomp.exits.rules import ConfidenceRule
from dyncomp.experts import MLP
from dyncomp.models import Block, Group, VisionTransformer
from dyncomp.models.exiting import ExitingClassifier
from dyncomp.report.page import write_report
from dyncomp.tasks import Digits
from dyncomp.training import AdamW, Run
from dyncomp.training.loop import train


@dataclasses.dataclass(frozen=True)
class Emitted(Digits):
    """Digits scored on what each example leaves with."""

    def metrics(self, output, batch):
        return super().metrics(output["emitted"], batch)


def exiting_run():
    block = functools.partial(
        Block,
        mixer=functools.partial(Attention, heads=2, rope_theta=None, causal=False),
        ffn=functools.partial(MLP, hidden=32),
        norm="layer",
    )
    net = functools.partial(
        VisionTransformer, classes=10, patch=4, d_model=16, groups=(Group((block,), 3),)
    )
    return Run(
        model=ExitingClassifier(backbone=net, exits=ExitBank, rule=ConfidenceRule(threshold=0.3)),
        task=Emitted(),
        objective=MultiExitObjective(final=True),
        optimizer=AdamW(learning_rate=3e-3),
        steps=40,
        batch_size=64,
        final_eval_batches=1,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("exits")
    train(exiting_run(), workdir, progress=False)
    return workdir


def test_exits_and_images_of_a_trained_classifier(trained, tmp_path):
    text = write_report([trained], tmp_path / "r.html").read_text()
    with np.load(trained / "decisions.npz") as found:
        exits, images, inputs = found["exit/exit"], found["shown/images"], found["inputs"]
    counts = np.bincount(exits, minlength=3)
    assert (counts > 0).sum() >= 2, "the threshold should split the batch; choose another"
    drawing = text.split("histogram of exits")[1].split("</svg>")[0]
    labels = re.findall(r"<!-- (\d+%) -->", drawing)[-3:]
    assert labels == [f"{share:.0%}" for share in counts / len(exits)]
    for index, count in enumerate(counts):
        assert text.count(f'alt="leaves at exit {index}"') == min(count, 12)
    # Pixels of a digit are 0..16; the batch's darkest and brightest stand for 0 and 1.
    raw = inputs * 6.02 + 4.88
    np.testing.assert_allclose(images, raw / 16, atol=1e-5)


def test_calibration_of_a_trained_classifier(trained, tmp_path):
    text = write_report([trained], tmp_path / "r.html").read_text()
    kept = np.load(trained / "exits.npz")
    x, n, c = kept["logits"].shape
    assert (x, c) == (3, 10)
    assert kept["targets"].shape == kept["exit"].shape == (n,)
    assert "Calibration of the exits" in text
    assert all(f"<td>{name}</td>" in text for name in ("exit 0", "exit 1", "exit 2", "emitted"))
    assert 'aria-label="reliability of every exit"' in text
