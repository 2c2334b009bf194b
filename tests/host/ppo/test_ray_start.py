"""The Ray that we start, for real."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

pytestmark = pytest.mark.host

ENGINE = """
import os, subprocess, threading, types
import numpy as np
import ray
from openrlhf_pgrpo.host import device, hooks
from openrlhf_pgrpo.host.ppo import ray_start

os.environ[device.DEVICE] = "cpu"
os.environ.update(device.environment())
role = types.SimpleNamespace(num_nodes=1, num_gpus_per_node=1)
section = types.SimpleNamespace
ray_start.prepare(section(
    actor=role, algo=section(kl=section(init_coef=0), advantage=section(estimator="pgrpo")), train=section(
    async_enable=False, agent_func_path=None), reward=section(remote_url="r.py"),
    vllm=section(num_engines=1, tensor_parallel_size=1), ckpt=section(path=".")))
ray.init()


@ray.remote
class Engine:
    def use_the_store(self):  # who does so while Ray is killed ends at once, and leaves children behind
        while True:
            ray.put(np.zeros(10**6))

    def start(self):
        threading.Thread(target=self.use_the_store).start()
        self.computes = subprocess.Popen(["sleep", "300"])
        return os.getpid(), self.computes.pid, os.environ["OMP_NUM_THREADS"], bool(hooks.register.done)


engine = Engine.options(runtime_env={"env_vars": {"OMP_NUM_THREADS": "42"}}).remote()  # as `patch_engine` does
pid, child, *ready = ray.get(engine.start.remote())
assert ready == ["42", True], ready
print(pid, child, flush=True)
input()
"""


@pytest.mark.parametrize("killed", ["engine", "driver"])
def test_an_actor_gets_our_hook_and_what_it_started_ends_with_it(tmp_path, killed):
    """vLLM computes in a process that a rollout engine starts. An engine has an environment of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", ENGINE]
    with subprocess.Popen(
        command, env=environment, cwd=tmp_path, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as driver:
        engine, child = map(int, driver.stdout.readline().split())
        os.kill(engine if killed == "engine" else driver.pid, signal.SIGKILL)
        try:
            for _ in range(60):
                time.sleep(0.5)
                if not os.path.exists(f"/proc/{child}"):
                    break
            else:
                pytest.fail(f"process {child} lives 30 seconds after the {killed} was killed")
        finally:
            with suppress(ProcessLookupError):
                os.kill(child, 9)
            if killed == "engine":
                driver.communicate("\n", timeout=60)
    assert driver.returncode == (0 if killed == "engine" else -signal.SIGKILL)
