"""Two Ray nodes on this machine, to measure a run on several nodes."""

import shutil
import socket
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tiny_run import started, tail

# The controllers need no GPU, and fit only on the first node. Each node has room for a rank and an engine.
NODES = {"first": {"--num-cpus": 8, "--num-gpus": 1}, "second": {"--num-cpus": 1, "--num-gpus": 1}}
PATIENCE = 180  # seconds


@contextmanager
def two_nodes(folder: Path):
    """Yields the address of the cluster, for RAY_ADDRESS. The logs of the nodes are in `folder`."""
    head = f"127.0.0.1:{free_port()}"
    sockets = Path(tempfile.mkdtemp(prefix="ray"))  # their paths must not be longer than 107 characters
    try:
        with ExitStack() as nodes:
            for name, resources in NODES.items():
                start(nodes, name, resources, head, sockets / name, folder / f"{name}.txt")
            yield head
    finally:
        shutil.rmtree(sockets, ignore_errors=True)


def start(nodes: ExitStack, name: str, resources: dict, head: str, sockets: Path, log: Path) -> None:
    """Starts a node and waits until it has joined.

    Raises:
        SystemExit: it did not join. The message has the end of its log.
    """
    flags = {
        **resources,
        "--node-name": name,
        "--temp-dir": sockets,
        "--object-store-memory": 500_000_000,
        "--dashboard-agent-listen-port": free_port(),
        "--metrics-export-port": free_port(),
        # 0 lets the system choose. By default both nodes would count up from 10002.
        "--min-worker-port": 0,
        "--max-worker-port": 0,
    }
    if name == "first":
        where = ["--head", "--port", head.split(":")[1], "--include-dashboard", "false"]
        where += ["--ray-client-server-port", str(free_port())]
    else:
        where = ["--address", head]
    words = [str(word) for pair in flags.items() for word in pair]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    process = nodes.enter_context(started([*command, *where, *words], log, {}))
    deadline = time.monotonic() + PATIENCE
    while "Ray runtime started" not in log.read_text(errors="replace"):
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"needs the Ray node {name!r} within {PATIENCE} seconds, got none; {tail(log)}")
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
