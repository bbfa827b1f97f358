"""After training, networks with exits run once more as they are served."""

import functools
import json

from dyncomp.attention import Attention
from dyncomp.cli.executed import executed, said
from dyncomp.exits import ConfidenceRule, ExitBank
from dyncomp.experts import MLP
from dyncomp.models import Block, ExitingClassifier, Group, VisionTransformer
from dyncomp.tasks import Digits
from dyncomp.training import AdamW, Run
from dyncomp.training.loop import train


def test_a_trained_run_gets_its_record_and_a_line(tmp_path):
    block = functools.partial(
        Block,
        mixer=functools.partial(Attention, heads=2, rope_theta=None, causal=False),
        ffn=functools.partial(MLP, hidden=8),
        norm="layer",
    )
    net = functools.partial(
        VisionTransformer, classes=10, patch=4, d_model=4, groups=(Group((block,), 2),)
    )
    bank = functools.partial(ExitBank, gated=False)
    rule = ConfidenceRule(threshold=0.15)
    small = {"batch_size": 8, "final_eval_batches": 1, "eval_every": 0, "capture": False}
    run = Run(
        model=ExitingClassifier(net, bank, rule),
        task=Digits(), steps=1, optimizer=AdamW(learning_rate=1e-3), **small,
    )  # fmt: skip
    summary = train(run, tmp_path / "exits", progress=False)
    dense = run.replace(model=net())
    found = executed({"exits": run, "dense": dense, "unfinished": run}, tmp_path, quick=True)
    assert list(found) == ["exits"] and found["exits"]["other_ways"] == 0
    assert found["exits"]["quality"]["accuracy"] == summary["quality"]["accuracy"]
    path = tmp_path / "exits" / "executed.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "examples": 1234}))
    again = executed({"exits": run}, tmp_path)["exits"]  # what is there is not measured again
    line = said("accuracy", {**again, "seconds": 1e-4, "seconds_masked": 2e-4})
    assert "0 of 1234 examples took another way" in line
    assert "100 microseconds an example (everything for everyone: 200)" in line
