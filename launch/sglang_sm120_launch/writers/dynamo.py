"""NVIDIA Dynamo on Kubernetes: one DynamoGraphDeployment, whose operator hands out ranks and addresses.

Format: `nvidia.com/v1beta1`, github.com/ai-dynamo/dynamo, deploy/operator/api/v1beta1 at
006b6e1085b60436ba0f77378749ec3a0f01fc24 and examples/backends/sglang/deploy/v1beta1 at
04521f473b68375705a553f4082fac8254d71a2f. Flags and names of parsers: the packages ai-dynamo and ai-dynamo-runtime of
`RUNTIME` (`dynamo.sglang.args`, `dynamo._core.get_tool_parser_names` and `get_reasoning_parser_names`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ..deployment import RANKS, Deployment, Process
from ..errors import LaunchError
from .kubernetes import chosen_by, container, mounted
from .srt_slurm import complete
from .yaml_text import Said, Words, document

RUNTIME = "1.6.1"
"""Dynamo's own version in the image: the package ai-dynamo of it, beside this one."""
DECIDED = (*RANKS, "port")
"""Flags that the operator gives each pod, and one that Dynamo's workers have no use for."""
PARSERS = {"tool-call-parser": {"deepseekv4": "deepseek_v4"}, "reasoning-parser": {"deepseek-v4": "deepseek_v4"}}
"""SGLang's flag -> its name of a parser -> Dynamo's, for the same flag with `dyn-` before it."""


def files(deployment: Deployment, image: str) -> tuple[dict[str, str], list[str]]:
    """`sglang-sm120.dynamo.yaml`, and how to apply it.

    Raises:
        LaunchError: the file cannot say what the plan does.
    """
    complete(deployment, "Dynamo")
    chosen_by(deployment, "Kubernetes")
    front = {"name": "main", "image": image}
    components = [_component("Frontend", "frontend", 1, front)]
    shape, seen = deployment.shape, set()
    for first, *_ in deployment.servers():
        if first.role in seen:
            continue
        seen.add(first.role)
        count = {"prefill": shape.prefill, "decode": shape.decode}.get(first.role, 1)
        main = _worker(first, deployment, image)
        volumes = mounted(deployment.wanted.model.path, main)
        # The operator mounts shared memory itself.
        main["volumeMounts"] = [one for one in main["volumeMounts"] if one["name"] != "shm"]
        kind = "worker" if first.role == "server" else first.role
        component = _component(kind, kind, count, main)
        component["sharedMemorySize"] = "16Gi"
        component["podTemplate"]["spec"]["volumes"] = [one for one in volumes if one["name"] != "shm"]
        if shape.nodes > 1:
            component["multinode"] = {"nodeCount": shape.nodes}
        components.append(component)
    text = document(
        {
            "apiVersion": "nvidia.com/v1beta1",
            "kind": "DynamoGraphDeployment",
            "metadata": {"name": "sglang-sm120"},
            "spec": {"backendFramework": "sglang", "components": components},
        }
    )
    name = "sglang-sm120.dynamo.yaml"
    return {name: text}, [f"with Dynamo's operator, and ai-dynamo {RUNTIME} in {image}: kubectl apply -f {name}"]


def _component(name: str, kind: str, count: int, main: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "type": kind,
        "replicas": count,
        "runtimeVersionOverride": Said(RUNTIME, "Dynamo's version in the image, whose tag is this package's"),
        "podTemplate": {"spec": {"containers": [main]}},
    }


def _worker(one: Process, deployment: Deployment, image: str) -> dict[str, Any]:
    main = container(one, image)
    main["command"] = ["python3", "-m", "dynamo.sglang"]
    main["args"] = Words(list(_arguments(main["args"].groups)))
    main["resources"] = {"limits": {"nvidia.com/gpu": str(deployment.cards())}}
    return main


def _arguments(groups: Iterable[tuple[list[str], str]]) -> Iterator[tuple[list[str], str]]:
    """What Dynamo's worker takes of SGLang's flags, and its own: its frontend parses what a model says, not SGLang."""
    for words, why in groups:
        name = words[0][2:]
        # With a tool parser of SGLang's and one of Dynamo's the worker ends; with one for thinking each they share the
        # work: SGLang's says where a grammar begins.
        if name not in (*DECIDED, "tool-call-parser"):
            yield words, why
        if name in PARSERS:
            known = PARSERS[name]
            if words[1] not in known:
                raise LaunchError(
                    f"--{name} is {words[1]}, whose name in Dynamo {RUNTIME} is not known here, needed "
                    f"{', '.join(known)}: leave it out."
                )
            yield [f"--dyn-{name}", known[words[1]]], f"Dynamo's frontend parses, by its own name: {why}"
