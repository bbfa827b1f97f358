"""JobSets satisfy the published schema, and say what shall happen after exit code 75."""

import shlex

import pytest
from jobs import POINTS, problems

MACHINES = ("cpu", "cpu:2", "gpu:4", "h100:2x8", "v5e:4x4", "v5p:2x2x4", "tpu7x:2x2x1")


def pod(document) -> dict:
    return document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("machine", MACHINES)
def test_the_published_schema(machine, documents):
    for document in documents("jobset", machine):
        assert problems("jobset-0.12.0", document) == []


def test_the_schema_can_refuse(documents):
    document = documents("jobset")[0]
    document["spec"]["failurePolicy"]["rules"][0]["action"] = "Again"
    pod(document)["containers"][0]["imagee"] = "x"
    found = " ".join(problems("jobset-0.12.0", document))
    assert "'Again' is not one of" in found and "'imagee' was unexpected" in found


def test_a_saved_run_starts_again_without_counting(documents):
    spec = documents("jobset", max_restarts=5)[0]["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 5
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    job = spec["replicatedJobs"][0]["template"]["spec"]
    # The reason of a job that one of these rules fails.
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    saved, evicted = job["podFailurePolicy"]["rules"]
    container = job["template"]["spec"]["containers"][0]["name"]
    assert saved == {
        "action": "FailJob",
        "onPodConditions": [],
        "onExitCodes": {"containerName": container, "operator": "In", "values": [75]},
    }
    assert evicted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"


def test_a_pod_a_host(documents):
    document = documents("jobset", "v5e:4x4")[0]
    job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 4
    assert pod(document)["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod(document)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    gpus = pod(documents("jobset", "gpu:4")[0])
    assert "nodeSelector" not in gpus
    assert gpus["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 4}


def test_names_queue_and_storage(documents):
    found = documents("jobset")
    assert [document["metadata"]["name"] for document in found] == ["test-0", "test-1"]
    assert found[0]["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "mine"}
    assert "labels" not in documents("jobset", queue=None)[0]["metadata"]
    assert pod(found[0])["volumes"][0]["persistentVolumeClaim"] == {"claimName": "checkpoints"}
    (single,) = documents("jobset", points=POINTS[:1])
    assert single["metadata"]["name"] == "test"


def test_the_shell_sees_the_arguments(documents):
    for document, point in zip(documents("jobset"), POINTS, strict=True):
        shell, flag, text = pod(document)["containers"][0]["command"]
        assert (shell, flag) == ("sh", "-c")
        assert shlex.split(text) == ["exec", "dyncomp", *point]


def test_processes_find_each_other(documents):
    text = pod(documents("jobset", "h100:2x8")[1])["containers"][0]["command"][-1]
    assert text.endswith(
        ' --coordinator "test-1-train-0-0.test-1:8476" --processes "2" --process "$JOB_COMPLETION_INDEX"'
    )
    tpus = pod(documents("jobset", "v5e:4x4")[0])["containers"][0]["command"][-1]
    assert tpus.endswith(" --distributed")  # the machines of a slice know of each other
    assert (
        "--distributed"
        not in pod(documents("jobset", "v5e:2x2")[0])["containers"][0]["command"][-1]
    )
