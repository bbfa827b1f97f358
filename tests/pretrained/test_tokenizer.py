"""Tokenizers of a folder: special ids, templates in a sandbox, pairs."""

import json
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from dyncomp import pretrained
from dyncomp.core.errors import DyncompError
from dyncomp.pretrained.tokenizer import load_tokenizer

VOCAB = {"a": 0, "b": 1, "<s>": 2, "</s>": 3}


def backend(vocab=VOCAB):
    made = Backend(models.WordLevel(dict(vocab), unk_token="a"))
    made.add_special_tokens(["<s>", "</s>"])
    return made


def test_saved_and_loaded(tmp_path):
    template = (
        "{{ bos_token }}{{ messages[0]['content'] }}{% if add_generation_prompt %}>{% endif %}"
    )
    given = pretrained.Tokenizer(backend(), {"bos": "<s>", "eos": "</s>"}, template)
    given.save(tmp_path)
    found = load_tokenizer(tmp_path)
    assert (found.vocab_size, found.bos_id, found.eos_id, found.pad_id) == (4, 2, 3, None)
    assert found.chat([{"role": "user", "content": "x"}]) == "<s>x>"
    assert found.chat([{"role": "user", "content": "x"}], prompt=False) == "<s>x"
    assert found.decode([2, 1, 3]) == "b" and found.decode([2, 1], special=True) == "<s> b"


def test_what_configs_say(tmp_path):
    backend().save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).special == {}
    said = {"eos_token": {"content": "</s>"}, "bos_token": None, "chat_template": "one"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    found = load_tokenizer(tmp_path)
    assert (found.special, found.template) == ({"eos": "</s>"}, "one")
    said["chat_template"] = [
        {"name": "tool", "template": "x"},
        {"name": "default", "template": "y"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    assert load_tokenizer(tmp_path).template == "y"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_tokenizer(tmp_path).template == "file"


def test_none_and_damaged(tmp_path):
    assert load_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(DyncompError, match="is damaged"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__.__base__ }}{{ (1).__class__.mro() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no system role') }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ undefined.attribute }}",
        "{% broken",
    ],
)
def test_hostile_templates(template):
    """A template comes with the weights: it runs in a sandbox, and what it raises is one line."""
    tokenizer = pretrained.Tokenizer(backend(), template=template)
    with pytest.raises(DyncompError, match="chat template") as caught:
        tokenizer.chat([{"role": "user", "content": "x"}])
    assert "\n" not in str(caught.value)


def test_no_template():
    with pytest.raises(DyncompError, match="no chat template"):
        pretrained.Tokenizer(backend()).chat([])


def test_pairs():
    one, same = pretrained.Tokenizer(backend()), pretrained.Tokenizer(backend())
    pretrained.check_pair(one, same)
    other = pretrained.Tokenizer(backend({"b": 0, "a": 1, "<s>": 2, "</s>": 3}))
    with pytest.raises(DyncompError, match="differ in 2 tokens .first: 'a', ids 0 and 1"):
        pretrained.check_pair(one, other)

    def model(size, tokenizer):
        return SimpleNamespace(model=SimpleNamespace(vocab_size=size), tokenizer=tokenizer)

    pretrained.check_pair(model(4, one), model(4, same))
    pretrained.check_pair(model(4, None), model(4, None))
    with pytest.raises(DyncompError, match="4 and 8 logits"):
        pretrained.check_pair(model(4, one), model(8, same))
    with pytest.raises(DyncompError, match="only one of the models has a tokenizer"):
        pretrained.check_pair(model(4, one), model(4, None))
