"""Writes docs/benchmarks.md from the JSON files beside this one: ``python docs/bench/page.py``."""

import json
from pathlib import Path

from dyncomp.bench import remark

HERE = Path(__file__).parent
PAGE = HERE.parent / "benchmarks.md"
HEAD = """# Benchmarks

Written by `docs/bench/page.py` from `docs/bench/*.json`, each the output of `dyncomp bench NAME --json`. A ratio is
what its reference says; intervals cover 95%. A verdict is "holds" or "does not hold" only where the whole interval is
on one side of the goal. Figures of one machine on one day: make your own before you rely on them.
"""
VERDICTS = {True: "holds", False: "does not hold", "unresolved": "unresolved", None: ""}


def number(value):
    """Four significant digits."""
    return "" if value is None else f"{value:.4g}"


def line(row):
    """One row of a table."""
    interval = " to ".join(map(number, row["interval"])) if row["interval"] else ""
    asked = "" if row["goal"] is None else f"{row['relation']} {number(row['goal'])}"
    if "goal" in row["relation"]:
        asked = row["relation"].replace("goal", number(row["goal"]))
    cells = (f"`{row['id']}`", number(row["ratio"]), interval, asked, VERDICTS[row["holds"]])
    return "| " + " | ".join(cells) + f" | {row['runs']} |"


def section(result):
    """A bench: where it ran, its rows, what the ratios are."""
    made = result["environment"]
    versions = ", ".join(f"{name} {made['versions'][name]}" for name in ("jax", "flax", "optax"))
    dirty = " with changes" if made["dirty"] else ""
    text = f"{made['cpu']}, {made['cores']} cores, Python {made['python']}, {versions}; {made['date']}, "
    references = dict.fromkeys(row["reference"] for row in result["rows"])
    return "\n".join(
        [
            f"## {result['bench']}\n",
            f"`dyncomp bench {result['bench']}`. {text}revision {made['revision'][:12]}{dirty}."
            f" {result.get('note', '')}".rstrip()
            + "\n",
            "| row | ratio | interval | asked | verdict | runs |",
            "| --- | --- | --- | --- | --- | --- |",
            *map(line, result["rows"]),
            "\nRatios:",
            *(f"- {reference}" for reference in references),
            "",
            *_waits([row for row in result["rows"] if "ours_p95" in row]),
            *_warm([row for row in result["rows"] if "warm_up_seconds" in row]),
            *_remarks(result["rows"]),
        ]
    )


def _waits(rows):
    """Percentiles of latencies."""
    if not rows:
        return []
    cell = lambda row, side: " / ".join(f"{1e3 * row[f'{side}_p{q}']:.0f}" for q in (50, 95, 99))  # noqa: E731
    return [
        "Milliseconds from arrival to output, p50 / p95 / p99:\n",
        "| row | arrivals a second | stream | fixed depth |",
        "| --- | --- | --- | --- |",
        *(
            f"| `{row['id']}` | {row['arrivals_a_second']:.0f} | {cell(row, 'ours')} | {cell(row, 'peer')} |"
            for row in rows
        ),
        "",
    ]


def _warm(rows):
    """What was compiled."""
    return [
        f"`{row['id']}`: {row['programs']} programs compiled in {row['warm_up_seconds']:.0f} s of warm-up, "
        f"{row['compiled_after_warm_up']} after it.\n"
        for row in rows
    ]


def _remarks(rows):
    """Bounds of savings, and where time goes."""
    told = [(row["id"], remark(row).removeprefix("; ")) for row in rows if remark(row)]
    return [*(f"- `{name}`: {said}" for name, said in told), ""] if told else []


def gpus(result):
    """What `gpus.py`, or the bench of sparse attention, printed on one machine."""
    if "models" in result:
        return _models(result)
    if "attention" in result:
        return _attention(result)
    if "sparse_registers" in result:
        return _registers(result)
    if "grouped" in result:
        return _grouped(result)
    if "checks" in result:
        return _checked(result)
    text = f"## {result['gpus']} x {result['gpu']}\n\n`python docs/bench/gpus.py`, jax {result['jax']}.\n"
    return "\n".join([text, *(_exchanges(result) if "layer" in result else _products(result)), ""])


def _attention(result):
    cell = lambda row, key: f"{row[key]:.2f}" if key in row else ""  # noqa: E731
    return "\n".join(
        [
            f"## Sparse attention on {result['gpus']} x {result['gpu']}\n",
            f"`python -m dyncomp_kernels.sparse_attention.bench_gpu`, run on the device: jax {result['jax']},",
            f"PyTorch {result['torch']}, driver {result['driver']}, {result['date']}. Causal, bfloat16, head 128, 16",
            "query heads on 4 key/value heads, blocks of 128; milliseconds. Ideal: cuDNN's dense time (through JAX)",
            "times the share of causal blocks. `sdpa` and `flex` are PyTorch's, the latter with the same block masks.",
            "A program computes as many problems as have 32,768 queries, so that the GPU does not wait for the host;"
            " gradients are",
            f"those of a given cotangent. `sdpa` and `flex` are of {result['rivals_date']}, call by call. `selfcheck`"
            " on the same",
            f"device, before the last change of barriers in the kernel of queries: outputs and gradients of"
            f" {result['checked']['problems']}",
            f"problems within {result['checked']['worst']} of the largest number, of float64.\n",
            "| length | form | share | forward | with gradients | of ideal, forward | of ideal, with gradients |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *(
                f"| {row['length']} | {row['form']} | {row['share']:.3f} | {cell(row, 'forward_ms')} | "
                f"{cell(row, 'both_ms')} | {cell(row, 'forward_ms_of_ideal')} | {cell(row, 'both_ms_of_ideal')} |"
                for row in result["attention"]
                if "share" in row
            ),
            *_short(result),
            "",
        ]
    )


def _registers(result):
    """What `sparse_registers.py` printed."""
    return "\n".join(
        [
            "## Sparse attention's Hopper kernels, compiled only\n",
            f"`python docs/bench/sparse_registers.py`, jax {result['jax']}, {result['date']}: what ptxas says for an",
            f"H100. {result['limit']:,} bytes of shared memory are the limit; registers are a mean, as the warpgroups",
            "that multiply take 240 and the one that copies 24.\n",
            "| head | block | kernel | registers | bytes spilled | shared memory |",
            "| --- | --- | --- | --- | --- | --- |",
            *(
                f"| {row['head']} | {row['rows']} x {row['columns']} | {row['kernel'].replace('_', ' ')} |"
                f" {row['registers']} | {row['spilled']} | {row['shared']:,} |"
                for row in result["sparse_registers"]
            ),
            "",
        ]
    )


def _short(result):
    """Where the time goes at 8,192 tokens."""
    at = [row for row in result["attention"] if row["length"] == 8192]
    ours = next(row for row in at if row["form"] == "ours" and row["share"] > 0.1)
    again = result["dense_8192"]
    shares = " and ".join(f"{x * ours['share'] / ours['forward_ms']:.2f}" for x in again)
    times = " and ".join(f"{x:.3f}" for x in again)
    spent = result["profile"]["us"]
    kernels = [
        spent[name] for name in ("forward", "gradient of keys and values", "gradient of queries")
    ]
    base = next(row for row in at if row["form"] == "cudnn")
    ideal, before = 1e3 * base["both_ms"] * ours["share"], result["before_ms"]
    after = " and ".join(f"{x:.3f}" for x in before["after"])
    return [
        f"\nAt 8,192 tokens cuDNN's dense forward pass took {times} ms in two runs of the day before: by these the"
        f" share at {ours['share']:.3f}",
        f"is {shares}. With gradients the three kernels alone take {sum(kernels):.0f} of {sum(spent.values()):.0f}"
        f" microseconds (profiler, before the sums of outputs times cotangents moved into the kernel of queries),",
        f"and {ideal:.0f} would be ideal; what else runs does not follow the lists:\n",
        "| part | microseconds |",
        "| --- | --- |",
        *(f"| {name} | {value:.0f} |" for name, value in spent.items()),
        "\nThe longest list of queries that read a tile of keys is longer there than a multiprocessor's share of all;"
        " so each",
        "tile is worked on in two parts, added up afterwards; milliseconds with gradients of other ways, then:\n",
        "| tiles of keys | ms |",
        "| --- | --- |",
        *(f"| {name} | {value:.3f} |" for name, value in result["key_tiles"].items()),
        f"\nMoving those sums made {before['before']:.3f} ms {after}, one after the other on one machine.",
    ]


PARTS = ("forward", "row gradient", "weight gradient")


def _checked(result):
    suite = result["suite"]
    return "\n".join(
        [
            f"## Kernels against float64 on 1 x {result['gpu']}\n",
            f"`{result['command']}`, run on the device part by part: jax {result['jax']}, driver {result['driver']},",
            f"{result['date']}. Largest error of values and, but for decoding, gradients, of the largest number of its",
            "array, over random problems. Forms without a row of full float32 were not run in it; the Hopper forms",
            "and cuDNN's attention take none.\n",
            "| form | numbers | problems | largest error |",
            "| --- | --- | --- | --- |",
            *(
                f"| {row['form']} | {row['numbers']} | {row['problems']} | {row['worst']:.1e} |"
                for row in result["checks"]
            ),
            f"\nThe test suite on the CPUs of that machine, {suite['date']}, stopped after {suite['seconds']} seconds",
            f"(`{suite['command']}`; Python {suite['python']}, jax",
            f"{suite['jax']}, flax {suite['flax']}, optax {suite['optax']}, orbax {suite['orbax']}, numpy"
            f" {suite['numpy']}): {suite['passed']:,} passed,",
            f"{suite['skipped']} skipped, {suite['failed']} failed, {suite['left']} had not ended. Ten failed for a"
            " parameter of scans that jax 0.11 has not,",
            "three because XLA ends a process for a flag that jaxlib 0.11 no longer knows; four, and a file that was"
            " not read, for",
            "want of the package itself and of nbformat among what was installed. The thirteen were repaired since and"
            " pass with",
            "jax 0.11.2 on another machine.",
            "",
        ]
    )


def _grouped(result):
    """What `grouped_gpu.py` printed."""
    rate = lambda row, part, form: 2e-9 * result["rows"] * row["k"] * row["n"] / row[part][form]  # noqa: E731
    share = lambda row, parts: (
        sum(row[p]["dense"] for p in parts) / sum(row[p]["ours"] for p in parts)
    )  # noqa: E731
    forms, peer = ("dense", "ours", "torch dense", "torch", "tokamax"), result["tokamax_earlier"]
    size = lambda row: tuple(row[key] for key in ("k", "n", "experts"))  # noqa: E731
    other = {size(row): row for row in peer["products"]}
    for row in result["products"]:
        for part in PARTS:
            row[part]["tokamax"] = other[size(row)][part]
    cell = lambda row, part, form: f"{rate(row, part, form):.0f}" if form in row[part] else ""  # noqa: E731
    line = lambda row, load: [  # noqa: E731
        f"| {row['k']} x {row['n']} | {row['experts']} | {load} | {part} | "
        + " | ".join(cell(row, part, form) for form in forms)
        + f" | {share(row, (part,)):.2f} |"
        for part in PARTS
    ]
    total = lambda row, load: (  # noqa: E731
        f"| {row['k']} x {row['n']} | {row['experts']} | {load} | all three |  |  |  |  |  | {share(row, PARTS):.2f} |"
    )
    loads = (("products", "Dirichlet(4)"), ("one_expert", "one expert"))
    tiles = ", ".join(
        f"{part} {' x '.join(map(str, size[:3]))}" for part, size in peer["tiles"].items()
    )
    return "\n".join(
        [
            f"## Grouped products of a large layer on 1 x {result['gpu']}\n",
            f"`{result['command']}`, run on the device: jax {result['jax']}, PyTorch {result['torch']},"
            f" driver {result['driver']},",
            f"{result['date']}. {result['rows']:,} rows (16,384 tokens of two choices), bfloat16, TFLOP/s; dense: one"
            " product of equal FLOPs, cuBLAS",
            "through JAX and through PyTorch; torch: `grouped_mm`; tokamax: `ragged_dot` of version"
            f" {peer['version']}, in an earlier run of {peer['date']}",
            f"on one {peer['gpu']}, fastest of six tiles tried at the first row ({tiles}).",
            "Share: of dense through JAX, in time; asked: 0.85.",
            f"Samples of the results against float64: within {max(row['error'] for row in result['products']):.4f} of"
            " the largest number.\n",
            "| matrix | experts | load | product | dense | ours | torch dense | torch | tokamax | share |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
            *(
                text
                for name, load in loads
                for row in result[name]
                for text in (*line(row, load), total(row, load))
            ),
            *_limits(result["limits"]),
            "\nThe two tables below are of an earlier run of the day, before group after group.",
            f"\nOne row an expert: TB/s of the weights, {result['bandwidth'] / 1e12:.2f} as a large matrix-vector"
            " product reads:\n",
            "| matrix | experts | product | ours | torch |",
            "| --- | --- | --- | --- | --- |",
            *(
                f"| {row['k']} x {row['n']} | {row['experts']} | {part} | "
                + " | ".join(
                    f"{row['bytes'] / row[part][form] / 1e9:.2f}" for form in ("ours", "torch")
                )
                + " |"
                for row in result["one_row"]
                for part in PARTS
            ),
            "\nSwiGLU experts of that size, forward and all gradients, Dirichlet(4) load, beside a dense unit:\n",
            "| experts | ms dense | ms ours | share |",
            "| --- | --- | --- | --- |",
            *(
                f"| {row['experts']} | {row['dense']:.1f} | {row['ours']:.1f} | {row['dense'] / row['ours']:.2f} |"
                for row in result["swiglu"]
            ),
            "",
        ]
    )


def _limits(found):
    """What bounds many experts."""
    span = lambda values: f"{min(values):,} to {max(values):,}"  # noqa: E731
    read, written = found["read_gb"], found["written_gb"]
    return [
        f"\nWhat bounds {found['experts']} experts: over seconds all products run at the GPU's limit of power"
        f" (`nvidia-smi`: ours {span(found['watts']['ours'])} W",
        f"at {span(found['mhz']['ours'])} MHz, dense {span(found['watts']['dense'])} W at"
        f" {span(found['mhz']['dense'])} MHz; its maximum is 700 W). What costs energy costs time:",
        f"whole tiles of 128 rows multiply {found['rows_of_tiles'] / found['rows']:.3f} rows for each, steps of 64 rows"
        f" {64 * found['steps_of_weight_gradient'] / found['rows']:.3f} in weight gradients, which write",
        f"{written['weight gradient']:.1f} GB, {written['weight gradient'] / found['tb_a_second']:.1f} ms of the"
        f" memory's time. Before the products went group after group, {found['k']} x {found['n']}, their weights of"
        f" {found['weights_gb']:.1f} GB cost",
        f"{read['forward']:.1f} GB read forward and {read['row gradient']:.1f} in the row gradient"
        f" (`{found['command']}`); since then it was not read again.",
    ]


def _models(result):
    """What `models_gpu.py` printed."""
    head = (
        f"## Models on 1 x {result['gpu']}\n\n`python docs/bench/models_gpu.py`, run on the device part by part: "
        f"jax {result['jax']}, driver {result['driver']}, {result['date']};\nmixtures {result['date_experts']}, "
        f"the larger network with exits {result['date_exits']}. Backbone: d 2048, "
        "32 heads of 64 on 8 key/value heads, 32,768 tokens of vocabulary, random weights and tokens.\n"
    )
    checked = result["attention"]
    head += (
        f"\nAttention by cuDNN in the layer, bfloat16, against the plain form in float32, largest difference of the "
        f"largest number:\noutputs {checked['outputs']:.4f}, gradients of parameters {checked['gradients']:.4f}.\n"
    )
    parts = (("train", _trained), ("experts", _mixtures), ("decode", _decoded), ("exits", _left))
    return "\n".join([head, *(line for name, told in parts for line in told(result[name])), ""])


def _trained(rows):
    return [
        "Train steps (AdamW, float32 parameters, bfloat16 arithmetic, 2,048 tokens a row), 16 layers of 8,192 hidden",
        f"units, {rows[0]['parameters'] / 1e9:.2f} billion parameters; MFU: FLOPs that the plan needs (three forward",
        "passes, half the square of attention, nothing for recomputation) over seconds and 989 TFLOP/s:\n",
        "| kept for the backward pass | rows | ms a step | tokens/s | MFU |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {'everything' if row['remat'] == 'none' else 'products'} | {row['batch']} | "
            f"{1e3 * row['seconds']:.0f} | {row['tokens_a_second']:,.0f} | {row['mfu']:.3f} |"
            for row in rows
        ),
        "",
    ]


def _mixtures(rows):
    return [
        "Train steps of four layers, eight experts of 4,096 hidden units (Hopper bank), 8 rows of 2,048 tokens;",
        "dense: 8,192 hidden units. Realised: (seconds dense / seconds) / (FLOPs dense /",
        "FLOPs needed). Parameters of all experts pass through AdamW, which the dense network spares:\n",
        "| form | ms a step | tokens/s | FLOPs of dense | realised |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {row['form']} | {1e3 * row['seconds']:.0f} | {row['tokens_a_second']:,.0f} | "
            f"{row['flops'] / rows[0]['flops']:.2f} | {row['realised']:.2f} |"
            for row in rows
        ),
        "",
    ]


def _decoded(rows):
    return [
        "Greedy decoding in bfloat16, 16 layers as above; share: (bytes of weights and cache / bandwidth) / seconds of",
        f"a step, bandwidth {rows[0]['bandwidth'] / 1e12:.2f} TB/s as a large matrix-vector product reads:\n",
        "| batch | context | ms a step | tokens/s | share |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {row['batch']} | {row['context']} | {1e3 * row['seconds']:.2f} | {row['tokens_a_second']:,.0f} | "
            f"{row['share']:.2f} |"
            for row in rows
        ),
        "",
    ]


def _left(rows):
    about = {"wide": "7 blocks, d 256, 50 tokens", "large": "6 blocks, d 1024, 197 tokens"}
    return [
        "The host executor of `dyncomp bench exits`, batch 256, confidence, vision transformers in float32, against",
        "the full network as one program; the larger one with `tune`, which the smaller one was run before:\n",
        "| network | realised | interval | ms with exits | ms full |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {about[row['id'].split('/')[1]]} | {row['ratio']:.2f} | "
            f"{' to '.join(map(number, row['interval'] or ()))} | "
            f"{1e3 * row['median_ours']:.1f} | {1e3 * row['median_peer']:.1f} |"
            for row in rows
        ),
        "",
    ]


def _products(result):
    checked, spills = result["checked"], result["spills"]
    rates = lambda row, form: " / ".join(f"{rate:.0f}" for rate in row[form])  # noqa: E731
    return [
        f"Hopper form on {checked['problems']} problems: largest error of value and gradients {checked['worst']:.4f}",
        "of the array's largest number (bfloat16).",
        "Run before the Hopper form had tiles of 128 x 256, which widths in multiples of 256 use since.",
        f"{spills['kernels']} kernels, at most {spills['registers']} registers, {spills['bytes']} bytes spilled.\n",
        "TFLOP/s of one grouped product, Dirichlet(4) load, bfloat16, forward / forward and backward; dense is one",
        "product of equal FLOPs:\n",
        "| rows x d x f | groups | dense | Hopper form | portable loop |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {row['rows']} x {row['inner']} x {row['columns']} | {row['groups']} | {rates(row, 'dense')} | "
            f"{rates(row, 'hopper')} | {rates(row, 'portable')} |"
            for row in result["products"]
        ),
    ]


def _exchanges(result):
    return [
        "A layer of 64 experts, six a row, 32,768 rows in all, d 2048, f 1408, bfloat16, Hopper bank; differences are",
        "of a small float32 layer to one device:\n",
        "| exchange | forward ms | gradients ms | difference of outputs | of gradients |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {row['exchange']} | {row['forward_ms']:.1f} | {row['gradients_ms']:.1f} | {apart['output']:.1g} | "
            f"{apart['gradients']:.1g} |"
            for row, apart in zip(result["layer"], result["differences"], strict=True)
        ),
    ]


def tpus(result):
    """What `tpu.py`, or `schedule` of sparse attention, read in the compiler's schedules."""
    if "schedule" in result:
        return _schedule(result)
    m, k, n, e = result["shape"].values()
    ratio = lambda row: "" if row["flop_ratio"] is None else f"{row['flop_ratio']:.3f}"  # noqa: E731
    return "\n".join(
        [
            "## TPUs, compiled only\n",
            f"`python docs/bench/tpu.py`. Grouped product of {m} x {k} x {n}, {e} groups, bfloat16. FLOPs counted over",
            "the ideal; bundles (cycles) of the kernel's main region and the share of matrix slots filled.\n",
            "| chip | kernel | FLOP ratio | bundles | matrix slots |",
            "| --- | --- | --- | --- | --- |",
            *(
                f"| {row['chip']} | {row['kernel']} | {ratio(row)} | {row['bundles']} | {row['matrix_slots']:.2f} |"
                for row in result["rows"]
            ),
            "",
        ]
    )


def _schedule(result):
    """Sparse attention with all causal blocks beside `splash_attention`."""
    return "\n".join(
        [
            "## Sparse attention on TPUs, compiled only\n",
            f"`{result['command']}`, {result['date']}:",
            "all causal blocks in tiles of 512 by 512, heads of 128, bfloat16, beside jax's `splash_attention` with",
            "the same tiles, which masks all of them. Bundles (cycles) and spilled registers of a tile, and the share",
            "of the matrix units' slots that its loop fills.\n",
            "| chip | kernel | tile | bundles | spills | matrix slots |",
            "| --- | --- | --- | --- | --- | --- |",
            *(
                f"| {row['chip']} | {row['kernel']} | {row['tile']} | {row['bundles']:.0f} | {row['spills']:.0f} |"
                f" {row['fill']:.2f} |"
                for row in result["schedule"]
            ),
            "",
        ]
    )


def page():
    """The whole page."""
    read = lambda pattern: [json.loads(path.read_text()) for path in sorted(HERE.glob(pattern))]  # noqa: E731
    return "\n".join(
        [
            HEAD,
            *map(section, read("*.json")),
            *map(gpus, read("gpus/*.json")),
            *map(tpus, read("tpus/*.json")),
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page())
