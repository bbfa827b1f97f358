"""Weak scaling by compiled costs: ``python docs/bench/scaling.py``.

The train steps of a dense and of an expert model are compiled for slices of 8 to 512 v5p chips, every chip with the
same share of the batch, and kept in ``pods/scaling.json``. Nothing is run; ``pods_page.py`` makes table and figure.
"""

import json
from typing import Any

from pods import HERE, compile_one, versions

ROWS = HERE / "pods" / "scaling.json"
SLICES = {
    8: "v5p:2x2x2",
    16: "v5p:2x2x4",
    32: "v5p:2x4x4",
    64: "v5p:4x4x4",
    128: "v5p:4x4x8",
    256: "v5p:4x8x8",
    512: "v5p:8x8x8",
}
SEQUENCES = 2
"""A chip and step."""

WIDEST = 32
"""Parameters of `dense` have 4,096 columns: split further, a shard is narrower than the 128 lanes of a tile."""

MODELS = {
    "dense": (
        "dynamic_logits_fusion_paper",
        lambda chips: f"data={max(1, chips // WIDEST)},fsdp={min(WIDEST, chips)}",
    ),
    "dense, all split": ("dynamic_logits_fusion_paper", lambda chips: f"data=1,fsdp={chips}"),
    "experts": ("moe_plus_plus_paper", lambda chips: f"data=1,fsdp={chips // 8},expert=8"),
}


def jobs() -> list[tuple[str, int]]:
    """(model, chips), small ones first."""
    return [(model, chips) for chips in SLICES for model in MODELS]


def compiled(model: str, chips: int) -> dict[str, Any]:
    """A row."""
    config, mesh = MODELS[model]
    words = [
        f"--gin.training.Run.batch_size={SEQUENCES * chips}",
        "--gin.training.Run.accumulate=1",
    ]
    words += ["--gin.tasks.HubText.context=2048"]
    return {
        "model": model,
        "chips": chips,
        **compile_one(config, SLICES[chips], mesh(chips), words),
    }


def main() -> None:
    """Every slice that has no row."""
    found = json.loads(ROWS.read_text()) if ROWS.is_file() else {"rows": []}
    rows = {(row["model"], row["chips"]): row for row in found["rows"]}
    for job in jobs():
        if job in rows:
            continue
        print(*job, flush=True)
        rows[job] = compiled(*job)
        made = {
            **versions(),
            "sequences": SEQUENCES,
            "rows": [rows[key] for key in jobs() if key in rows],
        }
        ROWS.write_text(json.dumps(made, indent=1) + "\n")
        print("  ", rows[job].get("error") or rows[job]["report"]["verdict"], flush=True)


if __name__ == "__main__":
    main()
