"""Could a training run start on this Ray cluster? Asks every node what it has, and compares the nodes.

A separate process asks and reports line by line. It is ended if it hangs, and the output of Ray stays inside it.
"""

import itertools
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from openrlhf_pgrpo.host import device, hooks, versions
from openrlhf_pgrpo.host.ppo import ray_start
from openrlhf_pgrpo.ops import cluster_checks, node_checks
from openrlhf_pgrpo.ops.doctor import FAULT, OK, Finding, stop
from openrlhf_pgrpo.ops.like import ANSWER
from openrlhf_pgrpo.ops.ray_nodes import ClusterError, alive_nodes, ask_nodes, connect, free_gpus

PATIENCE = 120  # seconds a node has for each answer; importing torch from a network disk takes the longest


class Questions(NamedTuple):
    """What to ask a cluster: the flags of `doctor --cluster`, and the seconds that a node has for each answer."""

    device: str = "auto"
    nodes: tuple[str, ...] = ()
    wait: float = 0
    gpus: int | None = None
    checkpoints: str | None = None
    patience: float = PATIENCE


def diagnose(questions: Questions) -> Iterator[Finding]:
    """Findings one after the other, about the cluster at RAY_ADDRESS, or else the one that runs on this machine.

    Each node is compared with what most nodes have; in a tie, with the head.
    """
    code = f"from {__name__} import print_findings; print_findings()"
    # Ray lets workers import from the driver's folder. In an empty one they find nothing that their node lacks.
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(questions)],
            cwd=empty,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # Ctrl-C reaches us alone; our SIGTERM lets the process remove its probe files
        )
        try:
            yield from _relay(process, errors, questions)
        finally:
            stop(process, questions.patience)  # a busy node takes a while to remove its probe file


def _relay(process: subprocess.Popen, errors, questions: Questions) -> Iterator[Finding]:
    """The findings that the process prints, and a fault if it hangs or fails."""
    lines = queue.Queue()

    def read():
        for line in itertools.chain(process.stdout, [None]):
            lines.put(line)

    threading.Thread(target=read, daemon=True).start()
    limit = questions.wait + questions.patience
    while True:
        try:
            line = lines.get(timeout=limit)
        except queue.Empty:
            yield Finding(FAULT, "cluster", f"no answer within {limit:g} s", "does ray status answer on the head?")
            return
        if line is None:
            break
        if line.startswith(ANSWER):
            yield Finding(*json.loads(line.removeprefix(ANSWER)))
            limit = questions.wait + 4 * questions.patience  # several late answers may come before a line
    if process.wait() != 0:
        errors.seek(0)
        last = [line.strip() for line in errors if line.strip()] or [f"ended with code {process.returncode}"]
        yield Finding(FAULT, "cluster", last[-1])


# ---- the process that asks ------------------------------------------------------------------------------------------


def print_findings() -> None:
    for finding in inspect(Questions(*json.loads(sys.argv[1]))):
        print(ANSWER + json.dumps(finding), flush=True)


def inspect(questions: Questions) -> Iterator[Finding]:
    import ray

    deadline = time.monotonic() + questions.wait
    os.environ["RAY_ADDRESS"] = device.cluster() or "auto"
    os.environ[hooks.DEVICE] = chosen = device.choose(questions.device)
    try:
        # Without this, Ray hides the GPUs from a task that has none, and torch could not count them.
        address = connect(deadline, {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}})
        yield Finding(OK, "cluster", f"Ray at {address}, for device {chosen}")
        yield cluster_checks.check_joined(questions.nodes, questions.wait, deadline)
        nodes = alive_nodes()
        found, failed = ask_nodes(nodes, questions.patience, node_checks.describe_node, versions.PACKAGES)
        for name, why in failed.items():
            yield Finding(FAULT, "nodes", f"{name}: {why}", f"see what Ray says about {name}: ray list nodes")
        nodes = [node for node in nodes if node.name in found]
        if nodes:
            yield from cluster_checks.check_nodes(found, chosen)
            cuda = {name: answer["cuda"] for name, answer in found.items()} if chosen == "gpu" else None
            yield from cluster_checks.check_gpus(nodes, free_gpus(), cuda, questions.gpus)
        if nodes and questions.checkpoints is not None:
            yield from cluster_checks.check_checkpoints(nodes, questions.checkpoints, questions.patience)
        ray.shutdown()
        nodes = [node for node in nodes if found[node.name]["files"]]
        if nodes:
            connect(deadline, ray_start.worker_environment())
            yield from cluster_checks.check_hook(nodes, questions.patience)
            ray.shutdown()
    except ClusterError as error:
        yield Finding(FAULT, "cluster", *error.args)
