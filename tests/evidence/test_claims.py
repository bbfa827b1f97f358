"""The schema of claims.toml."""

from pathlib import Path

import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.evidence.claims import check_arms, digest, read_claims

GOOD = {
    "id": '"x"', "text": '"t"', "paper": '"p"', "metric": '"m"', "arm": '"a"',
    "against": '"b"', "relation": '"<="', "margin": "0.02", "kind": '"quality"',
}  # fmt: skip


def write(tmp_path, *changes):
    lines = []
    for change in changes or ({},):
        table = {k: v for k, v in {**GOOD, **change}.items() if v is not None}
        lines += ["[[claim]]", *(f"{k} = {v}" for k, v in table.items())]
    path = tmp_path / "claims.toml"
    path.write_text("\n".join(lines))
    return path


def test_reads_a_claim(tmp_path):
    (claim,) = read_claims(write(tmp_path, {"against": '"line:b,c"', "margin": "1"}))
    assert claim.form == "line" and claim.others == ("b", "c")
    assert claim.margin == 1.0 and claim.seeds_needed == 5


@pytest.mark.parametrize(
    "change, message",
    [
        ({"margin": None}, "'margin' is missing"),
        ({"margin": "nan"}, "finite number"),
        ({"margin": "true"}, "finite number"),
        ({"margin": '"0"'}, "finite number"),
        ({"relation": '"=="'}, "relation '==': use one of"),
        ({"kind": '"speed"'}, "kind 'speed': use one of"),
        ({"text": '" "'}, "text must be a text"),
        ({"marginn": "1"}, "unknown key 'marginn'"),
        ({"against": '"line:b"'}, "a line needs two arms"),
        ({"against": '"curve:b"'}, "use an arm"),
        ({"against": '"trend:b,c"', "relation": '"report"'}, "needs a relation"),
    ],
)
def test_bad_claims_are_named_in_one_line(tmp_path, change, message):
    with pytest.raises(DyncompError, match=message) as error:
        read_claims(write(tmp_path, change))
    assert "\n" not in str(error.value) and "claim 1" in str(error.value)


def test_ids_are_unique_and_there_is_one(tmp_path):
    with pytest.raises(DyncompError, match="'x' stands twice"):
        read_claims(write(tmp_path, {}, {}))
    (tmp_path / "claims.toml").write_text("# none")
    with pytest.raises(DyncompError, match="holds no"):
        read_claims(tmp_path / "claims.toml")
    (tmp_path / "claims.toml").write_text("[[claim")
    with pytest.raises(DyncompError, match="is no TOML"):
        read_claims(tmp_path / "claims.toml")
    with pytest.raises(DyncompError, match="is missing"):
        digest(tmp_path / "other.toml")


def test_a_line_needs_a_compute_axis(tmp_path):
    path = write(tmp_path, {"against": '"line:b,c"'})
    claims = read_claims(path)
    with pytest.raises(DyncompError, match="needs a compute axis"):
        check_arms(claims, ["a", "b", "c"], None, path)
    check_arms(claims, ["a", "b", "c"], "cost", path)


def test_shipped_claims_are_valid():
    folders = Path(__file__).resolve().parents[2] / "experiments"
    paths = list(folders.glob("*/claims.toml"))
    assert len(paths) >= 2 and all(read_claims(path) for path in paths)
