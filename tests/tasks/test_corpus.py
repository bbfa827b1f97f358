"""The collection and its split by document."""

import hashlib

import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.tasks import corpus
from dyncomp.tasks.base import SPLITS, part


@pytest.fixture(scope="module")
def library():
    return corpus.standard_library()


def test_standard_library_is_code_without_tests_or_packages(library):
    names = [name for name, _ in library]
    assert names == sorted(set(names)) and len(names) > 300
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert not folders & {"site-packages", "__pycache__", "test", "tests"}
    assert sum(len(content) for _, content in library) > 5_000_000


def test_same_corpus_twice(library):
    assert corpus.fingerprint(corpus.standard_library()) == corpus.fingerprint(library)


def test_no_file_or_content_in_two_splits(library):
    parts = corpus.split_documents(library)
    assert sum(len(members) for members in parts.values()) == len(library)
    names = [name for members in parts.values() for name, _ in members]
    contents = [hashlib.sha256(c.strip()).digest() for m in parts.values() for _, c in m]
    assert len(set(names)) == len(names) and len(set(contents)) == len(contents)
    assert all(parts[split] for split in SPLITS)


def test_hardly_a_held_out_line_is_in_training(library):
    """Long lines that also occur in training: licences and imports, not copied files."""
    parts = corpus.split_documents(library)
    long = lambda split: [
        line.strip() for _, c in parts[split] for line in c.splitlines() if len(line.strip()) >= 40
    ]
    trained = set(long("train"))
    for split in ("validation", "calibration", "test"):
        lines = long(split)
        assert sum(line in trained for line in lines) < 0.1 * len(lines)


def test_near_repeats_are_dropped():
    page = b"\n".join(b"a line that is long enough to count: %d" % i for i in range(10))
    near = page.replace(b"count: 3", b"count: three")
    half = page[: len(page) // 2] + b"\n".join(
        b"\nwholly different long line number %d" % i for i in range(9)
    )
    kept = list(
        corpus.distinct([("a", page), ("b", page), ("c", near), ("d", half), ("e", b" \n")])
    )
    assert [name for name, _ in kept] == ["a", "d"]


def test_part_follows_its_shares():
    shares = {"train": 0.7, "test": 0.3}
    count = sum(part(f"file {i}", shares) == "test" for i in range(5000))
    assert abs(count - 1500) < 5 * (5000 * 0.3 * 0.7) ** 0.5


def test_split_of_a_document_does_not_depend_on_its_neighbours(library):
    full, half = corpus.split_documents(library), corpus.split_documents(library[::2])
    for split in SPLITS:
        assert {n for n, _ in half[split]} == {n for n, _ in full[split]} & {
            n for n, _ in library[::2]
        }


def test_one_file_is_cut_at_lines(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("".join(f"line {i} of a long book\n" for i in range(5000)))
    documents = corpus.text_files(str(file), (".txt",))
    assert b"".join(content for _, content in documents) == file.read_bytes()
    assert len(documents) > 3 and all(content.endswith(b"\n") for _, content in documents)


def test_fingerprint_sees_names_contents_and_options():
    base = corpus.fingerprint([("a", b"x"), ("b", b"y")], 1)
    others = ([("a", b"x"), ("b", b"z")], [("a", b"x"), ("c", b"y")], [("ab", b"x"), ("", b"y")])
    assert (
        len(
            {
                base,
                *(corpus.fingerprint(d, 1) for d in others),
                corpus.fingerprint([("a", b"x"), ("b", b"y")], 2),
            }
        )
        == 5
    )


def test_limit_keeps_whole_documents():
    documents = [(str(i), b"x" * 100) for i in range(50)]
    kept = corpus.limit_bytes(documents, 1050)
    assert len(kept) == 10 and set(kept) <= set(documents)
    assert corpus.limit_bytes(documents, 0) == documents


def test_missing_text_is_one_line(tmp_path):
    with pytest.raises(DyncompError, match=r"no text under .*TextFiles\.path") as error:
        corpus.text_files(str(tmp_path / "nowhere"), (".txt",))
    assert "\n" not in str(error.value)
