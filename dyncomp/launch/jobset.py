"""Kubernetes: a JobSet a point.

A pod that leaves with the code of a saved run, or that is evicted, fails its job for the reason ``PodFailurePolicy``,
which starts the JobSet again without counting. Any other failure counts against ``max_restarts``.
"""

import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from dyncomp.core.errors import PREEMPTED
from dyncomp.launch import processes
from dyncomp.launch.job import Job, Submission
from dyncomp.launch.machine import Machine

WIDTH = 10_000
"""Of lines: a command stays on one."""

SECONDS_TO_SAVE = 120
"""Between the signal and the end of a pod."""


def write(job: Job) -> Submission:
    """One file with a JobSet for each point; ``create``, unlike ``apply``, refuses names that are taken."""
    path = job.folder / f"{job.name}.yaml"
    sets = [jobset(job, name, point) for name, point in zip(job.names(), job.points, strict=True)]
    return Submission(
        {path: yaml.safe_dump_all(sets, sort_keys=False, width=WIDTH)},
        [["kubectl", "create", "-f", str(path)]],
    )


def jobset(job: Job, name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """A JobSet of one replicated job, with a pod a host."""
    metadata: dict[str, Any] = {"name": name}
    if job.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": job.queue}
    if job.machine.family == "tpu":  # a slice is one node pool
        exclusive = "alpha.jobset.sigs.k8s.io/exclusive-topology"
        metadata["annotations"] = {exclusive: "cloud.google.com/gke-nodepool"}
    again = {
        "name": "saved",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    template = {"spec": _job(job, name, arguments)}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {"maxRestarts": job.max_restarts, "rules": [again]},
            "replicatedJobs": [{"name": "train", "replicas": 1, "template": template}],
        },
    }


def _job(job: Job, name: str, arguments: Sequence[str]) -> dict[str, Any]:
    saved = {"containerName": "dyncomp", "operator": "In", "values": [PREEMPTED]}
    evicted = {"type": "DisruptionTarget", "status": "True"}
    failed = {"action": "FailJob", "onPodConditions": []}  # which older definitions ask for
    return {
        "parallelism": job.machine.hosts,
        "completions": job.machine.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {**failed, "onExitCodes": saved},
                {**failed, "onPodConditions": [evicted]},
            ]
        },
        "template": {"spec": _pod(job, name, arguments)},
    }


def _pod(job: Job, name: str, arguments: Sequence[str]) -> dict[str, Any]:
    assert job.storage is not None  # `engines.check` asks for it
    joined = processes.flags(
        job.machine,
        f"{name}-train-0-0.{name}:{processes.PORT}",
        str(job.machine.hosts),
        "$JOB_COMPLETION_INDEX",
    )
    container: dict[str, Any] = {
        "name": "dyncomp",
        "image": job.image,
        # exec: the signal that ends a pod goes to its first process.
        "command": ["sh", "-c", f"exec dyncomp {shlex.join(arguments)}{joined}"],
        "volumeMounts": [{"name": "storage", "mountPath": str(job.storage.path)}],
    }
    claim = {"claimName": job.storage.source}
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": SECONDS_TO_SAVE,
        "containers": [container],
        "volumes": [{"name": "storage", "persistentVolumeClaim": claim}],
    }
    if limits := _limits(job.machine):
        container["resources"] = {"limits": limits}
    if selector := _selector(job.machine):
        pod["nodeSelector"] = selector
    return pod


def _limits(machine: Machine) -> dict[str, int]:
    names = {"tpu": "google.com/tpu", "gpu": "nvidia.com/gpu"}
    return {names[machine.family]: machine.per_host} if machine.family in names else {}


def _selector(machine: Machine) -> dict[str, str]:
    """Labels of the nodes of Google's Kubernetes; elsewhere ask for ``gpu``, which selects none."""
    if machine.family == "tpu":
        return {
            "cloud.google.com/gke-tpu-accelerator": machine.names.gke,
            "cloud.google.com/gke-tpu-topology": machine.topology,
        }
    return {"cloud.google.com/gke-accelerator": machine.names.gke} if machine.names.gke else {}
