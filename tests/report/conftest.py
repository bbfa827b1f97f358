import json

import numpy as np
import pytest

EVIL = "<script>alert('x')</script>&\"$_{"

# Two layers route two tokens, "<b>" and "&": one expert each for the first, two each for the second.
KEEP = np.array([[True, False], [True, True]])
TEXT = {
    "kinds": {"ffn/route": "RoutePlan", "ffn/load": "ndarray"},
    "ffn/route/keep": np.stack([KEEP, KEEP]),
    "ffn/route/experts": np.zeros((2, 2, 2), np.int32),
    "ffn/load": np.array([[1, 3], [2, 2]]),
    "mask": np.ones((1, 2)),
    "shown/bytes": np.frombuffer(b"<b>&", np.uint8),
    "shown/widths": np.array([[3, 1]]),
}
# Of four images one leaves at exit 0 and two at exit 2; the fourth is padding.
IMAGES = {
    "kinds": {"exit": "ExitPlan"},
    "exit/exit": np.array([0, 2, 2, 0]),
    "exit/scores": np.zeros((4, 3)),
    "mask": np.array([1.0, 1.0, 1.0, 0.0]),
    "shown/images": np.tile(np.eye(2)[None, :, :, None], (4, 1, 1, 1)),
}


def save(folder, decisions):
    arrays = {**decisions, "kinds": np.array(json.dumps(decisions["kinds"]))}
    np.savez_compressed(folder / "decisions.npz", **arrays)


def write_run(folder, *, headline="nats", shift=0.0, pictures="text"):
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
    save(folder, IMAGES if pictures == "images" else TEXT)
    return folder


@pytest.fixture
def make_run():
    return write_run
