"""Long sequences on more chips than there are sequences, by compiled costs: ``python docs/bench/sequence.py``.

One train step of `dynamic_logits_fusion_paper` (7B) on 32 v5p chips, four sequences, eight chips for each: positions
split over them with attention in a ring or with keys gathered, or heads and hidden units split over a tensor axis. Kept
in ``pods/sequence.json``. Nothing is run; ``pods_page.py`` makes the table.
"""

import itertools
import json
from typing import Any

from pods import HERE, compile_one, versions

ROWS = HERE / "pods" / "sequence.json"
CONFIG, SLICE, BATCH = "dynamic_logits_fusion_paper", "v5p:2x4x4", 4
LENGTHS, KV_HEADS = (8192, 32_768), (32, 8)
FORMS = {
    "ring": ("data=1,fsdp=4,sequence=8", ["--gin.attention.Attention.across='ring'"]),
    "gather": ("data=1,fsdp=4,sequence=8", ["--gin.attention.Attention.across='gather'"]),
    "tensor": ("data=1,fsdp=4,tensor=8", []),
}


def jobs() -> list[tuple[int, int, str]]:
    """(length, key/value heads, form), short ones first."""
    return list(itertools.product(LENGTHS, KV_HEADS, FORMS))


def compiled(length: int, kv_heads: int, form: str) -> dict[str, Any]:
    """A row."""
    mesh, words = FORMS[form]
    words = [
        f"--gin.training.Run.batch_size={BATCH}",
        f"--gin.KV_HEADS={kv_heads}",
        f"--gin.tasks.HubText.context={length}",
        *words,
    ]
    row = {"length": length, "kv_heads": kv_heads, "form": form}
    return {**row, **compile_one(CONFIG, SLICE, mesh, words)}


def main() -> None:
    """Every job that has no row."""
    found = json.loads(ROWS.read_text()) if ROWS.is_file() else {"rows": []}
    rows = {(row["length"], row["kv_heads"], row["form"]): row for row in found["rows"]}
    for job in jobs():
        if job in rows:
            continue
        print(*job, flush=True)
        rows[job] = compiled(*job)
        made = {**versions(), "rows": [rows[key] for key in jobs() if key in rows]}
        ROWS.write_text(json.dumps(made, indent=1) + "\n")
        print("  ", rows[job].get("error") or rows[job]["report"]["verdict"], flush=True)


if __name__ == "__main__":
    main()
