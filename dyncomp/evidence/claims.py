"""Claims: what must hold, written and committed before the first evidence run.

``claims.toml`` is a list of tables::

    [[claim]]
    id = "near_top_2"             # unique
    text = "Top-p routing is within 0.02 nat of top-2."
    paper = "42.3 against 41.6"   # the paper's figure and setting, or "not reported"
    metric = "nats"               # a figure that run_seed returns for every arm named here
    arm = "top_p"
    against = "top_2"             # what is subtracted, see below
    relation = "<="               # of (arm - against) to the margin: <=, >=, <, >, or "report" (no sign promised)
    margin = 0.02                 # in the metric's unit
    kind = "quality"              # "quality" needs 5 seeds, "compute" 3

``against`` is one of

- an arm;
- ``"zero"``: the figure itself is compared with the margin;
- ``"line:a,b"``: the straight line through arms a and b in the (compute, metric) plane, at this arm's compute. The
  compute axis is the claim's optional key ``compute``, else the experiment's ``COMPUTE``;
- ``"trend:b,c,..."``: a sweep that starts at ``arm``; every step from one arm to the next must stand in the relation,
  so the step that is worst for the claim is taken of each seed.
"""

import dataclasses
import hashlib
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dyncomp.core.errors import DyncompError

RELATIONS = ("<=", ">=", "<", ">", "report")
SEEDS_NEEDED = {"quality": 5, "compute": 3}
TEXTS = ("id", "text", "paper", "metric", "arm", "against", "relation", "kind")
FORMS = ("line", "trend")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim; the fields are the keys of its table (see the module)."""

    id: str
    text: str
    paper: str
    metric: str
    arm: str
    against: str
    relation: str
    margin: float
    kind: str
    compute: str | None = None

    @property
    def form(self) -> str:
        """How the claim compares: "arm", "zero", "line" or "trend"."""
        head, colon, _ = self.against.partition(":")
        return head if colon else "zero" if head == "zero" else "arm"

    @property
    def others(self) -> tuple[str, ...]:
        """The arms that ``against`` names."""
        if self.form == "zero":
            return ()
        return tuple(name.strip() for name in self.against.rpartition(":")[2].split(","))

    @property
    def seeds_needed(self) -> int:
        """How many seeds the claim needs before it may hold."""
        return SEEDS_NEEDED[self.kind]


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Raises:
      DyncompError: there is no such file.
    """
    if not path.is_file():
        raise DyncompError(f"{path} is missing: write and commit it before the first evidence run")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_claims(path: Path) -> list[Claim]:
    """Reads and checks a ``claims.toml``.

    Raises:
      DyncompError: no file, no TOML, no claim, or a claim that breaks the schema; one line that names the fix.
    """
    digest(path)
    try:
        tables = tomllib.loads(path.read_text()).get("claim", [])
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DyncompError(f"{path} is no TOML: {error}") from None
    if not isinstance(tables, list) or not tables:
        raise DyncompError(f"{path} holds no [[claim]]: add one")
    claims = [_claim(table, f"{path}, claim {n}") for n, table in enumerate(tables, 1)]
    seen: set[str] = set()
    for claim in claims:
        if claim.id in seen:
            raise DyncompError(f"{path}: id {claim.id!r} stands twice; rename one")
        seen.add(claim.id)
    return claims


def _claim(table: Any, where: str) -> Claim:
    if not isinstance(table, Mapping):
        raise DyncompError(f"{where}: write it as a [[claim]] table")
    known = {field.name for field in dataclasses.fields(Claim)}
    if unknown := sorted(set(table) - known):
        raise DyncompError(
            f"{where}: unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}"
        )
    if missing := [key for key in (*TEXTS, "margin") if key not in table]:
        raise DyncompError(f"{where}: key {missing[0]!r} is missing; add it")
    for key in (*TEXTS, *({"compute"} & set(table))):
        if not isinstance(table[key], str) or not table[key].strip():
            raise DyncompError(f"{where}: {key} must be a text that is not empty")
    margin = table["margin"]
    number = isinstance(margin, (int, float)) and not isinstance(margin, bool)
    if not number or not math.isfinite(margin):
        raise DyncompError(f"{where}: margin must be a finite number, got {margin!r}")
    values: dict[str, Any] = {**table, "margin": float(margin)}
    claim = Claim(**values)
    _check(claim, where)
    return claim


def _check(claim: Claim, where: str) -> None:
    if claim.relation not in RELATIONS:
        raise DyncompError(
            f"{where}: relation {claim.relation!r}: use one of {', '.join(RELATIONS)}"
        )
    if claim.kind not in SEEDS_NEEDED:
        raise DyncompError(f"{where}: kind {claim.kind!r}: use one of {', '.join(SEEDS_NEEDED)}")
    if claim.form not in ("arm", "zero", *FORMS):
        raise DyncompError(
            f"{where}: against {claim.against!r}: use an arm, zero, line:a,b or trend:a,b"
        )
    if claim.form == "line" and (len(claim.others) != 2 or len(set(claim.others)) != 2):
        raise DyncompError(
            f"{where}: against {claim.against!r}: a line needs two arms, as in line:a,b"
        )
    if claim.form == "trend" and claim.relation == "report":
        raise DyncompError(f"{where}: a trend needs a relation with a sign, not report")


def check_arms(claims: list[Claim], arms: list[str], compute: str | None, path: Path) -> None:
    """Checks claims against an experiment, before anything is run.

    Raises:
      DyncompError: an arm the experiment does not have, or a line without a compute axis.
    """
    for claim in claims:
        for name in (claim.arm, *claim.others):
            if name not in arms:
                known = ", ".join(arms)
                raise DyncompError(
                    f"{path}: claim {claim.id!r} names arm {name!r}; there are {known}"
                )
        if claim.form == "line" and not (claim.compute or compute):
            raise DyncompError(
                f"{path}: claim {claim.id!r} needs a compute axis: set COMPUTE in experiment.py or the key compute"
            )
