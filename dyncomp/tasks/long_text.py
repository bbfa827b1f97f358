"""Long texts that lie on every machine, and prompts that ask for something far back in them."""

import functools
import importlib
from typing import Any, Literal

import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.tasks import corpus

Kind = Literal["prose", "code"]
Part = Literal["evaluation", "calibration"]


@functools.cache
def long_documents(kind: Kind) -> tuple[corpus.Document, ...]:
    """Documents, longest first, no two alike.

    "prose" is Python's language reference as ``pydoc`` shows it, "code" files of the standard library.

    Raises:
      DyncompError: an unknown kind, or a Python without its topics.
    """
    if kind == "code":
        found = [d for d in corpus.standard_library() if not d[0].startswith("pydoc_data")]
    elif kind == "prose":
        try:
            topics = importlib.import_module("pydoc_data.topics").topics
        except ImportError as error:
            raise DyncompError("this Python has no pydoc_data.topics; use kind='code'") from error
        found = [(name, text.encode()) for name, text in topics.items()]
    else:
        raise DyncompError(f"long_documents: kind {kind!r}; use 'prose' or 'code'")
    return tuple(corpus.distinct(sorted(found, key=lambda d: (-len(d[1]), d[0]))))


def draw(
    tokenizer: Any, kind: Kind, length: int, rng: np.random.Generator, part: Part = "evaluation"
) -> list[int]:
    """``length`` tokens of random documents of a kind, joined; the first begins anywhere in its first half.

    Every fourth document is for calibration, the others are for evaluation.

    Raises:
      DyncompError: there is less.
    """
    own = [d for n, d in enumerate(long_documents(kind)) if (n % 4 == 3) == (part == "calibration")]
    ids: list[int] = []
    for n in rng.permutation(len(own)):
        text = own[n][1].decode("utf-8", errors="replace")
        if not ids:
            text = text[text.find("\n", int(rng.uniform(0, 0.5) * len(text))) + 1 :]
        ids += tokenizer.encode(text[: 8 * length] + "\n\n")
        if len(ids) >= length:
            return ids[:length]
    raise DyncompError(f"all {kind} for {part} has {len(ids)} tokens; {length} are wanted")


def passkey(
    tokenizer: Any, filler: list[int], length: int, rng: np.random.Generator
) -> tuple[list[int], int]:
    """A prompt of ``length`` tokens that hides five digits in ``filler`` and ends with them.

    The key stands at 10 to 60 % of the text (Mohtashami & Jaggi 2023 hide a pass key so).

    Returns:
      ids, and how many of the last are the answer.
    """
    key = "".join(str(d) for d in rng.integers(0, 10, 5))
    head = tokenizer.encode(
        "There is important info hidden inside a lot of irrelevant text. Find and memorize it.\n\n"
    )
    needle = tokenizer.encode(f"\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n")
    tail = tokenizer.encode("\n\nWhat is the pass key? The pass key is ")
    answer = tokenizer.encode(key)
    room = length - sum(map(len, (head, needle, tail, answer)))
    if room < 8 or room > len(filler):
        raise DyncompError(
            f"passkey: {length} tokens leave {room} of filler; {len(filler)} are there"
        )
    at = int(rng.uniform(0.1, 0.6) * room)
    return head + filler[:at] + needle + filler[at:room] + tail + answer, len(answer)


def key_values(tokenizer: Any, length: int, rng: np.random.Generator) -> list[int]:
    """At most ``length`` tokens: a JSON object of random keys and values, a question for one, and its answer.

    The form of InfiniteBench's kv_retrieval, on which MInference searches its patterns.
    """
    word = lambda: "".join(rng.choice(list("0123456789abcdef"), 8))
    ask = lambda key, value: (
        f'}}\n\nKey: "{key}"\nThe value associated with the specified key is: "{value}"'
    )
    begin = "Extract the value corresponding to the specified key in the JSON object below.\n\n{"
    ids, rows = tokenizer.encode(begin), []
    room = length - len(tokenizer.encode(ask("00000000", "00000000")))
    while True:
        pair = (word(), word())
        row = tokenizer.encode(f'"{pair[0]}": "{pair[1]}", ')
        if len(ids) + len(row) > room:
            break
        ids, rows = ids + row, [*rows, pair]
    if not rows:
        raise DyncompError(f"key_values: {length} tokens are too few")
    asked = rows[int(len(rows) * rng.uniform(0.1, 0.6))]
    return (ids + tokenizer.encode(ask(*asked)))[:length]
