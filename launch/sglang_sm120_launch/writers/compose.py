"""A file for docker compose on each host."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from ..deployment import Deployment, Process
from .yaml_text import Said, Words, document


def files(deployment: Deployment, image: str) -> tuple[dict[str, str], list[str]]:
    """`compose.HOST.yaml` for every host, and how to start each."""
    found, steps = {}, []
    for host in deployment.hosts():
        here = [one for one in deployment.processes if one.host == host]
        name = f"compose.{host}.yaml"
        services = {one.name: _service(one, deployment, image) for one in here}
        found[name] = document({"name": "sglang-sm120", "services": services, "volumes": {"home": {}}})
        keys = "".join(f" with {one}" for one in sorted({key for process in here for key in process.secrets()}))
        steps.append(f"on {host}{keys}: docker compose -f {name} up -d")
    return found, steps


def _service(one: Process, deployment: Deployment, image: str) -> dict[str, Any]:
    machine, model = deployment.wanted.machine, deployment.wanted.model.path
    service: dict[str, Any] = {
        "image": image,
        "entrypoint": ["python", "-m", one.module],
        "command": Words(one.words(lambda word: word.replace("$", "$$"), lambda name: f"${{{name}:?}}")),
        "network_mode": "host",
        "ulimits": {"nofile": 65535},
        "healthcheck": {"disable": Said(True, "the image's own asks a server that `sglang-sm120 serve` started")},
        "stop_grace_period": "60s",
        "restart": "on-failure",
    }
    if variables := one.variables():
        service["environment"] = {
            entry.name: Said(str(entry.value).replace("$", "$$"), entry.reason) for entry in variables
        }
    if one.plan is None:
        return service
    service["shm_size"] = Said("16g", "where the ranks of one machine meet")
    service["volumes"] = ["home:/home/sglang"]
    if PurePath(model).is_absolute():
        service["volumes"].append(f"{model}:{model}:ro")
    if machine.rdma:
        service["ulimits"]["memlock"] = -1
        service["devices"] = ["/dev/infiniband"]
    if machine.gpus:
        cards = {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [cards]}}}
    return service
