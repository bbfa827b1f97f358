"""Tokenizers of published models: text to ids and back, special ids, chat templates."""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dyncomp.core.errors import DyncompError
from dyncomp.pretrained.fields import read_json


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers.Tokenizer` with what the model's files say about it.

    Attributes:
      backend: the `tokenizers.Tokenizer`.
      special: the strings for "bos", "eos", "pad" and "unk", those there are.
      template: the chat template (jinja2), or None.
    """

    backend: Any
    special: Mapping[str, str] = dataclasses.field(default_factory=dict)
    template: str | None = None

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with what the model wants around it (such as a BOS, unless the text starts with it)."""
        begins = bool(self.special.get("bos")) and text.startswith(self.special["bos"])
        return self.backend.encode(text, add_special_tokens=not begins).ids

    def decode(self, ids: Iterable[Any], *, special: bool = False) -> str:
        """Text of ids; special tokens are left out unless asked for."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=not special)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's may be larger (padded)."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def _id(self, name: str) -> int | None:
        token = self.special.get(name)
        return None if token is None else self.backend.token_to_id(token)

    @property
    def bos_id(self) -> int | None:
        """Id of the token that begins a text."""
        return self._id("bos")

    @property
    def eos_id(self) -> int | None:
        """Id of the token that ends a text."""
        return self._id("eos")

    @property
    def pad_id(self) -> int | None:
        """Id of the padding token."""
        return self._id("pad")

    def chat(self, messages: Sequence[Mapping[str, str]], *, prompt: bool = True) -> str:
        """The text of a conversation, by the model's own template.

        Args:
          messages: each with "role" and "content".
          prompt: end where the assistant's answer begins.

        Raises:
          DyncompError: no template, or the template refuses the messages.
        """
        if self.template is None:
            raise DyncompError("this model has no chat template; write the prompt yourself")
        try:
            compiled = _compile(self.template)
            tokens = {f"{name}_token": token for name, token in self.special.items()}
            listed = [dict(message) for message in messages]
            return compiled.render(messages=listed, add_generation_prompt=prompt, **tokens)
        except DyncompError:
            raise
        except Exception as error:  # a template is foreign code: it may raise anything
            raise DyncompError(
                f"the model's chat template refuses these messages: {error}"
            ) from error

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json."""
        self.backend.save(str(folder / "tokenizer.json"))
        said: dict[str, Any] = {f"{name}_token": token for name, token in self.special.items()}
        said["tokenizer_class"] = "PreTrainedTokenizerFast"
        if self.template is not None:
            said["chat_template"] = self.template
        (folder / "tokenizer_config.json").write_text(json.dumps(said, indent=1))


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    """A template in a sandbox: it comes with the weights, so it may not touch anything but its arguments."""
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise DyncompError("chat templates need jinja2: pip install 'dyncomp[llm]'") from error

    def refuse(message: str) -> None:
        raise DyncompError(f"the model's chat template refuses these messages: {message}")

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(raise_exception=refuse)  # type: ignore[call-overload]
    environment.filters["tojson"] = lambda value, **options: json.dumps(
        value, ensure_ascii=False, **options
    )
    return environment.from_string(template)


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder, None where it has no tokenizer.json.

    Raises:
      DyncompError: tokenizer.json is damaged.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise DyncompError(f"{path} is damaged ({error}); fetch it again") from error
    said = read_json(folder / "tokenizer_config.json")
    special = {n: t for n in ("bos", "eos", "pad", "unk") if (t := _text(said.get(f"{n}_token")))}
    jinja = folder / "chat_template.jinja"
    template = jinja.read_text(encoding="utf-8") if jinja.is_file() else said.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {t["name"]: t["template"] for t in template if isinstance(t, dict)}
        template = named.get("default")
    return Tokenizer(backend, special, template if isinstance(template, str) else None)


def _text(token: Any) -> str | None:
    """A special token, said as a string or as an object with its content."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def check_pair(a: Any, b: Any) -> None:
    """Refuses two models (or tokenizers) that do not mean the same by a token id.

    Args:
      a, b: results of `load`, or `Tokenizer`s.

    Raises:
      DyncompError: the vocabularies differ, in size or in any token.
    """
    sizes = [x.model.vocab_size for x in (a, b) if hasattr(x, "model")]
    fix = "pair two models of one family, with one tokenizer"
    if len(set(sizes)) > 1:
        raise DyncompError(f"the models have {sizes[0]} and {sizes[1]} logits; {fix}")
    one, two = (x if isinstance(x, Tokenizer) else x.tokenizer for x in (a, b))
    if (one is None) != (two is None):
        raise DyncompError(f"only one of the models has a tokenizer; {fix}")
    if one is None or two is None:
        return
    first, second = one.backend.get_vocab(True), two.backend.get_vocab(True)
    if first != second:
        different = [t for t in {**first, **second} if first.get(t) != second.get(t)]
        shown = min(different)
        raise DyncompError(
            f"the tokenizers differ in {len(different)} tokens (first: {shown!r}, ids {first.get(shown)} and"
            f" {second.get(shown)}); {fix}"
        )
