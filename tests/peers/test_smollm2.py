"""The real SmolLM2-135M-Instruct (Q4_1, GGUF), where DYNCOMP_SMOLLM2 says where it is.

Numbers are of transformers and of a hand-written PyTorch forward on the same file. A plausible sentence proves nothing:
with the rows of q and k in the wrong order the model still names Paris, and only its likelihood of code falls apart.
"""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp import models, pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not pretrained.smollm2(), reason="DYNCOMP_SMOLLM2 is not set"),
]

CODE = '''\
def bisect_right(a, x, lo=0, hi=None, *, key=None):
    """Return the index where to insert item x in list a, assuming a is sorted.

    The return value i is such that all e in a[:i] have e <= x, and all e in
    a[i:] have e > x.  So if x already appears in the list, a.insert(i, x) will
    insert just after the rightmost x already there.

    Optional args lo (default 0) and hi (default len(a)) bound the
    slice of a to be searched.

    A custom key function can be supplied to customize the sort order.
    """

    if lo < 0:
        raise ValueError('lo must be non-negative')
    if hi is None:
        hi = len(a)
    # Note, the comparison uses "<" to match the
    # __lt__() logic in list.sort() and in heapq.
    if key is None:
        while lo < hi:
            mid = (lo + hi) // 2
            if x < a[mid]:
                hi = mid
            else:
                lo = mid + 1
    return lo
'''

NATS = 2.32154
"""Nats a token on CODE, by transformers."""


@pytest.fixture(scope="module")
def loaded():
    return pretrained.load(pretrained.smollm2())


@pytest.fixture(scope="module")
def apply(loaded):
    return jax.jit(functools.partial(models.apply, loaded.model.clone(layers="scan")))


@pytest.fixture(scope="module")
def theirs(loaded, tmp_path_factory):
    """transformers on what we export."""
    folder = tmp_path_factory.mktemp("exported")
    pretrained.export(folder, loaded.model, loaded.variables["params"], loaded.tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def nats(logits, ids):
    logp = jax.nn.log_softmax(jnp.asarray(logits)[0, :-1])
    return -float(jnp.mean(jnp.take_along_axis(logp, jnp.asarray(ids)[0, 1:, None], axis=1)))


def test_sizes_and_ids(loaded):
    sizes = [leaf.size for leaf in jax.tree.leaves(loaded.variables)]
    assert sum(sizes) == 134_515_008
    encode = loaded.tokenizer.encode
    assert encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert encode("def f(x):\n    return x + 10\n") == [
        *(1604, 275, 24, 104, 727, 472, 1003, 1792, 1232, 216, 33, 32, 198)
    ]
    chat = loaded.tokenizer.chat([{"role": "user", "content": "Q"}])
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n")
    assert encode(chat)[:2] == [1, 9690] and loaded.eos_ids == (2,)
    text = "naïve — 😀\r\n\tx = 1234  # <|im_end|>"
    assert loaded.tokenizer.decode(encode(text), special=True) == text


def test_recorded_numbers(loaded, apply):
    """Logits of the prompt's last token by transformers on the GGUF file itself: Paris, the, London, Le, New."""
    ids = jnp.asarray([loaded.tokenizer.encode("The capital of France is")], jnp.int32)
    last = np.asarray(apply(loaded.variables, ids)[0])[0, -1]
    best = np.argsort(-last)[:5]
    assert [loaded.tokenizer.decode([i]) for i in best] == [
        *(" Paris", " the", " London", " Le", " New")
    ]
    np.testing.assert_allclose(last[best], [17.371, 14.889, 13.245, 13.009, 12.952], rtol=1e-3)


def test_likelihood_of_code(loaded, apply, theirs):
    """Against transformers on our export, and far from what rows in the wrong order would give."""
    ids = np.asarray([loaded.tokenizer.encode(CODE)])
    logits = np.asarray(apply(loaded.variables, jnp.asarray(ids, jnp.int32))[0])
    model, tokenizer = theirs
    assert tokenizer(CODE)["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)
    assert (logits.argmax(-1) == expected.argmax(-1)).all()
    assert nats(expected, ids) == pytest.approx(NATS, rel=1e-4)
    assert nats(logits, ids) == pytest.approx(NATS, rel=1e-4)


def test_the_documents_example(capsys):
    page = (Path(__file__).parents[2] / "docs" / "pretrained.md").read_text()
    (code,) = re.findall(r"^```py\n(.*?)^```$", page, re.S | re.M)
    exec(code, {})
    assert capsys.readouterr().out == " Paris\n"


def test_rows_in_the_wrong_order_would_show(loaded, apply):
    """The loader's own trap: interleaved q and k still say Paris, and cost two nats a token on code."""
    params = jax.tree.map(lambda x: x, loaded.variables["params"])
    mixer = params["group_0"]["layers"]["block_0"]["mixer"]
    for name in ("q", "k"):
        halves = mixer[name].reshape(*mixer[name].shape[:-1], 2, -1)
        mixer[name] = jnp.swapaxes(halves, -1, -2).reshape(mixer[name].shape)
    prompt = jnp.asarray([loaded.tokenizer.encode("The capital of France is")], jnp.int32)
    last = apply({"params": params}, prompt)[0][0, -1]
    assert loaded.tokenizer.decode([int(last.argmax())]) == " Paris"
    ids = jnp.asarray([loaded.tokenizer.encode(CODE)], jnp.int32)
    assert nats(apply({"params": params}, ids)[0], ids) > NATS + 1.5
