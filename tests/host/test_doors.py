"""The two calls that every door makes."""

import os
import sys

import pytest
import ray

from openrlhf_pgrpo.host import doors, seams

pytestmark = pytest.mark.host

RUN = ("--advantage_estimator", "pgrpo", "--pgrpo.group_key", "persona", "--vllm.num_engines", "1")


@pytest.fixture
def started(monkeypatch):
    """What Ray is started with, instead of starting it."""
    calls = []
    monkeypatch.setattr(ray, "init", lambda **kwargs: calls.append(kwargs))
    monkeypatch.setattr(ray, "nodes", lambda: [])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return calls


def test_ray_gets_our_hook_and_logical_gpus_beside_what_the_host_says(host_parser, started):
    args = doors.parse_args(host_parser(), [*RUN])
    assert vars(args)["ds.attn_implementation"] == "sdpa"  # adapted, in the flat form that the host goes on with
    ray.init(runtime_env={"env_vars": {"NCCL_DEBUG": "WARN"}})
    (call,) = started
    assert call["runtime_env"]["worker_process_setup_hook"] == "openrlhf_pgrpo.host.seams.setup_worker"
    assert call["runtime_env"]["env_vars"]["NCCL_DEBUG"] == "WARN"
    assert call["runtime_env"]["env_vars"][seams.DEVICE] == "cpu"
    assert call["num_gpus"] == 4 and call["num_cpus"] == 5  # actor, reference, reward model, engine; and the trainer
    assert call["address"] == "local"  # not a cluster that happens to run on this machine


def test_an_existing_cluster_keeps_its_own_resources(host_parser, started, monkeypatch):
    doors.parse_args(host_parser(), [*RUN])
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    ray.init()
    assert set(started[0]) == {"runtime_env"}


def test_somebody_elses_worker_hook_is_refused(host_parser, started):
    doors.parse_args(host_parser(), [*RUN])
    with pytest.raises(seams.SeamError, match="in use, 'mine.setup': call openrlhf_pgrpo.host.seams.setup_worker"):
        ray.init(runtime_env={"worker_process_setup_hook": "mine.setup"})
    assert started == []


def test_a_running_ray_is_refused(host_parser, started, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with pytest.raises(seams.SeamError, match="needs to start Ray, got a running one"):
        doors.parse_args(host_parser(), [*RUN])


def test_a_refusal_is_a_usage_message(host_parser, started, capsys):
    with pytest.raises(SystemExit):
        doors.parse_args(host_parser(), [*RUN, "--ds.packing_samples"])
    assert "error: --ds.packing_samples needs flash-attn, got True" in capsys.readouterr().err


def test_the_device_follows_what_is_there(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert doors.choose_device("auto") == doors.choose_device("cpu") == "cpu"
    with pytest.raises(seams.SeamError, match="--pgrpo.device gpu needs a CUDA device here, or a cluster"):
        doors.choose_device("gpu")
    monkeypatch.setitem(os.environ, "RAY_ADDRESS", "127.0.0.1:1")
    assert doors.choose_device("auto") == doors.choose_device("gpu") == "gpu"
    assert doors.choose_device("cpu") == "cpu"
