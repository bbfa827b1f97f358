import json

import pytest

EVIL = "<script>alert('x')</script>&\"$_{"


def write_run(folder, *, headline="nats", shift=0.0):
    """A work directory with every file, whose texts try to break out."""
    folder.mkdir(parents=True)
    records = [
        {"step": s, "split": split, "nats": 3.0 - s / 10 + shift, "loss": 3.0 - s / 10, EVIL: 1.0}
        for s in (1, 2, 3) for split in ("train", "validation")
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + '\n{"step": 4, "sp')
    points = [
        {"controls": {"p": p}, headline: 3.0 - p, "flops_needed": 1e6 * p, "flops_executed": 2e6 * p,
         "seconds": p / 10, "events_per_element": {"x": 1}}
        for p in (0.5, 1.0)
    ]  # fmt: skip
    summary = {
        "quality": {headline: 2.5 + shift}, "compute": {"flops_needed": 1.5e6, "flops_executed": 2e6},
        "ledger": [{"event": EVIL, "needed": 31, "executed": 64}], "pareto": points,
        "headline": headline, "minimize": True, "notes": [EVIL],
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.gin").write_text(f"# {EVIL}\nRun.steps = 3\n")
    (folder / "environment.json").write_text(json.dumps({"cpu": EVIL, "packages": {"jax": "1.2"}}))
    decisions = {
        "load": [[1, 3], [2, 2]], "exits": [1, 3], "text": {"pieces": ["<b>", "&"], "experts": [1, 2]},
        "images": {"images": [[[0.0, 1.0], [1.0, 0.0]]] * 3, "exit": [0, 1, 1]},
    }  # fmt: skip
    (folder / "decisions.json").write_text(json.dumps(decisions))
    return folder


@pytest.fixture
def make_run():
    return write_run
