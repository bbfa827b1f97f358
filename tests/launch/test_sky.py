"""SkyPilot's tasks satisfy its schema, and recover from exit code 75."""

import shlex

import pytest
from jobs import POINTS, problems

from dyncomp.core.errors import DyncompError
from dyncomp.launch import engine


@pytest.mark.parametrize("machine", ["cpu", "cpu:2", "a100:8", "h100:2x8", "v5e:4x4", "v5p:2x2x4"])
def test_the_published_schema(machine, documents):
    for document in documents("sky", machine):
        assert problems("skypilot-0.14.1-task", document) == []
        assert problems("skypilot-0.14.1-resources", document["resources"]) == []


def test_the_schema_can_refuse(documents):
    document = documents("sky")[0]
    document["resources"]["job_recovery"]["recover_on_exit_codes"] = [256]
    assert problems("skypilot-0.14.1-resources", document["resources"])
    assert problems("skypilot-0.14.1-task", {**document, "runn": "x"})


def test_a_saved_run_starts_again(documents):
    recovery = documents("sky", max_restarts=2)[0]["resources"]["job_recovery"]
    assert recovery == {"max_restarts_on_errors": 2, "recover_on_exit_codes": [75]}


@pytest.mark.parametrize(
    ("machine", "accelerators", "nodes"),
    [
        ("h100:2x8", "H100:8", 2),
        ("a100:4", "A100-80GB:4", 1),
        ("v5e:4x4", "tpu-v5litepod-16", 1),
        ("v5p:2x2x4", "tpu-v5p-32", 1),  # named by TensorCores
        ("cpu:2", None, 2),
    ],
)
def test_machines(machine, accelerators, nodes, documents):
    document = documents("sky", machine)[0]
    assert document["resources"].get("accelerators") == accelerators
    assert document["num_nodes"] == nodes


def test_one_managed_job_a_point(make):
    submission = engine("sky").write(make("sky"))
    assert submission.commands == [
        ["sky", "jobs", "launch", "--yes", "--detach-run", str(path)] for path in submission.files
    ]
    assert len(submission.files) == len(POINTS)


def test_the_shell_sees_the_arguments(documents):
    for document, point in zip(documents("sky"), POINTS, strict=True):
        assert shlex.split(document["run"]) == ["dyncomp", *point]
    text = documents("sky", "h100:2x8")[0]["run"]
    assert '--processes "$SKYPILOT_NUM_NODES" --process "$SKYPILOT_NODE_RANK"' in text


def test_without_an_image_the_checkout_is_installed(documents, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DyncompError, match="give --image, or launch from a checkout"):
        documents("sky", image=None)
    (tmp_path / "constraints.txt").touch()
    document = documents("sky", "v6e:4x4", image=None)[0]
    assert document["workdir"] == "." and "image_id" not in document["resources"]
    assert document["setup"] == "pip install '.[tpu]' -c constraints.txt"
