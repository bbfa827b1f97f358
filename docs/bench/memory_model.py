"""Our count of a train step's memory beside XLA's for TPUs: ``python docs/bench/memory_model.py``.

Each case is a language model whose program XLA optimises for v5e chips in a process of its own (``--no-code``); XLA's
figure is all it allocates in a chip's main memory. Writes ``pods/memory_model.json``. Nothing is run.
"""

import functools
import json
import os
import subprocess
import sys
from typing import Any

from pods import HERE, ROOT, versions

ROWS = HERE / "pods" / "memory_model.json"
SMALL = {"layers": 8, "d": 1024, "heads": 8, "kv": 8, "hidden": 4096, "vocab": 16384, "batch": 16}
CASES: dict[str, dict[str, Any]] = {
    "dense": SMALL,
    "dense, nothing recomputed": SMALL | {"remat": "none"},
    "dense, products kept": SMALL | {"remat": "dots"},
    "dense, wide and long": SMALL
    | {
        "d": 2048,
        "heads": 16,
        "kv": 16,
        "hidden": 8192,
        "vocab": 32000,
        "length": 2048,
        "batch": 8,
    },
    "dense, 16 chips, grouped heads": SMALL
    | {
        "layers": 16,
        "d": 2048,
        "heads": 16,
        "kv": 4,
        "hidden": 5632,
        "vocab": 32000,
        "batch": 64,
        "chips": 16,
    },
    "8 experts, top 2": SMALL | {"hidden": 2048, "experts": 8},
}
"""Sizes; length 1,024 and parameters split over 4 chips where nothing else is said."""


def run_of(case: dict[str, Any]) -> Any:
    """The run of a case, bfloat16 with AdamW."""
    from dyncomp import attention, experts, models, routers, tasks
    from dyncomp.core.dtypes import DTypes
    from dyncomp.training import AdamW, Run

    mixer = functools.partial(attention.Attention, heads=case["heads"], kv_heads=case["kv"])
    unit = functools.partial(experts.SwiGLU, hidden=case["hidden"])
    if count := case.get("experts"):
        router = functools.partial(routers.TopK, k=2)
        unit = functools.partial(
            experts.MoE, router=router, num_experts=count, hidden=case["hidden"]
        )
    block = functools.partial(models.Block, mixer=mixer, ffn=unit)
    model = models.DecoderLM(
        vocab_size=case["vocab"], d_model=case["d"], groups=[models.Group([block], case["layers"])],
        remat=case.get("remat", "full"), dtypes=DTypes(compute="bfloat16"),
    )  # fmt: skip
    context = case.get("length", 1024)
    task = tasks.HubText(name="none", context=context, tokenizer="bpe", vocab_size=case["vocab"])
    return Run(
        model=model,
        task=task,
        optimizer=AdamW(learning_rate=1e-3),
        steps=1,
        batch_size=case["batch"],
    )


def ask_of(case: dict[str, Any], simulated: bool = False) -> Any:
    """Where a case is compiled, or on simulated devices."""
    from dyncomp.parallel import MeshSpec
    from dyncomp.parallel.aot import Ask

    chips = case.get("chips", 4)
    name = {4: "v5e:2x2", 16: "v5e:4x4"}[chips]
    return Ask(f"cpu:{chips}" if simulated else name, MeshSpec(data=1, fsdp=chips))


def compile_case(name: str) -> None:
    """Prints a row; the process ends beside its compile."""
    from dyncomp.parallel.early import dump_here

    folder = dump_here()
    from dyncomp.parallel.aot import optimise_job, prepare

    case = CASES[name]
    report = optimise_job(prepare(run_of(case), ask_of(case)), folder)
    print(
        json.dumps(
            {"case": name, "sizes": case, "xla": report.memory.peak, "ours": report.predicted}
        ),
        flush=True,
    )
    os._exit(0)


def main() -> None:
    """Every case, one after another."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    told = {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    rows = []
    for name in CASES:
        done = subprocess.run(
            [sys.executable, __file__, name], env=told, capture_output=True, text=True, check=True
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(name, rows[-1]["ours"]["peak"] / rows[-1]["xla"], flush=True)
    ROWS.write_text(json.dumps({**versions(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    compile_case(sys.argv[1]) if len(sys.argv) > 1 else main()
