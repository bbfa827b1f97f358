"""Prefill and decode with abstract shapes: sizes by hand, on simulated devices; what does not decode is refused."""

import functools
import re

import pytest

from dyncomp import models, tasks
from dyncomp.cli.main import main
from dyncomp.core.errors import DyncompError
from dyncomp.parallel import MeshSpec
from dyncomp.parallel.aot import Ask, compile_run, prepare
from dyncomp.training.optimizers import AdamW
from dyncomp.training.run import Run

from dyncomp import attention, experts  # isort: skip

LAYERS, WIDTH, WORDS, BATCH, SLOTS = 2, 32, 64, 8, 16
# q, k, v and out of 4 and 2 heads of 8, three matrices of 32 x 48, two norms; embedding, head and final norm
LAYER = (4 + 2 + 2 + 4) * 8 * WIDTH + 3 * WIDTH * 48 + 2 * WIDTH
PARAMETERS = LAYERS * LAYER + 2 * WORDS * WIDTH + WIDTH


@pytest.fixture(scope="module")
def run():
    mixer = functools.partial(attention.Attention, heads=4, kv_heads=2)
    unit = functools.partial(experts.SwiGLU, hidden=48)
    groups = [models.Group([functools.partial(models.Block, mixer=mixer, ffn=unit)], LAYERS)]
    model = models.DecoderLM(vocab_size=WORDS, d_model=WIDTH, groups=groups)
    task = tasks.CodeLM(context=SLOTS)
    return Run(
        model=model, task=task, optimizer=AdamW(learning_rate=1e-3), steps=1, batch_size=BATCH
    )


def test_a_decode_step_holds_parameters_and_cache(run, unchecked):
    report = compile_run(run, "cpu:4", MeshSpec(data=2, tensor=2), what="decode")
    assert (report.what, report.parameters, report.batch) == (
        "decode",
        PARAMETERS,
        {"tokens": (BATCH, 1)},
    )
    cache = LAYERS * 2 * BATCH * 2 * 8 * SLOTS * 4  # keys and values, two heads of 8, float32
    norms = (2 * LAYERS + 1) * WIDTH * 4
    weights = (4 * PARAMETERS - norms) // 2 + norms
    places = LAYERS * BATCH // 2 * SLOTS * 4
    assert report.state_bytes == pytest.approx(weights + cache // 4 + places, rel=0.01)
    assert report.memory.aliased >= cache // 4  # the cache is written in place
    assert report.ledger_flops is None and report.predicted == {}


def test_prefill_makes_the_cache(run, unchecked):
    report = compile_run(run, "cpu:4", MeshSpec(data=4), what="prefill", batch=4, length=8)
    assert report.batch == {"tokens": (4, 8)}
    assert report.memory.outputs >= LAYERS * 2 * 1 * 2 * 8 * 8 * 4
    products = report.work["product"].flops
    assert products >= 8 * 2 * (LAYERS * (LAYER - 2 * WIDTH))  # one sequence of 8 tokens a device


@pytest.mark.parametrize(
    ("change", "asked", "said"),
    [
        ({}, {"what": "decode", "batch": 6}, "batch size 6 is not a multiple of 4"),
        ({}, {"what": "prefill", "length": 1}, "--length 1"),
        ({}, {"what": "train", "length": 8}, "belong to --what prefill"),
        ({"model": "vit"}, {"what": "decode"}, "needs a models.DecoderLM, not VisionTransformer"),
    ],
)
def test_what_cannot_be_served(run, unchecked, change, asked, said):
    if change:
        groups = run.model.groups
        made = models.VisionTransformer(classes=10, patch=4, d_model=WIDTH, groups=groups)
        run = run.replace(model=made)
    with pytest.raises(DyncompError, match=said):
        prepare(run, Ask("cpu:4", **asked))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--minutes", "1"], "add --search"),
        (["--search", "--what", "decode"], "--search tries"),
        (["--no-code", "--mesh", "data=1", "--mesh", "fsdp=1"], "one config for one mesh"),
        (["--no-code", "--kernels"], "not together"),
        (["--topology", "h100:0"], "h100:0"),
        (["--mesh", "data=3"], "needs 3 devices|not a multiple"),
    ],
)
def test_words_that_do_not_go_together(words, said, capsys):
    topology = [] if "--topology" in words else ["--topology", "cpu:1"]
    assert main(["compile", "quickstart", *topology, *words]) == 1
    told = capsys.readouterr().err
    assert re.search(said, told) and told.count("\n") == 1
