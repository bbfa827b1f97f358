"""Tokenizers: bytes (256 symbols) and byte-level BPE trained on the training split only."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Int

TokenizerKind = Literal["bytes", "bpe"]
BYTES = 256
Tokens = Sequence[int] | Int[np.ndarray, "n"]


def _byte_symbols() -> dict[str, int]:
    """Byte-level BPE's printable stand-ins (GPT-2): printable Latin-1 stands for itself, the rest from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(BYTES) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(BYTES + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_symbols()


class ByteTokenizer:
    """One token a byte."""

    vocab_size = BYTES

    def encode(self, content: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 [n] and how many bytes each covers int32 [n]."""
        tokens = np.frombuffer(content, np.uint8).astype(np.int32)
        return tokens, np.ones_like(tokens)

    def pieces(self, tokens: Tokens) -> list[bytes]:
        """The bytes of each token."""
        return [bytes([int(token)]) for token in tokens]

    def decode(self, tokens: Tokens) -> str:
        """Text of tokens; invalid UTF-8 is replaced."""
        return bytes(int(t) for t in tokens).decode("utf-8", "replace")


class BPETokenizer:
    """Byte-level byte-pair encoding through the `tokenizers` library.

    Attributes:
      model: a trained `tokenizers.Tokenizer`.
    """

    def __init__(self, model: Any):
        self.model = model
        self.vocab_size = model.get_vocab_size()

    @classmethod
    def train(cls, contents: Iterable[bytes], vocab_size: int) -> "BPETokenizer":
        """Trains on given documents; deterministic."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        if vocab_size <= BYTES:
            raise DyncompError(f"vocab_size={vocab_size}: byte-level BPE needs more than {BYTES}")
        model = Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=sorted(alphabet), show_progress=False
        )
        texts = (content.decode("utf-8", "replace") for content in contents)
        model.train_from_iterator(texts, trainer)
        return cls(model)

    @classmethod
    def load(cls, path: Path) -> "BPETokenizer":
        """Reads a saved tokenizer."""
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_file(str(path)))

    def save(self, path: Path) -> None:
        """Writes the tokenizer as JSON."""
        self.model.save(str(path))

    def encode(self, content: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 [n] and how many UTF-8 bytes each covers int32 [n]; the bytes add up to the document's."""
        found = self.model.encode(content.decode("utf-8", "replace"))
        # In byte-level BPE every character of a token's surface stands for one byte.
        widths = np.asarray([len(piece) for piece in found.tokens], np.int32)
        return np.asarray(found.ids, np.int32), widths

    def pieces(self, tokens: Tokens) -> list[bytes]:
        """The bytes of each token."""
        surfaces = [self.model.id_to_token(int(token)) for token in tokens]
        return [bytes(_BYTE_OF[symbol] for symbol in surface) for surface in surfaces]

    def decode(self, tokens: Tokens) -> str:
        """Text of tokens."""
        return self.model.decode([int(t) for t in tokens])
