"""The tokenizer of a GGUF file's metadata, rebuilt for the `tokenizers` library."""

import shutil
from pathlib import Path
from typing import Any

from dyncomp.core.errors import DyncompError
from dyncomp.pretrained.fields import Fields
from dyncomp.pretrained.tokenizer import Tokenizer

CONTROL, USER = 3, 4
"""Token types whose text is matched as a whole."""

_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "gpt-2": None,
    "smollm": "digits",
    "llama-bpe": _GPT4.replace("DIGITS", "{1,3}"),
    "qwen2": _GPT4.replace("DIGITS", ""),
}
"""What cuts a text before merging, by the file's name for it: GPT-2's rule, the same after single digits, a regex."""


def write_tokenizer(file: str, metadata: dict[str, Any], folder: Path, beside: Path | None) -> None:
    """Writes tokenizer.json and tokenizer_config.json; nothing where the file has no tokenizer.

    Args:
      file: name, for errors.
      metadata: key -> value.
      folder: where to.
      beside: a tokenizer.json to use instead of building one.

    Raises:
      DyncompError: a kind that we cannot rebuild.
    """
    said = Fields(metadata, file)
    tokens = said.get("tokenizer.ggml.tokens", list, [])
    if not tokens:
        return
    special = {}
    for name in ("bos", "eos", "padding", "unknown"):
        index = said.get(f"tokenizer.ggml.{name}_token_id", int, None)
        if index is not None and 0 <= index < len(tokens):
            special[{"padding": "pad", "unknown": "unk"}.get(name, name)] = tokens[index]
    if beside is not None:
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_file(str(beside))
    else:
        try:
            backend = _build(said, tokens, special)
        except DyncompError:
            raise
        except Exception as error:  # the library raises plain Exception for merges it can't use
            raise DyncompError(
                f"{file}: its tokenizer is damaged ({error}); fetch it again"
            ) from error
    template = said.get("tokenizer.chat_template", str, None)
    Tokenizer(backend, special, template).save(folder)
    if beside is not None:
        shutil.copy(beside, folder / "tokenizer.json")


def _build(said: Fields, tokens: list[str], special: dict[str, str]) -> Any:
    from tokenizers import AddedToken, decoders, models, processors
    from tokenizers import Tokenizer as Backend

    kind = said.get("tokenizer.ggml.model", str)
    pre = said.get("tokenizer.ggml.pre", str, "gpt-2")
    if kind != "gpt2" or pre not in SPLITS:
        raise DyncompError(
            f"{said.where}: tokenizer {kind!r} ({pre}) cannot be rebuilt (known: gpt2 with {', '.join(SPLITS)}); put"
            " the model's tokenizer.json beside the file"
        )
    merges = [tuple(pair.split(" ", 1)) for pair in said.get("tokenizer.ggml.merges", list)]
    vocab = {token: index for index, token in enumerate(tokens)}
    bpe = models.BPE(vocab=vocab, merges=merges, fuse_unk=False, ignore_merges=pre == "llama-bpe")
    backend = Backend(bpe)
    backend.pre_tokenizer = _splitter(pre)
    backend.decoder = decoders.ByteLevel()
    types = said.get("tokenizer.ggml.token_type", list, [])
    for index, found in enumerate(types[: len(tokens)]):
        if found in (CONTROL, USER):
            made = AddedToken(tokens[index], normalized=False, special=found == CONTROL)
            (backend.add_special_tokens if found == CONTROL else backend.add_tokens)([made])
    if said.get("tokenizer.ggml.add_bos_token", bool, False) and "bos" in special:
        bos = special["bos"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocab[bos])]
        )
    return backend


def _splitter(pre: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    split = SPLITS[pre]
    if split is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if split == "digits":
        first: Any = pre_tokenizers.Digits(individual_digits=True)
    else:
        first = pre_tokenizers.Split(Regex(split), "isolated", invert=False)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split == "digits")
    return pre_tokenizers.Sequence([first, level])
