"""Long texts and what is hidden in them, with a tokenizer of bytes."""

import json
import re

import numpy as np
import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.tasks.long_text import draw, key_values, long_documents, passkey


class Bytes:
    """A token a byte."""

    def encode(self, text):
        return list(text.encode())


def decoded(ids):
    return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("kind", ["prose", "code"])
def test_draws_have_their_length_and_their_documents(kind):
    one = draw(Bytes(), kind, 3000, np.random.default_rng(0))
    assert len(one) == 3000
    assert one == draw(Bytes(), kind, 3000, np.random.default_rng(0))
    assert one != draw(Bytes(), kind, 3000, np.random.default_rng(1))
    other = draw(Bytes(), kind, 3000, np.random.default_rng(0), "calibration")
    documents = [text.decode(errors="replace") for _, text in long_documents(kind)]
    line = lambda ids: max(decoded(ids).splitlines()[1:12], key=len)
    own = {n % 4 == 3 for n, text in enumerate(documents) if line(one) in text}
    calibration = {n % 4 == 3 for n, text in enumerate(documents) if line(other) in text}
    assert False in own and True in calibration


def test_a_key_is_hidden_and_asked_for():
    ids, last = passkey(Bytes(), list(b"x" * 900), 600, np.random.default_rng(3))
    text = decoded(ids)
    key = text[-last:]
    assert len(ids) == 600 and re.fullmatch(r"\d{5}", key)
    assert text.count(key) == 3 and text.endswith(f"The pass key is {key}")
    assert 0.05 < text.index(key) / 600 < 0.75
    with pytest.raises(DyncompError, match="filler"):
        passkey(Bytes(), [1] * 10, 600, np.random.default_rng(3))


def test_keys_and_values():
    ids = key_values(Bytes(), 700, np.random.default_rng(0))
    text = decoded(ids)
    body = text[text.index("{") : text.index("}")].rstrip(", ") + "}"
    pairs = json.loads(body)
    key = re.search(r'Key: "(\w+)"', text)[1]
    assert len(ids) <= 700 and len(pairs) > 5 and text.endswith(f'is: "{pairs[key]}"')
    with pytest.raises(DyncompError, match="too few"):
        key_values(Bytes(), 40, np.random.default_rng(0))
