"""Writes docs/pods.md and its figure from ``pods/*.json``: ``python docs/bench/pods_page.py``."""

import json
from typing import Any

import memory_model
import pods
import scaling
import sequence

PAGE = pods.HERE.parent / "pods.md"
FIGURE = pods.HERE.parent / "figures" / "scaling.svg"
GIB = 2**30
MARGIN = 1.25
"""As `dyncomp.parallel.aot` has it."""

HOP_S = 1e-6
"""Seconds of a hop from chip to chip: ours, not published."""

HEAD = """# Pods that are not here

Written by `docs/bench/pods_page.py`. Nothing on this page was run: programs were optimised by the TPU's own compiler,
with no TPU (jax {jax}, libtpu {libtpu}, {date}), and left before machine code (`dyncomp compile --no-code`). Memory,
collectives and kernels are the compiler's word; whether kernels become code was not tried here. Times are a **model**
(`dyncomp/parallel/roofline.py`): published peaks and nothing that a clock has confirmed.

## Paper configs

`python docs/bench/pods.py`: the train step of each config at its paper's global batch and length, on a pod of 256 chips
where batch and heads can be split that often, else on the slice that the config's head names and a v5p slice of as many
chips. `mesh` is how the chips are used; without one it is the config's own. {made} of {jobs} such programs are in the
table; the command makes those that are missing.

- GiB: all that XLA allocates in one chip's memory, of 16 (v5e) or 95 (v5p); ours: by our own count, where it knows the
  model (`dyncomp/parallel/memory.py`), else the state alone, with a plus.
- TFLOP: of one chip and step, executed at most, no recomputation. Of dense: what that is of the same step if every
  expert ran on every token.
- collectives: places in the program, and GiB of results on one chip a step, by kind: all-gather (g), all-reduce (r),
  reduce-scatter (s), all-to-all (a), ragged all-to-all (ra), collective-permute (p).
- kernels: calls of hand-written kernels in the program.
- binds: what the model says is longest, and that bound in milliseconds.
- s: tracing and optimising, on two cores that others used too.
"""
SHORT = {
    "all-gather": "g",
    "all-reduce": "r",
    "reduce-scatter": "s",
    "all-to-all": "a",
    "ragged-all-to-all": "ra",
    "collective-permute": "p",
    "collective-broadcast": "b",
}


def paper(found: dict[str, Any]) -> str:
    """The table of all configs."""
    head = "config | slice | mesh | fits | GiB | ours | TFLOP | of dense | collectives | kernels | binds | s"
    columns = head.count("|") + 1
    lines = [f"| {head} |", "| " + " | ".join(["---"] * columns) + " |"]
    lines += [line(row) for row in found["rows"]]
    return "\n".join(lines)


def line(row: dict[str, Any]) -> str:
    """One job; its reason in one line where it did not compile."""
    cells = [
        f"`{row['config'].removesuffix('_paper')}`",
        row["slice"],
        row["mesh"].replace(",", " "),
    ]
    if "error" in row:
        return (
            f"| {' | '.join(cells)} | not compiled: {row['error'].replace('|', '/')} |" + " |" * 8
        )
    report = row["report"]
    if report["memory"] is None:
        said = report["refused"].replace("|", "/")
        return f"| {' | '.join(cells)} | no: {said} |" + " |" * 8
    model, memory = report["model"], report["memory"]
    dense = report["dense_flops"]
    cells += [
        "yes" if report["fits"] else "no",
        f"{memory['peak'] / GIB:.2f}",
        ours(report),
        "" if report["ledger_flops"] is None else f"{report['ledger_flops'] / 1e12:.3g}",
        f"{report['ledger_flops'] / dense:.3f}" if dense else "",
        traffic(report["collectives"]),
        str(sum(report["kernels"].values())),
        f"{model['binds']} {1e3 * model['overlapped']:.3g}" if model else "",
        f"{report['seconds']:.0f}" if report["seconds"] else "",
    ]
    return "| " + " | ".join(cells) + " |"


def ours(report: dict[str, Any]) -> str:
    """Our own count in GiB: of the whole, or of the state and more."""
    if report["predicted"]:
        return f"{report['predicted']['peak'] / GIB:.2f}"
    return f"{report['state_bytes'] / GIB:.2f}+"


MEMORY = """
## Memory by our own count

`python docs/bench/memory_model.py`: language models in bfloat16 with AdamW on v5e chips, parameters split over all of
them. XLA's figure is all it allocates in a chip's main memory; ours takes seconds of tracing and is shown by
`dyncomp compile` beside it (*peak a device (ours)*). Programs that it finds {margin:.0%} too large are not compiled.

| case | XLA, MiB | ours, MiB | ours over XLA's |
| --- | --- | --- | --- |
"""


def memory(found: dict[str, Any]) -> str:
    """The table of cases, and how many are close."""
    ratio = lambda row: row["ours"]["peak"] / row["xla"]  # noqa: E731
    cell = lambda size: f"{size / 2**20:,.0f}"  # noqa: E731
    lines = [
        f"| {row['case']} | {cell(row['xla'])} | {cell(row['ours']['peak'])} | {ratio(row):.3f} |"
        for row in found["rows"]
    ]
    close = sum(abs(ratio(row) - 1) <= 0.05 for row in found["rows"])
    said = f"\n\nWithin 5%: {close} of {len(lines)}.\n"
    return MEMORY.format(margin=MARGIN - 1) + "\n".join(lines) + said


def traffic(found: dict[str, Any]) -> str:
    """``g 12: 3.1, r 4: 0.2``."""
    parts = (f"{SHORT[k]} {t['sites']}: {t['bytes'] / GIB:.2g}" for k, t in found.items())
    return ", ".join(parts) or "none"


def step_seconds(row: dict[str, Any]) -> dict[str, float]:
    """The model of a step: all bounds overlapped, and one after another; both with the hops of every collective."""
    model, found = row["report"]["model"], row["report"]["collectives"]
    sides = [int(side) for side in scaling.SLICES[row["chips"]].partition(":")[2].split("x")]
    hops = sum(side - 1 for side in sides)
    latency = HOP_S * hops * sum(each["runs"] for each in found.values())
    busy = max(model["compute"], model["memory"])
    links = model["interconnect"] + latency
    return {"overlapped": max(busy, links), "apart": model["compute"] + model["memory"] + links}


def efficiency(rows: list[dict[str, Any]], model: str) -> dict[int, dict[str, float]]:
    """By chips: time of the smallest slice over time, in both readings."""
    own = {
        row["chips"]: step_seconds(row) for row in rows if row["model"] == model and "report" in row
    }
    first = own[min(own)]
    return {chips: {how: first[how] / each[how] for how in first} for chips, each in own.items()}


SCALING = """
## Weak scaling, 8 to 512 chips

`python docs/bench/scaling.py`: v5p slices, {sequences} sequences of 2,048 tokens a chip. *dense* is
`dynamic_logits_fusion_paper` (7B, parameters split over 32 chips at most, copies beyond); *all split* has one copy on
however many chips; *experts* is `moe_plus_plus_paper` (experts over 8 chips, the rest of the parameters over all).
Collective bytes are the compiler's; time and efficiency are the **model's**.

More than 32 ways is worse than copies: shards of 4,096 columns are then narrower than the 128 lanes of a tile, and the
programs hold no all-gather any more, only all-reduces that send half as much again (our reading: zero-padded shards are
added up). Up to 32 chips products are cut into pieces that run beside permutes, whose bytes shrink with the shards:
hence efficiencies above 1.

Assumptions of the interconnect: every collective goes round one dimension of the torus at the links' published peak
(v5p: 1.2 TB/s a chip, both ways, over three dimensions: 200 GB/s sent along one), although XLA may use all three; each
of its runs also waits for a message to pass every dimension of the slice, at 1 microsecond a hop (ours; no maker says
it). *Overlapped*: everything beside everything; *apart*: one after another. The truth lies between them, if the peaks
are reached at all.

| {head} |
| {rule} |
"""
SCALED = (
    "model | chips | GiB a chip | GiB sent a chip and step | collectives run | compute ms | memory ms | links ms | "
    "waits ms | efficiency, overlapped | apart"
)


def scaled(found: dict[str, Any]) -> str:
    """The table of the study."""
    lines = []
    for model in scaling.MODELS:
        shares = efficiency(found["rows"], model)
        for row in (row for row in found["rows"] if row["model"] == model):
            if "report" not in row:
                lines.append(
                    f"| {model} | {row['chips']} | not compiled: {row['error']} |" + " |" * 8
                )
                continue
            report, times = row["report"], row["report"]["model"]
            moved = report["collectives"].values()
            waits = step_seconds(row)["apart"] - times["apart"]
            cells = [
                model,
                str(row["chips"]),
                f"{report['memory']['peak'] / GIB:.1f}",
                f"{sum(each['sent'] for each in moved) / GIB:.2f}",
                str(sum(each["runs"] for each in moved)),
                *(f"{1e3 * times[name]:.0f}" for name in ("compute", "memory", "interconnect")),
                f"{1e3 * waits:.1f}",
                *(f"{shares[row['chips']][how]:.3f}" for how in ("overlapped", "apart")),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    picture = "\n\n![Efficiency by the model against chips](figures/scaling.svg)\n"
    rule = " | ".join(["---"] * (SCALED.count("|") + 1))
    text = SCALING.format(sequences=found["sequences"], head=SCALED, rule=rule)
    return text + "\n".join(lines) + picture


def draw(found: dict[str, Any]) -> None:
    """Efficiency against chips, both readings of both models."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "pods"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    colours = ("tab:blue", "tab:green", "tab:orange")
    for model, colour in zip(scaling.MODELS, colours, strict=True):
        shares = efficiency(found["rows"], model)
        for how, style in (("overlapped", "-"), ("apart", "--")):
            heights = [each[how] for each in shares.values()]
            axes.plot(
                list(shares), heights, style, color=colour, marker="o", label=f"{model}, {how}"
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(scaling.SLICES), [str(n) for n in scaling.SLICES])
    tallest = max(line.get_ydata().max() for line in axes.lines)
    axes.set(ylim=(0, 1.05 * tallest), xlabel="v5p chips", ylabel="efficiency (model)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(FIGURE, metadata={"Date": None})


SEQUENCES = """
## Long sequences

`python docs/bench/sequence.py`: a train step of a 7B model on 32 v5p chips, {batch} sequences, eight chips for each;
parameters split over all. *ring* and *gather*: positions split (`--mesh data=1,fsdp=4,sequence=8`), keys and values
going round the chips or collected by each (`attention.Attention.across`); *tensor*: heads and hidden units split
(`--mesh data=1,fsdp=4,tensor=8`). The ring is the default: it needs least memory, a third of gathering's at 32,768
positions, where arithmetic takes longer than the links in all forms, and sends {more[0]:.0%} to {more[1]:.0%} more. All
forms hold tables of scores; a ring's are the smallest. Bytes are the compiler's, times the **model's**.

| {head} |
| {rule} |
"""
SEQUENCE = "positions | key/value heads | form | GiB a chip | GiB sent a chip and step | compute ms | links ms"


def sequences(found: dict[str, Any]) -> str:
    """The table of forms."""
    lines = []
    for row in found["rows"]:
        report, times = row["report"], row["report"]["model"]
        cells = [
            f"{row['length']:,}",
            str(row["kv_heads"]),
            row["form"],
            f"{report['memory']['peak'] / GIB:.1f}",
            f"{sum(each['sent'] for each in report['collectives'].values()) / GIB:.0f}",
            *(f"{1e3 * times[name]:.0f}" for name in ("compute", "interconnect")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    sent = {
        (row["length"], row["kv_heads"], row["form"]): sum(
            each["sent"] for each in row["report"]["collectives"].values()
        )
        for row in found["rows"]
    }
    more = [sent[key] / sent[*key[:2], "gather"] - 1 for key in sent if key[2] == "ring"]
    words = {"batch": sequence.BATCH, "more": (min(more), max(more)), "head": SEQUENCE}
    words["rule"] = " | ".join(["---"] * (SEQUENCE.count("|") + 1))
    return SEQUENCES.format(**words) + "\n".join(lines) + "\n"


def page() -> str:
    """The whole page."""
    found = pods.load()
    jobs = pods.jobs()
    about = {
        **found["versions"],
        "date": found["date"],
        "made": len(found["rows"]),
        "jobs": len(jobs),
    }
    text = HEAD.format(**about) + "\n" + paper(found) + "\n"
    text += memory(json.loads(memory_model.ROWS.read_text()))
    text += sequences(json.loads(sequence.ROWS.read_text()))
    if not scaling.ROWS.is_file():
        return text
    return text + scaled(json.loads(scaling.ROWS.read_text()))


if __name__ == "__main__":
    PAGE.write_text(page())
    if scaling.ROWS.is_file():
        draw(json.loads(scaling.ROWS.read_text()))
