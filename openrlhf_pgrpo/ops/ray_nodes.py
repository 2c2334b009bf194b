"""The nodes of a Ray cluster: joining it as a driver, listing the nodes, and asking all of them at once."""

import os
import re
import socket
import time
from typing import NamedTuple

from openrlhf_pgrpo.ops import node_checks


class Node(NamedTuple):
    """A node that is alive: its name here, all names that a user may give it, and the GPUs that Ray counts."""

    name: str
    id: str
    names: set[str]
    gpus: float


class ClusterError(RuntimeError):
    """There is no cluster to ask. The arguments are what was found, and what to do."""


def connect(deadline: float, runtime_env: dict) -> str:
    """Joins the cluster as a driver as soon as it answers; returns its address."""
    import ray

    address = os.environ["RAY_ADDRESS"]
    if not re.fullmatch(r"auto|[^/]+:\d+", address):
        raise ClusterError(
            f"RAY_ADDRESS needs HOST:PORT of the head, got {address}",
            "name the port of ray start --head, which is 6379 by default",
        )
    while True:
        try:
            if address != "auto":  # Ray itself would wait a minute for the address, and then abort
                host, port = address.rsplit(":", 1)
                socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            ray.init(runtime_env=runtime_env, log_to_driver=False, logging_level="ERROR")
            return ray.get_runtime_context().gcs_address
        except (OSError, ray.exceptions.RaySystemError) as error:  # the latter while the head is still starting
            ray.shutdown()
            if time.monotonic() > deadline:
                why = getattr(error, "strerror", None) or " ".join(str(error).split())
                none = "runs on this machine" if address == "auto" else f"at {address}: {why}"
                remedy = "start one with ray start --head, or name it by RAY_ADDRESS=HOST:PORT"
                raise ClusterError(f"no cluster {none}", remedy) from error
        except RuntimeError as error:
            raise ClusterError(" ".join(str(error).split()), "run the doctor on a node of the cluster") from error
        time.sleep(0.5)


def alive_nodes() -> list[Node]:
    """The nodes that Ray counts as alive, the head first."""
    import ray

    found = sorted(
        (node for node in ray.nodes() if node["Alive"]),
        key=lambda node: ("node:__internal_head__" not in node["Resources"], node["NodeName"]),
    )
    nodes = []
    for node in found:
        host, id = node["NodeManagerHostname"], node["NodeID"]
        unnamed = node["NodeName"] == node["NodeManagerAddress"]  # what Ray fills in where --node-name is missing
        name = host if unnamed else node["NodeName"]
        unique = f"{name} ({id[:6]})" if name in [other.name for other in nodes] else name
        nodes.append(Node(unique, id, {name, host, host.split(".")[0]}, node["Resources"].get("GPU", 0)))
    return nodes


def free_gpus() -> dict[str, float]:
    """The free GPUs of each node, by the node's id."""
    # Ray has no public function for it; verl and vLLM use this one too.
    from ray._private.state import available_resources_per_node

    return {id: available.get("GPU", 0) for id, available in available_resources_per_node().items()}


def ask_nodes(nodes: list[Node], patience: float, question, *arguments) -> tuple[dict, dict[str, str]]:
    """Calls the function `question` on all nodes at once.

    Args:
        arguments: of `question`. A dict holds a value for each node, by its name.

    Returns:
        The answers, and the reasons why there is none; both by the name of the node.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.cloudpickle.register_pickle_by_value(node_checks)
    tasks, answers, failed = {}, {}, {}
    for node in nodes:
        own = [argument[node.name] if isinstance(argument, dict) else argument for argument in arguments]
        there = NodeAffinitySchedulingStrategy(node.id, soft=False)
        task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(question)
        tasks[node.name] = task.remote(*own)
    try:
        done, _ = ray.wait([*tasks.values()], num_returns=len(tasks), timeout=patience)
    except BaseException:  # Ctrl-C: what has not begun must not begin after the cleaning up
        for task in tasks.values():
            ray.cancel(task, force=True)
        raise
    for name, task in tasks.items():
        if task not in done:
            ray.cancel(task, force=True)
            failed[name] = f"no answer within {patience:g} s"
            continue
        try:
            answers[name] = ray.get(task)
        except ray.exceptions.RayError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            failed[name] = lines[-1] if isinstance(error, ray.exceptions.RayTaskError) else lines[0]
    return answers, failed
