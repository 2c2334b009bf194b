"""A real Slurm cluster of two nodes on this machine, in its own folder. The system's Slurm is not touched."""

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest

from two_nodes import free_port

DAEMONS = ("munged", "slurmctld", "slurmd")
NODES = {"n1": 1, "n2": 1}  # name: GPUs; plain files take their place


class Slurm:
    """A controller and two nodes. Jobs see `environment`, which marks all their processes."""

    def __init__(self, folder: Path, started):
        self.folder, self.started, self.daemons, self.mark = folder, started, [], uuid.uuid4().hex
        self.environment = {**os.environ, **started.environment(self.mark), "SLURM_CONF": str(folder / "slurm.conf")}
        self.environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

    def start(self) -> None:
        folder = self.folder
        self._configure()
        munge = ["setpriv", "--reuid", "munge", "--regid", "munge", "--clear-groups", "munged", "--foreground"]
        for name in ("key", "socket", "pid", "log", "seed"):
            munge += [f"--{name}{'' if name == 'socket' else '-file'}", folder / "munge" / name]
        self._start("munged", munge)
        self._wait(lambda: (folder / "munge" / "socket").exists())
        self._start("slurmctld", ["slurmctld", "-D"])
        for name in NODES:
            self._start(name, ["slurmd", "-D", "-N", name])
        idle = ("sinfo", "--noheader", "--states", "idle", "--Node", "--partition", "normal", "--format", "%N")
        self._wait(lambda: self(*idle).split() == [*NODES])

    def _configure(self) -> None:
        folder, host = self.folder, socket.gethostname().split(".")[0]
        (folder / "munge").mkdir()
        (folder / "munge" / "key").write_bytes(secrets.token_bytes(1024))
        (folder / "munge" / "key").chmod(0o400)
        for path in (folder / "munge" / "key", folder / "munge"):
            shutil.chown(path, "munge", "munge")
        settings = {
            "ClusterName": "test",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": free_port(),
            "SlurmUser": "root",
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={folder / 'munge' / 'socket'}",
            "StateSaveLocation": folder / "state",
            "SlurmdSpoolDir": folder / "%n",
            "SlurmctldPidFile": folder / "slurmctld.pid",
            "SlurmdPidFile": folder / "%n.pid",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "MpiDefault": "none",
            "SelectType": "select/cons_tres",
            "SlurmdParameters": "config_overrides",
            "GresTypes": "gpu",
            "SchedulerParameters": "sched_interval=2,bf_interval=2,batch_sched_delay=1",
            "KillWait": 10,
            # A job in the partition `urgent` takes the nodes of others, which get their --signal and a minute to end.
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            "SlurmctldParameters": "preempt_send_user_signal",
            "ReturnToService": 2,
        }
        lines = [f"{name}={value}" for name, value in settings.items()]
        for name, gpus in NODES.items():
            where = f"NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()}"
            lines.append(f"NodeName={name} {where} CPUs=8 RealMemory=8000 Gres=gpu:{gpus} State=UNKNOWN")
        lines.append("PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 GraceTime=60")
        lines.append("PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF")
        (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        (folder / "state").mkdir()
        files = []
        for name, gpus in NODES.items():
            (folder / name).mkdir()
            for gpu in range(gpus):
                (folder / name / f"gpu{gpu}").touch()
                files.append(f"NodeName={name} Name=gpu File={folder / name / f'gpu{gpu}'}")
        (folder / "gres.conf").write_text("\n".join(files) + "\n")

    def _start(self, name: str, command: list) -> None:
        self.daemons.append(self.started(command, self.folder / f"{name}.txt", self.environment))

    def _wait(self, ready, limit: float = 60) -> None:
        deadline = time.monotonic() + limit
        while not ready():
            tails = "\n".join(daemon.tail() for daemon in self.daemons)
            assert time.monotonic() < deadline and all(one.process.poll() is None for one in self.daemons), tails
            time.sleep(0.2)

    def __call__(self, *command: str, **variables) -> str:
        """Runs a command of Slurm to its end."""
        environment = {**self.environment, **{name: str(value) for name, value in variables.items()}}
        done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=60)
        return done.stdout if done.returncode == 0 else f"{done.stdout}{done.stderr}"

    def submit(self, *words: str, **variables) -> int:
        """Runs `sbatch` and returns the number of the job."""
        return int(self("sbatch", "--parsable", *words, **variables))

    def job(self, number: int) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        pairs = (word.split("=", 1) for word in self("scontrol", "show", "job", number).split() if "=" in word)
        return dict(pairs)

    @property
    def processes(self) -> list[int]:
        """The live processes of jobs."""
        return self.started.marked(self.mark)

    def stop(self) -> None:
        for daemon in reversed(self.daemons):
            daemon.kill()
        for pid in self.processes:
            os.kill(pid, signal.SIGKILL)


def why_not() -> str | None:
    """Why Slurm cannot run here."""
    if os.geteuid():
        return "Slurm's daemons start jobs of other users: needs root"
    missing = [name for name in (*DAEMONS, "setpriv") if shutil.which(name) is None]
    if missing:
        return f"needs {', '.join(missing)}: make test-slurm, or apt-get install slurm-wlm munge"
    if "munge" not in {entry.pw_name for entry in pwd.getpwall()}:
        return "needs a user munge: apt-get install munge makes one"
    return None


@pytest.fixture(scope="module")
def slurm(started):
    if reason := why_not():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    folder.chmod(0o755)  # munged runs as its own user and must reach its socket
    cluster = Slurm(folder, started)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)
