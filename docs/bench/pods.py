"""Compiles the paper configs for slices of TPU pods that are not here: ``python docs/bench/pods.py``.

Each job is one ``dyncomp compile`` in a process of its own; its row is kept in ``pods/paper.json`` as soon as it ends,
and jobs that have a row are passed over (name configs to do them again). Nothing is run. ``pods_page.py`` writes
docs/pods.md.
"""

import datetime
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ROWS = HERE / "pods" / "paper.json"
PODS = ("v5e:16x16", "v5p:8x8x4")
"""Pods of 256 chips."""

TWINS = {
    4: "v5p:2x2x1",
    8: "v5p:2x2x2",
    16: "v5p:2x2x4",
    32: "v5p:2x4x4",
    64: "v5p:4x4x4",
}
"""A v5p slice by its chips, for configs whose batch does not spread over a pod."""

ON_PODS = {
    "biformer_paper": "data=256",
    "deediff_paper": "data=256",
    "deer_vla_paper": "data=1,fsdp=32,tensor=8",
    "duo_llm_paper": "data=4,fsdp=64",
    "dynamic_logits_fusion_paper": "data=1,fsdp=64,tensor=4",
    "dynamic_perceiver_paper": "data=256",
    "harder_tasks_more_experts_paper": "data=1,fsdp=16,expert=16",
    "moe_plus_plus_paper": "data=1,fsdp=16,expert=16",
    "mpcache_paper": "data=1,fsdp=16,tensor=16",
    "neural_des_paper": "data=256",
    "routing_transformer_paper": "data=1,fsdp=64,tensor=4",
    "sorted_llama_paper": "data=1,fsdp=32,tensor=8",
    "tutel_paper": "data=8,expert=32",
    "unified_layer_skipping_paper": "data=1,fsdp=64,tensor=4",
    "zipvl_paper": "data=1,fsdp=16,tensor=16",
}
"""Meshes of 256 chips for configs whose global batch (of one accumulated part) and heads can be split so often."""

LIMIT_S = 1800
"""Seconds after which a job counts as not ended."""


def configs() -> list[str]:
    """All paper configs."""
    return sorted(path.stem for path in (ROOT / "configs").glob("*_paper.gin"))


def own_slice(config: str) -> str:
    """The slice that a config's head names."""
    text = (ROOT / "configs" / f"{config}.gin").read_text()
    found = re.search(r"^# command: dyncomp compile \S+ --topology (\S+)$", text, re.M)
    assert found, f"{config}: its head names no topology"
    return found[1]


def chips(name: str) -> int:
    """How many chips a slice has."""
    count = 1
    for side in name.partition(":")[2].split("x"):
        count *= int(side)
    return count


def jobs() -> list[tuple[str, str, str]]:
    """(config, slice, mesh): the config's own slice and mesh (``""``), pods, and twins where there is no pod."""
    own = {config: own_slice(config) for config in configs()}
    made = [(config, name, "") for config, name in own.items()]
    pods = [(config, pod, ON_PODS[config]) for pod in PODS for config in own if config in ON_PODS]
    made = [job for job in made if job[1] not in PODS]  # those are among the pods
    twins = [
        (config, TWINS[chips(name)], "") for config, name in own.items() if config not in ON_PODS
    ]
    return made + pods + twins


def compile_one(config: str, name: str, mesh: str, more: Sequence[str] = ()) -> dict[str, Any]:
    """A row: what ``dyncomp compile --json`` says, or its one line of error; ``more`` are words of the command."""
    words = [
        sys.executable,
        "-m",
        "dyncomp",
        "compile",
        config,
        "--topology",
        name,
        "--no-code",
        "--json",
    ]
    words += [*(["--mesh", mesh] if mesh else []), *more]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    told = {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    row: dict[str, Any] = {"config": config, "slice": name, "mesh": mesh}
    start = time.perf_counter()
    try:
        done = subprocess.run(words, env=told, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return {**row, "error": f"had not ended after {LIMIT_S // 60} minutes"}
    row["wall_seconds"] = round(time.perf_counter() - start, 1)
    if done.returncode == 0:
        return {**row, "report": json.loads(done.stdout)}
    lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no word"]
    return {**row, "error": lines[-1].removeprefix("error: ")[:400], "exit": done.returncode}


def load() -> dict[str, Any]:
    """What was compiled so far."""
    return json.loads(ROWS.read_text()) if ROWS.is_file() else {"rows": []}


def versions() -> dict[str, Any]:
    """What compiled, and when."""
    found = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    return {"versions": found, "date": datetime.date.today().isoformat()}


def keep(row: dict[str, Any]) -> None:
    """Puts a row into the file, in the place of an older one."""
    found = load()
    key = lambda row: (row["config"], row["slice"], row["mesh"])  # noqa: E731
    rows = {key(old): old for old in found["rows"]} | {key(row): row}
    order = {job: place for place, job in enumerate(jobs())}
    kept = [rows[job] for job in sorted(rows, key=lambda job: order.get(job, len(order)))]
    made = {**versions(), "rows": kept}
    ROWS.parent.mkdir(exist_ok=True)
    ROWS.write_text(json.dumps(made, indent=1) + "\n")


def main() -> None:
    """Every job that has no row, or all jobs of the configs named."""
    named = sys.argv[1:]
    have = {(row["config"], row["slice"], row["mesh"]) for row in load()["rows"]}
    todo = [job for job in jobs() if (job[0] in named if named else job not in have)]
    for place, job in enumerate(todo, 1):
        print(f"{place}/{len(todo)}", *job, flush=True)
        row = compile_one(*job)
        keep(row)
        print(
            "  ",
            row.get("error") or row["report"]["verdict"],
            f"{row.get('wall_seconds', 0):.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
