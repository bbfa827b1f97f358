"""Language modelling on the standard library's source (embedded), on local text, or on a hub data set."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.core.metrics import Mean
from dyncomp.tasks import corpus
from dyncomp.tasks.base import Split, Task, check_split
from dyncomp.tasks.cache import cache_root, cached_folder, load_table, rows, save_table
from dyncomp.tasks.hub import load_hub
from dyncomp.tasks.objectives import LMObjective, answer_of, at_answers, token_nll
from dyncomp.tasks.tokens import BPETokenizer, ByteTokenizer, TokenizerKind

FORMAT = 2
LOG2E = 1.4426950408889634


@dataclasses.dataclass(frozen=True)
class WindowSource:
    """Windows of context + 1 tokens from a memory-mapped Arrow table, a `datasets.Dataset`."""

    table: Any

    def __len__(self) -> int:
        return len(self.table)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """inputs, targets int32 [b t]; bytes (covered by each target) and mask float32 [b t]."""
        taken = rows(self.table, indices)
        tokens = taken["tokens"].astype(np.int32)
        mask = np.ones((len(tokens), tokens.shape[1] - 1), np.float32)
        widths = taken["bytes"].astype(np.float32) if "bytes" in taken else mask
        return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "bytes": widths, "mask": mask}


@dataclasses.dataclass(frozen=True)
class TextTask(Task):
    """Base of the text tasks.

    Attributes:
      context: t, tokens a model sees; each example is one window, windows do not overlap.
      tokenizer: "bytes" or "bpe" (trained on the training split only).
      vocab_size: symbols of the BPE (at most 65,536); bytes always have 256.
      max_bytes: use whole documents up to this size in all; 0 for everything.
    """

    headline: ClassVar[str] = "bits_per_byte"
    minimize: ClassVar[bool] = True

    context: int = 128
    tokenizer: TokenizerKind = "bytes"
    vocab_size: int = 256
    max_bytes: int = 0

    def __post_init__(self):
        if self.tokenizer not in ("bytes", "bpe"):
            raise DyncompError(f"tokenizer={self.tokenizer!r}: use 'bytes' or 'bpe'")
        if self.tokenizer == "bytes" and self.vocab_size != 256:
            raise DyncompError(
                f"vocab_size={self.vocab_size} with bytes: use 256, or tokenizer='bpe'"
            )
        if self.vocab_size > 1 << 16:
            raise DyncompError(f"vocab_size={self.vocab_size}: use at most 65536")
        if self.context < 1 or self.max_bytes < 0:
            raise DyncompError(
                f"context={self.context}, max_bytes={self.max_bytes}: use at least 1 and 0"
            )

    def documents(self) -> list[corpus.Document]:
        """All documents of the collection."""
        raise NotImplementedError

    def source(self, split: Split) -> WindowSource:
        """Windows of a split.

        Raises:
          DyncompError: unknown split, missing text, or too little of it for one window.
        """
        check_split(split)
        folder = _prepared(self, cache_root()) / split
        if not folder.exists():
            raise DyncompError(
                f"split {split!r} has no window of {self.context + 1} tokens: lower context or add text"
            )
        return WindowSource(load_table(folder))

    def fingerprint(self) -> str:
        """Digest of the text and of the options that shape the windows; two equal ones mean equal data."""
        return _prepared(self, cache_root()).name.removeprefix("text-")

    def load_tokenizer(self) -> ByteTokenizer | BPETokenizer:
        """The tokenizer of this task (for decoding and pictures)."""
        if self.tokenizer == "bytes":
            return ByteTokenizer()
        return BPETokenizer.load(_prepared(self, cache_root()) / "tokenizer.json")

    def spec(self) -> dict[str, Any]:
        """Shapes from ``context`` alone: a model of any corpus compiles without the corpus."""
        tokens = jax.ShapeDtypeStruct((self.context,), jnp.int32)
        weights = jax.ShapeDtypeStruct((self.context,), jnp.float32)
        return {"inputs": tokens, "targets": tokens, "bytes": weights, "mask": weights}

    def describe(self, inputs: np.ndarray) -> dict[str, np.ndarray]:
        """The bytes of all tokens, and how many each token covers."""
        pieces = self.load_tokenizer().pieces(inputs.reshape(-1))
        widths = np.asarray([len(piece) for piece in pieces], np.int32)
        content = np.frombuffer(b"".join(pieces), np.uint8)
        return {"bytes": content, "widths": widths.reshape(inputs.shape)}

    def objective(self) -> LMObjective:
        """Next-token cross-entropy."""
        return LMObjective()

    def metrics(self, output: Any, batch: Mapping[str, Any]) -> dict[str, Mean]:
        """nll (nats a token), accuracy, and bits per byte as a ratio of sums, at the positions that are answered."""
        output = answer_of(output)
        batch = at_answers(batch, output)
        nll = token_nll(output, batch["targets"])
        right = (jnp.argmax(output, axis=-1) == batch["targets"]).astype(jnp.float32)
        spent = Mean.of(nll, batch["mask"])
        covered = jnp.sum(batch["bytes"] * batch["mask"])
        return {
            "nll": spent,
            "accuracy": Mean.of(right, batch["mask"]),
            "bits_per_byte": Mean(spent.total * jnp.float32(LOG2E), covered),
        }


@functools.lru_cache(maxsize=16)
def _prepared(task: TextTask, root: Path) -> Path:
    """The folder of a task's tables; ``root`` is only part of the key of this memory of paths."""
    documents = corpus.limit_bytes(task.documents(), task.max_bytes)
    key = corpus.fingerprint(documents, FORMAT, task.context, task.tokenizer, task.vocab_size)
    return cached_folder(f"text-{key}", lambda folder: _build(task, documents, folder))


def _build(task: TextTask, documents: Sequence[corpus.Document], folder: Path) -> None:
    parts = corpus.split_documents(documents)
    tokenizer: ByteTokenizer | BPETokenizer = ByteTokenizer()
    if task.tokenizer == "bpe":
        tokenizer = BPETokenizer.train((text for _, text in parts["train"]), task.vocab_size)
        tokenizer.save(folder / "tokenizer.json")
    for split, members in parts.items():
        columns = windows(members, tokenizer, task.context)
        if task.tokenizer == "bytes":
            del columns["bytes"]  # always 1
        if len(columns["tokens"]):
            save_table(columns, folder / split)
    names = {split: [name for name, _ in members] for split, members in parts.items()}
    (folder / "documents.json").write_text(json.dumps(names, indent=1))


def windows(
    documents: Sequence[corpus.Document], tokenizer: ByteTokenizer | BPETokenizer, context: int
) -> dict[str, np.ndarray]:
    """Documents one after another, cut into windows of context + 1 tokens that overlap by one; the rest is dropped.

    Every token but the first of a split is a target at most once.
    """
    pairs = [tokenizer.encode(content) for _, content in documents]
    empty = np.zeros((0,), np.int32)
    tokens = np.concatenate([empty, *(pair[0] for pair in pairs)])
    widths = np.concatenate([empty, *(pair[1] for pair in pairs)])
    count = max((len(tokens) - 1) // context, 0)
    index = np.arange(count)[:, None] * context + np.arange(context + 1)[None, :]
    return {
        "tokens": tokens[index].astype(np.uint16),
        "bytes": widths[index[:, 1:]].astype(np.uint16),
    }


@dataclasses.dataclass(frozen=True)
class CodeLM(TextTask):
    """The Python standard library's own source, on every machine: about 11 MB without its tests (3.11)."""

    def documents(self) -> list[corpus.Document]:
        """Files of the running interpreter's standard library."""
        return corpus.standard_library()


@dataclasses.dataclass(frozen=True)
class TextFiles(TextTask):
    """Local text.

    Attributes:
      path: a folder, or one file (cut into documents of about 16 KiB).
      suffixes: which files of a folder count.
    """

    path: str = "."
    suffixes: Sequence[str] = (".txt", ".md", ".py")

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "suffixes", tuple(self.suffixes))  # a list has no hash

    def documents(self) -> list[corpus.Document]:
        """Files below ``path``."""
        return corpus.text_files(self.path, tuple(self.suffixes))


@dataclasses.dataclass(frozen=True)
class HubText(TextTask):
    """A text data set by its hub name, or the same through local json, csv, parquet or text files.

    Attributes:
      name: hub name ("org/name"), or a builder name ("json", "parquet", "text") with ``data_files``.
      config: configuration of the data set, if it has several.
      column: the text column.
      data_files: local files for a builder.
      max_documents: read at most this many; 0 for all.
    """

    name: str = ""
    config: str | None = None
    column: str = "text"
    data_files: Sequence[str] = ()
    max_documents: int = 0

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "data_files", tuple(self.data_files))  # a list has no hash

    def documents(self) -> list[corpus.Document]:
        """Rows of the data set's train split; ours splits them again by content."""
        table = load_hub(self.name, self.config, self.data_files, "train")
        if self.column not in table.column_names:
            raise DyncompError(
                f"{self.name}: no column {self.column!r}; it has {table.column_names}"
            )
        count = min(self.max_documents or len(table), len(table))
        texts = [str(text or "") for text in table.select(range(count))[self.column]]
        named = ((f"{i:09d}", text.encode("utf-8", "replace")) for i, text in enumerate(texts))
        return list(corpus.distinct(named))
