"""The verbs of a door."""

import os
import sys

import pytest
import ray

from openrlhf_pgrpo.host import device, doors, hooks
from openrlhf_pgrpo.host.versions import SeamError

pytestmark = pytest.mark.host

RUN = ("--advantage_estimator", "pgrpo", "--data.pref_group_key", "persona", "--vllm.num_engines", "1")


@pytest.fixture
def started(monkeypatch):
    """What Ray is started with, instead of starting it."""
    calls = []
    monkeypatch.setattr(ray, "init", lambda **kwargs: calls.append(kwargs))
    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return calls


def opened(host_parser):
    args = doors.PPO.parse_args(host_parser(), [*RUN])
    doors.PPO.prepare(args)
    return args


def test_ray_gets_our_hook_and_logical_gpus_beside_what_the_host_says(host_parser, started):
    args = opened(host_parser)
    assert vars(args)["ds.attn_implementation"] == "sdpa"  # adapted, in the flat form that the host goes on with
    ray.init(runtime_env={"env_vars": {"NCCL_DEBUG": "WARN"}})
    (call,) = started
    assert call["runtime_env"]["worker_process_setup_hook"] == "openrlhf_pgrpo.host.ppo.worker.setup"
    assert call["runtime_env"]["env_vars"]["NCCL_DEBUG"] == "WARN"
    assert call["runtime_env"]["env_vars"][hooks.DEVICE] == "cpu"
    assert call["num_gpus"] == 4 and call["num_cpus"] == 5  # actor, reference, reward model, engine; and the trainer
    assert call["address"] == "local"  # not a cluster that happens to run on this machine


def test_an_existing_cluster_keeps_its_own_resources(host_parser, started, monkeypatch):
    opened(host_parser)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    ray.init()
    assert set(started[0]) == {"runtime_env"}


def test_somebody_elses_worker_hook_is_refused(host_parser, started):
    opened(host_parser)
    with pytest.raises(SeamError, match="in use, 'mine.setup': call openrlhf_pgrpo.host.ppo.worker.setup"):
        ray.init(runtime_env={"worker_process_setup_hook": "mine.setup"})
    assert started == []


def test_a_running_ray_is_refused(host_parser, started, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with pytest.raises(SeamError, match="needs to start Ray, got a running one"):
        opened(host_parser)


def test_a_refusal_is_a_usage_message(host_parser, started, capsys):
    with pytest.raises(SystemExit):
        doors.PPO.parse_args(host_parser(), [*RUN, "--ds.packing_samples"])
    assert "error: --ds.packing_samples needs flash-attn, got True" in capsys.readouterr().err


def test_parsing_starts_nothing(host_parser, started):
    plain = ray.init
    doors.PPO.parse_args(host_parser(), [*RUN])
    assert ray.init is plain


def test_the_device_follows_what_is_there(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert device.choose("auto") == device.choose("cpu") == "cpu"
    with pytest.raises(SeamError, match="--pgrpo.device gpu needs a CUDA device here, or a cluster"):
        device.choose("gpu")
    monkeypatch.setitem(os.environ, "RAY_ADDRESS", "127.0.0.1:1")
    assert device.choose("auto") == device.choose("gpu") == "gpu"
    assert device.choose("cpu") == "cpu"
