"""Random damage to config files, made on their tokens: an idea of gin's syntax of its own, so that it can judge ours.

A `Mutation` says which file gets which text; kinds are "name" (misspelt), "type" (a value that can't be right),
"macro" (an undefined one), "duplicate" (a statement, key or value bound twice) and "unused" (a binding that nothing
reads, in the file that is run).
"""

import dataclasses
import io
import re
import tokenize
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

KINDS = ("name", "type", "macro", "duplicate", "unused")
INCLUDE = re.compile(r"^include\s+['\"](.+?)['\"]", re.M)


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One damaged file; ``top`` is the config to run, ``file`` the one that changed, both relative to the tree."""

    kind: str
    top: str
    file: str
    line: int
    before: str
    after: str
    text: str
    extra: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        added = "".join(f"\n  new file {name}:\n    {text}" for name, text in self.extra)
        return (
            f"{self.kind}: {self.file}:{self.line} (run as {self.top})\n"
            f"  - {self.before}\n  + {self.after}{added}"
        )


@dataclasses.dataclass(frozen=True)
class Token:
    """A token and where it stands in the text."""

    kind: int
    string: str
    start: int
    end: int
    line: int


@dataclasses.dataclass(frozen=True)
class Statement:
    """A logical line; a binding has a key and a value, both as tokens."""

    text: str
    tokens: tuple[Token, ...]

    @property
    def word(self) -> str:
        """include, import, from, or the first word of a binding."""
        return self.tokens[0].string

    @property
    def is_binding(self) -> bool:
        return self.word not in ("include", "import", "from")

    @property
    def key(self) -> tuple[Token, ...]:
        return self.tokens[: self._equals]

    @property
    def value(self) -> tuple[Token, ...]:
        return self.tokens[self._equals + 1 :]

    @property
    def _equals(self) -> int:
        return next(n for n, token in enumerate(self.tokens) if token.string == "=")


def statements(text: str) -> list[Statement]:
    """The logical lines of a config."""
    offsets = [0]
    for line in text.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT)
    found, pending = [], []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.NEWLINE, tokenize.ENDMARKER):
            if pending:
                whole = text[pending[0].start : pending[-1].end]
                found.append(Statement(whole, tuple(pending)))
            pending = []
        elif token.type not in skipped:
            start, end = (offsets[row - 1] + column for row, column in (token.start, token.end))
            pending.append(Token(token.type, token.string, start, end, token.start[0]))
    return found


def closure(tree: Path, top: str) -> list[str]:
    """The top file and all that it includes, relative to the tree."""
    found = [top]
    for name in found:
        found += [n for n in INCLUDE.findall((tree / name).read_text()) if n not in found]
    return found


class Mutator:
    """Draws mutations of a tree of configs.

    Args:
      tree: folder of configs; tops are the ``.gin`` files directly in it.
      seed: of every choice.
    """

    def __init__(self, tree: Path, seed: int):
        self.tree, self.rng = tree, np.random.default_rng(seed)
        self.tops = sorted(path.name for path in tree.glob("*.gin"))

    def draw(self, kind: str) -> Mutation:
        """A random mutation of a kind, at a random place of a random file that a random top reaches."""
        make: Callable[..., Mutation | None] = getattr(self, f"_{kind}")
        while True:
            top = self._pick(self.tops)
            reached = [top] if kind == "unused" else closure(self.tree, top)
            file = self._pick(reached)
            text = (self.tree / file).read_text()
            made = make(top, file, text, statements(text))
            if made is not None:
                return made

    def _pick(self, options: Sequence):
        return options[int(self.rng.integers(len(options)))]

    def _misspell(self, word: str) -> str:
        """One letter doubled, dropped, swapped or wrong."""
        place = int(self.rng.integers(len(word)))
        wrong = {
            "double": word[: place + 1] + word[place:],
            "drop": word[:place] + word[place + 1 :],
            "swap": word[:place] + word[place : place + 2][::-1] + word[place + 2 :],
            "wrong": word[:place] + ("z" if word[place] != "z" else "q") + word[place + 1 :],
        }[self._pick(("double", "drop", "swap", "wrong"))]
        return wrong if wrong.isidentifier() and wrong != word else f"{word}x"

    def _replace(self, kind: str, top: str, file: str, text: str, token: Token, new: str, *more):
        """A mutation that puts ``new`` in the place of a token (up to the last of ``more``)."""
        end = more[-1].end if more else token.end
        changed = text[: token.start] + new + text[end:]
        lines, after = text.splitlines(), changed.splitlines()
        line = token.line
        return Mutation(kind, top, file, line, lines[line - 1], after[line - 1], changed)

    def _append(self, kind: str, top: str, file: str, text: str, line: str, extra=()):
        changed = f"{text.rstrip()}\n{line}\n"
        number = changed.count("\n") - line.count("\n")
        return Mutation(kind, top, file, number, "(nothing)", line, changed, extra)

    def _name(self, top, file, text, found):
        statement = self._pick(found)
        if statement.word in ("include", "import", "from"):
            names = [t for t in statement.tokens[1:] if t.string not in ("import", "as", ".")]
            token = self._pick([t for t in names if "__gin__" not in t.string])
            if token.kind == tokenize.STRING:
                new = f"'{self._misspell(token.string[1:-5])}.gin'"
                if not new.isascii():
                    return None
                return self._replace("name", top, file, text, token, new)
        else:
            value = statement.value
            inside = [
                t
                for n, t in enumerate(value)
                if t.kind == tokenize.NAME and n and value[n - 1].string in ("@", "/", ".")
            ]
            token = self._pick([t for t in (*statement.key, *inside) if t.kind == tokenize.NAME])
        return self._replace("name", top, file, text, token, self._misspell(token.string))

    def _leaves(self, found):
        """Numbers, texts and constants inside values, with the statement they stand in."""
        constants = ("True", "False", "None")
        return [
            (statement, token)
            for statement in found
            if statement.is_binding
            for token in statement.value
            if token.kind in (tokenize.NUMBER, tokenize.STRING) or token.string in constants
        ]

    def _type(self, top, file, text, found):
        if self.rng.random() < 0.4:
            return self._reference_type(top, file, text, found)
        leaves = self._leaves(found)
        if not leaves:
            return None
        _, token = self._pick(leaves)
        never = ["{'oops': 1}", "@training.Run", "[None, ('oops', 3)]"]
        if token.string in ("True", "False"):
            wrong = ["1", "'yes'", "None", "0.5", *never]
        elif token.string == "None":
            wrong = ["'oops'", "True", *never]
        elif token.kind == tokenize.NUMBER:
            wrong = ["'oops'", "True", "(1, 'oops')", f"'{token.string}'", *never]
        else:
            wrong = ["3", "0.5", "True", *never]
        return self._replace("type", top, file, text, token, self._imported(text, wrong))

    def _imported(self, text, wrong):
        """A wrong value that names nothing the file does not import."""
        return self._pick([w for w in wrong if "@" not in w or "import training" in text])

    def _reference_type(self, top, file, text, found):
        """A factory for an instance, an instance for a factory, or a constant for either."""
        places = []
        for statement in found:
            for n, token in enumerate(statement.value if statement.is_binding else ()):
                if token.string == "@":
                    last = n
                    value = statement.value
                    while last + 1 < len(value) and (
                        value[last + 1].kind == tokenize.NAME or value[last + 1].string in "/."
                    ):
                        last += 1
                    called = last + 2 < len(value) and value[last + 1].string == "("
                    places.append((token, value[last], value[last + 2] if called else None))
        if not places:
            return None
        start, last, closing = self._pick(places)
        name = text[start.start : last.end]
        wrong = ["3", "'oops'", "True", name if closing else f"{name}()"]
        wrong += [f"@{c}{'()' if closing else ''}" for c in self._other_rooms(name, text)]
        return self._replace("type", top, file, text, start, self._pick(wrong), closing or last)

    def _other_rooms(self, name, text):
        """Classes that the file imports out of another room than ``name``'s."""
        room = name[1:].rpartition("/")[2].split(".")[0]
        known = ("experts.MoE", "experts.SwiGLU", "models.Block", "routers.TopK", "attention.Attention",
                 "tasks.CodeLM", "training.AdamW", "models.DecoderLM", "tasks.LMObjective")  # fmt: skip
        return [
            c for c in known if not c.startswith(f"{room}.") and f"import {c.split('.')[0]}" in text
        ]

    def _macro(self, top, file, text, found):
        """A misspelt macro, or one that nothing defines in the place of a value."""
        used = [
            statement.value[n + 1]
            for statement in found
            if statement.is_binding
            for n, token in enumerate(statement.value)
            if token.string == "%"
        ]
        if used and self.rng.random() < 0.5:
            token = self._pick(used)
            return self._replace("macro", top, file, text, token, self._misspell(token.string))
        leaves = self._leaves(found)
        if not leaves:
            return None
        _, token = self._pick(leaves)
        return self._replace(
            "macro", top, file, text, token, f"%{self._pick(('SIZE', 'WIDHT', 'x'))}"
        )

    def _duplicate(self, top, file, text, found):
        """A statement again in the same file, in a file that has nothing to do with it, or a key of a dict twice."""
        bindings = [s for s in found if s.is_binding]
        keys = [
            (token, statement)
            for statement in bindings
            for n, token in enumerate(statement.value[:-1])
            if token.kind == tokenize.STRING and statement.value[n + 1].string == ":"
        ]
        way = self._pick(("same", "same", "elsewhere", "key"))
        if way == "key":
            return self._twice_in_a_dict(top, file, text, keys) if keys else None
        if way == "same":
            statement = self._pick(found)
            token = statement.tokens[0]
            return self._replace(
                "duplicate", top, file, text, token, f"{statement.text}\n{token.string}"
            )
        if not bindings:
            return None
        imports = "\n".join(s.text for s in found if s.word in ("from", "import"))
        other = f"{imports}\n{self._pick(bindings).text}\n"
        whole = (self.tree / top).read_text()
        last = [s for s in statements(whole) if s.word == "include"]
        first = [s for s in statements(whole) if s.is_binding][0].tokens[0].start
        place = last[-1].tokens[-1].end + 1 if last else first
        if file == top:
            return None  # the top file includes the new one, so it may override it
        changed = f"{whole[:place]}include 'other.gin'\n{whole[place:]}"
        line = changed[:place].count("\n") + 1
        extra = (("other.gin", other),)
        return Mutation("duplicate", top, top, line, "", "include 'other.gin'", changed, extra)

    def _twice_in_a_dict(self, top, file, text, keys):
        token, statement = self._pick(keys)
        opening = next(t for t in statement.value if t.string == "{")
        names = [t.string for t, s in keys if s is statement and t is not token]
        if names and self.rng.random() < 0.5:
            return self._replace("duplicate", top, file, text, token, self._pick(names))
        again = text[token.start : statement.tokens[-1].start].rstrip().rstrip(",")
        return self._replace("duplicate", top, file, text, opening, f"{{{again}, ")

    def _unused(self, top, file, text, found):
        """A binding that nothing reads, at the end of the file that is run."""
        names = [s.tokens[-1].string for s in found if s.word == "from" and "__gin__" not in s.text]
        idle = {
            "training": ("nowhere/training.Run.steps = 3", "training.InitFrom.path = 'runs/x'"),
            "models": ("nowhere/models.Block.norm = 'rms'", "nowhere/models.Group.repeat = 2"),
            "experts": ("nowhere/experts.MLP.hidden = 3",),
            "routers": ("routers.Softmax.num_experts = 4", "nowhere/routers.TopK.k = 1"),
            "tasks": ("tasks.TextFiles.path = 'x'", "nowhere/tasks.Digits.label_smoothing = 0.1"),
        }
        lines = [
            "IDLE = 3",
            "nowhere/IDLE = 'x'",
            *(line for n in names for line in idle.get(n, ())),
        ]
        return self._append("unused", top, file, text, self._pick(lines))
