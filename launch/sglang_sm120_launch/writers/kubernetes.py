"""Kubernetes: a StatefulSet and a headless Service for each server, a Deployment and a Service for the router.

`apps/v1` and `v1` alone. A pod's rank is its label `apps.kubernetes.io/pod-index`, which Kubernetes 1.28 and later set.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from ..deployment import Deployment, Process, Shape
from ..errors import LaunchError
from .yaml_text import Said, Words, document

RANK = "NODE_RANK"
SECRET_NAME = "sglang-sm120"


def hosts(shape: Shape) -> list[str]:
    """The names under which the pods reach each other."""
    return [f"sglang-{server}-{rank}.sglang-{server}" for _, server in shape.servers() for rank in range(shape.nodes)]


def files(deployment: Deployment, image: str) -> tuple[dict[str, str], list[str]]:
    """`sglang-sm120.yaml`, and how to apply it.

    Raises:
        LaunchError: the plan chooses cards, which Kubernetes does.
    """
    chosen_by(deployment, "Kubernetes")
    role = "" if deployment.whole() else f"-{deployment.shape.role}"
    documents = []
    for server in deployment.servers():
        documents += [_service(server[0], headless=True), _set(server, deployment, image)]
    for one in deployment.processes:
        if one.plan is None:
            documents += [_service(one, headless=False), _router(one, image)]
    name = f"sglang-sm120{role}.yaml"
    keys = sorted({key for one in deployment.processes for key in one.secrets()})
    steps = [f"kubectl apply -f {name}"]
    if keys:
        literals = " ".join(f"--from-literal={key}=…" for key in keys)
        steps.insert(0, f"kubectl create secret generic {SECRET_NAME} {literals}")
    if deployment.wanted.machine.rdma:
        steps.append("note: the pods have no RDMA device: add your cluster's resource for one.")
    return {name: "---\n".join(map(document, documents))}, steps


def chosen_by(deployment: Deployment, who: str) -> None:
    """Raise LaunchError where the plan takes some of a machine's cards, and `who` hands them out."""
    for entry in deployment.processes[0].settings:
        if entry.kind == "env" and entry.name == "CUDA_VISIBLE_DEVICES":
            raise LaunchError(
                f"The plan takes cards {entry.value} of each machine, and {who} chooses cards by itself: plan with a "
                f"--machine that has those alone."
            )


def escaped(word: str) -> str:
    """A word of a container's command, in which Kubernetes expands `$(NAME)`."""
    return word.replace("$(", "$$(")


def container(one: Process, image: str) -> dict[str, Any]:
    """The container that runs a process: command, arguments with their reasons, variables, the keys' from a secret."""
    keys = [{"name": key, "valueFrom": {"secretKeyRef": {"name": SECRET_NAME, "key": key}}} for key in one.secrets()]
    env = [{"name": entry.name, "value": Said(str(entry.value), entry.reason)} for entry in one.variables()]
    return {
        "name": "main",
        "image": image,
        "command": ["python", "-m", one.module],
        "args": Words(one.words(escaped, lambda name: f"$({name})")),
        "env": [*env, *keys],
    }


def mounted(model: str, main: dict[str, Any]) -> list[dict[str, Any]]:
    """Volumes of a server, mounted into its container: shared memory, and the model's folder of every machine."""
    main["volumeMounts"] = [{"name": "shm", "mountPath": "/dev/shm"}]
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}}]
    if PurePath(model).is_absolute():
        main["volumeMounts"].append({"name": "model", "mountPath": model, "readOnly": True})
        volumes.append({"name": "model", "hostPath": {"path": model, "type": "Directory"}})
    return volumes


def _port(one: Process) -> int:
    return next(int(str(entry.value)) for entry in one.flags() if entry.name == "port")


def _labels(one: Process) -> dict[str, str]:
    return {"app.kubernetes.io/name": "sglang-sm120", "app.kubernetes.io/component": one.server}


def _service(one: Process, headless: bool) -> dict[str, Any]:
    # A headless one names each pod, also those that are not ready: the ranks meet before they are.
    kind = {"clusterIP": "None", "publishNotReadyAddresses": True} if headless else {}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": f"sglang-{one.server}"},
        "spec": {**kind, "selector": _labels(one), "ports": [{"name": "http", "port": _port(one)}]},
    }


def _set(server: list[Process], deployment: Deployment, image: str) -> dict[str, Any]:
    first = server[0]
    main = container(first, image)
    main["args"] = Words(
        (["--node-rank", f"$({RANK})"], reason) if words[0] == "--node-rank" else (words, reason)
        for words, reason in main["args"].groups
    )
    if len(server) > 1:
        field = {"fieldRef": {"fieldPath": "metadata.labels['apps.kubernetes.io/pod-index']"}}
        main["env"].append({"name": RANK, "valueFrom": field})
    main["ports"] = [{"containerPort": _port(first)}]
    main["readinessProbe"] = {"httpGet": {"path": "/health", "port": _port(first)}, "periodSeconds": 10}
    if deployment.cards():
        main["resources"] = {"limits": {"nvidia.com/gpu": deployment.cards()}}
    volumes = mounted(deployment.wanted.model.path, main)
    spec = {"terminationGracePeriodSeconds": 60, "containers": [main], "volumes": volumes}
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": f"sglang-{first.server}"},
        "spec": {
            "serviceName": f"sglang-{first.server}",
            "replicas": len(server),
            "podManagementPolicy": Said("Parallel", "no rank is ready before all are there"),
            "selector": {"matchLabels": _labels(first)},
            "template": {"metadata": {"labels": _labels(first)}, "spec": spec},
        },
    }


def _router(one: Process, image: str) -> dict[str, Any]:
    main = container(one, image)
    main["ports"] = [{"containerPort": _port(one)}]
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "sglang-router"},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": _labels(one)},
            "template": {"metadata": {"labels": _labels(one)}, "spec": {"containers": [main]}},
        },
    }
