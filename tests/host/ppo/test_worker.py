"""What a worker has started ends with it."""

import os
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.host

# A reward function may compute in processes of its own, forked from the worker, as Python's pools do by default.
WORKER = """
import multiprocessing, os, subprocess, time
from concurrent.futures import ProcessPoolExecutor
from openrlhf_pgrpo.host.ppo import worker

def open_files():
    return len(os.listdir("/proc/self/fd"))

def keeps_files_in_a_fork():
    os.open(os.devnull, os.O_RDONLY)  # the number of the guard's end is free, unless multiprocessing has taken it
    here = open_files()
    if (child := os.fork()) == 0:
        os._exit(open_files() != here)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

shell = worker.guard()
engine = subprocess.Popen(["sleep", "300"])
pool = ProcessPoolExecutor(1, multiprocessing.get_context("fork"))
print(pool.submit(keeps_files_in_a_fork).result(), flush=True)
time.sleep(300)
"""


def test_a_killed_worker_leaves_nothing_running_though_it_has_forked():
    worker = subprocess.Popen([sys.executable, "-c", WORKER], stdout=subprocess.PIPE, text=True)
    try:
        assert worker.stdout.readline() == "True\n"
        worker.kill()
        worker.communicate(timeout=20)  # until all that hold its output have ended
    finally:
        worker.kill()
        try:
            os.killpg(worker.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
