"""The verbs of a door."""

import os
import re
import subprocess
import sys
import traceback

import pytest
import ray

from openrlhf_pgrpo.host import device, doors, hooks
from openrlhf_pgrpo.host.ppo import ray_start
from openrlhf_pgrpo.host.versions import SeamError
from openrlhf_pgrpo.models import remote_code

pytestmark = pytest.mark.host

SIZES = (
    "--rollout.batch_size 8 --rollout.n_samples_per_prompt 2 --rollout.micro_batch_size 4 --train.batch_size 16 "
    "--train.micro_batch_size 4 --data.max_len 64"
).split()
RUN = ("--advantage_estimator", "pgrpo", "--data.pref_group_key", "persona", "--vllm.num_engines", "1", *SIZES)


@pytest.fixture
def words(tiny):
    """Those of a run whose rewards come from a model of its own."""
    files = {"data.prompt_dataset": "prompts.jsonl", "actor.model_name_or_path": "model"}
    files["reward.model_name_or_path"] = "model"
    return [*RUN, *(word for flag, name in files.items() for word in (f"--{flag}", str(tiny / name)))]


@pytest.fixture
def started(monkeypatch):
    """What Ray is started with, instead of starting it."""
    calls = []
    monkeypatch.setattr(ray, "init", lambda **kwargs: calls.append(kwargs))
    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return calls


@pytest.fixture
def opened(host_parser, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # with the folders of the run

    def opened():
        args = doors.PPO.parse_args(host_parser(), words)
        doors.PPO.prepare(args)
        return args

    return opened


def test_ray_gets_our_hook_and_logical_gpus_beside_what_the_host_says(opened, started):
    args = opened()
    assert vars(args)["ds.attn_implementation"] == "sdpa"  # adapted, in the flat form that the host goes on with
    ray.init(runtime_env={"env_vars": {"NCCL_DEBUG": "WARN"}})
    (call,) = started
    assert call["runtime_env"]["worker_process_setup_hook"] == "openrlhf_pgrpo.host.ppo.worker.setup"
    assert call["runtime_env"]["env_vars"]["NCCL_DEBUG"] == "WARN"
    assert call["runtime_env"]["env_vars"][hooks.DEVICE] == "cpu"
    assert call["num_gpus"] == 4 and call["num_cpus"] == 5  # actor, reference, reward model, engine; and the trainer
    assert call["address"] == "local"  # not a cluster that happens to run on this machine


def test_an_existing_cluster_keeps_its_own_resources(opened, started, monkeypatch):
    opened()
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    ray.init()
    assert set(started[0]) == {"runtime_env"}


def test_somebody_elses_worker_hook_is_refused(opened, started):
    opened()
    with pytest.raises(SeamError, match="in use, 'mine.setup': call openrlhf_pgrpo.host.ppo.worker.setup"):
        ray.init(runtime_env={"worker_process_setup_hook": "mine.setup"})
    assert started == []


@pytest.mark.parametrize(
    "address, need, doctor",
    [
        ("", "a Ray that starts on this machine", "doctor says"),
        ("head:6379", r"the Ray cluster at head:6379 \(RAY_ADDRESS\)", "doctor --cluster says"),
    ],
)
def test_a_ray_that_does_not_start_is_the_last_word(opened, started, monkeypatch, address, need, doctor):
    """The last line of the traceback: what Ray raised, of whatever type, and what to do."""
    monkeypatch.setattr(ray, "init", lambda **kwargs: 1 / 0)
    opened()
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ZeroDivisionError) as refused:
        ray.init()
    last = traceback.format_exception(refused.value)[-1]
    assert re.fullmatch(
        rf"\[pgrpo\] the run has failed: training needs {need}, got ZeroDivisionError: division by zero: see what "
        rf"openrlhf-pgrpo {doctor}, then give the same command again\n",
        last,
    )


def test_a_running_ray_is_refused(opened, started, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with pytest.raises(SeamError, match="needs to start Ray, got a running one"):
        opened()


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
    assert [door.on_ray for door in (doors.PPO, doors.DPO, doors.RM, doors.SERVE)] == [True, False, False, False]
    assert device.choose("auto", on_ray=False) == "cpu"  # a trainer on pairs runs here, whatever cluster there is
    with pytest.raises(SeamError, match="gpu needs a CUDA device here, got none"):
        device.choose("gpu", on_ray=False)


@pytest.mark.parametrize("address", ["", " ", "local"])
def test_d4_an_address_that_names_no_cluster_is_none(address, monkeypatch):
    """RAY_ADDRESS empty or local starts Ray on this machine, whose device counts."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setitem(os.environ, hooks.DEVICE, "cpu")
    assert device.choose("auto") == "cpu" and ray_start.own_ray()["address"] == "local"
    with pytest.raises(SeamError, match="needs a CUDA device here"):
        device.choose("gpu")


def test_d5_what_a_look_finds_is_said_before_the_host_is_imported(tmp_path):
    """A run that cannot start says so in seconds: the host's imports, and Ray, come after the look."""
    code = (
        "import sys; from openrlhf_pgrpo.host import doors\n"
        "heavy = {'ray', 'vllm', 'deepspeed', 'openrlhf.models'}\n"
        "try: doors.PPO.run()\n"
        "except SystemExit as end: print(end.code, sorted(heavy & {*sys.modules}))"
    )
    ended = subprocess.run([sys.executable, "-c", code, *RUN], capture_output=True, text=True, cwd=tmp_path)
    assert ended.stdout.endswith("2 []\n"), ended.stderr
    assert "error: PPO needs rewards, got none of --reward.remote_url" in ended.stderr


def test_d18_a_plugin_that_is_missing_is_a_usage_message(tmp_path):
    """No traceback: the flag, what it names, what to do."""
    words = [sys.executable, "-m", "openrlhf_pgrpo.cli.train_ppo_ray", "--pgrpo.plugin", "mine.py"]
    ended = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "error: --pgrpo.plugin: a plugin needs an existing file, got 'mine.py'" in ended.stderr


def test_e1_code_of_models_runs_only_if_asked_for(monkeypatch):
    """--trust_remote_code reaches this process and its children before anything is loaded."""
    monkeypatch.setitem(os.environ, remote_code.VARIABLE, "0")
    doors.RM.choose(["--pgrpo.device", "cpu"])
    assert not remote_code.trusted()
    doors.RM.choose(["--pgrpo.device", "cpu", "--trust_remote_code"])
    assert remote_code.trusted()


def test_of_a_launchers_processes_one_speaks_and_all_refuse(monkeypatch, capsys):
    """Each machine's first process says what is refused; sentences come from the first of all."""
    door = doors.RM
    for rank, local_rank in ((0, 0), (1, 1), (8, 0)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        door._say(["a sentence"])
        assert ("[pgrpo] a sentence" in capsys.readouterr().out) == (rank == 0)
        with pytest.raises(SystemExit) as ended:
            door._refuse("wrong")
        assert ended.value.code == 2 and ("error: wrong" in capsys.readouterr().err) == (local_rank == 0)
