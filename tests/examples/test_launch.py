"""The launch scripts run in a real bash, and what they start is what the host and our doors accept."""

import argparse
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from openrlhf_pgrpo.host import doors, flags, hooks, plan
from openrlhf_pgrpo.host.script import host_parser

pytestmark = pytest.mark.host

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "launch"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.sh"))
STUB = """#!{python} -IS
import json, os, pathlib, sys
argv = [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]
if argv[1] == "-c":  # how many GPUs are here
    print(os.environ["GPUS_HERE"])
else:
    pathlib.Path(os.environ["RECORD"]).write_text(json.dumps(argv))
"""
DOORS = {
    "openrlhf_pgrpo.cli.train_ppo_ray": doors.PPO,
    "openrlhf_pgrpo.cli.train_dpo": doors.DPO,
    "openrlhf_pgrpo.cli.train_rm": doors.RM,
    "openrlhf_pgrpo.cli.serve_rm": doors.SERVE,
}
CLUSTER = {"RAY_JOBS": "http://head:8265"}
ONLINE = {"POLICY": "policy", "PROMPTS": "prompts.jsonl", "REWARD": "reward.py", "OUT": "run"}
PAIRS = {"POLICY": "policy", "PAIRS": "pairs.jsonl", "OUT": "run"}
TRAIN = {"MODEL": "model", "PAIRS": "pairs.jsonl", "HELD_OUT": "held.jsonl", "RM": "rm"}
FACTORIZED = {"RM": "rm", "POLICY": "policy", "PROMPTS": "prompts.jsonl", "OUT": "run"}

# Name: script and its words, the variables it needs, GPUs by default, and the folder of its checkpoints.
USES = {
    "single_node": ("single_node.sh", ONLINE, 8, "run/checkpoints/_actor"),
    "ray_job": ("ray_job.sh", CLUSTER | ONLINE, 16, "run/checkpoints/_actor"),
    "async": ("async_partial_rollout.sh", CLUSTER | ONLINE, 16, "run/checkpoints/_actor"),
    "zero3": ("zero3_tensor_parallel.sh", CLUSTER | ONLINE, 32, "run/checkpoints/_actor"),
    "lora": ("lora_dpo.sh", PAIRS, 8, "run/checkpoints"),
    "group_robust": ("group_robust_dpo.sh", PAIRS | {"HELD_OUT": "held.jsonl"}, 8, "run/checkpoints"),
    "factorized train": ("factorized_reward.sh train", TRAIN, 8, "rm/checkpoints"),
    "factorized serve": ("factorized_reward.sh serve", {"RM": "rm"}, 1, None),
    "factorized use": ("factorized_reward.sh use", CLUSTER | FACTORIZED, 8, "run/checkpoints/_actor"),
}
ONLINE_USES = [name for name, (_, _, _, latest) in USES.items() if latest and latest.endswith("_actor")]
JOBS = [name for name, (_, needs, _, _) in USES.items() if "RAY_JOBS" in needs]
PAIR_USES = [name for name in USES if name not in ONLINE_USES and name != "factorized serve"]


@pytest.fixture
def here(tmp_path, factorized):
    """A folder with programs that only record how they were called, and every file that a script names."""
    shutil.copytree(factorized, tmp_path / "rm")
    config = json.loads((tmp_path / "rm" / "config.json").read_text())  # texts as long as the script's default
    longer = {"max_position_embeddings": 2048, "base_reward_max_length": 2048}
    (tmp_path / "rm" / "config.json").write_text(json.dumps(config | longer))
    (tmp_path / "bin").mkdir()
    for name in ("python", "ray", "deepspeed"):
        stub = tmp_path / "bin" / name
        stub.write_text(STUB.format(python=sys.executable))
        stub.chmod(0o755)
    for name in ("prompts.jsonl", "reward.py", "pairs.jsonl", "held.jsonl"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.fixture
def launch(here):
    """Runs a use with variables and with words for the trainer. Returns how it ended, and what it called."""

    def launch(use, *words, without=None, **variables):
        script, needs, _, _ = USES[use]
        name, *own = script.split()
        environment = {"PATH": f"{here / 'bin'}:{os.environ['PATH']}", "RECORD": str(here / "record")}
        environment |= {"GPUS_HERE": "8"} | {name: value for name, value in needs.items() if name != without}
        environment |= {name: str(value) for name, value in variables.items()}
        command = [FOLDER / name, *own, *words]
        ended = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
        record = here / "record"
        ended.called = json.loads(record.read_text()) if record.exists() else None
        return ended

    return launch


@pytest.fixture
def trainer(launch):
    """The module that a use starts, and the words that reach it, through the real parsers in between."""

    def trainer(use, *words, **variables):
        ended = launch(use, *words, **variables)
        assert ended.returncode == 0, ended.stderr
        program, *argv = ended.called
        if program == "ray":
            from ray.dashboard.modules.job.cli import submit

            assert argv[:2] == ["job", "submit"]
            parsed = submit.make_context("submit", argv[2:]).params
            assert parsed["address"] == CLUSTER["RAY_JOBS"] and not parsed["no_wait"]
            program, *argv = parsed["entrypoint"]
        if program == "deepspeed":
            from deepspeed.launcher.runner import parse_args

            parsed = parse_args(argv)
            assert parsed.module
            return parsed.user_script, parsed.user_args, parsed
        assert program == "python" and argv[0] == "-m"
        return argv[1], argv[2:], None

    return trainer


class Accepted(Exception):
    """The host has finished all checks that come before it loads a model."""


class Cluster:
    """Replaces Ray when the host asks for GPUs, and counts them. `ranks` are those of the policy."""

    def __init__(self):
        self.gpus, self.ranks, self.models = 0, None, []

    def placement_group(self, bundles, strategy):
        self.gpus += sum(bundle["GPU"] for bundle in bundles)
        return SimpleNamespace(ready=lambda: None)

    def create_vllm_engines(self, engines, tensor_parallel, *others, **kwargs):
        placement = others[6]
        self.gpus += 0 if placement else engines * tensor_parallel
        return [None] * engines

    def actor_group(self, nodes, gpus_per_node, actor, pg=None, **kwargs):
        self.models.append(actor.__ray_metadata__.class_name)
        self.ranks = self.ranks or nodes * gpus_per_node
        self.gpus += 0 if pg else nodes * gpus_per_node


def accepted(module, argv):
    """Runs the host's script of `module` with our flags, until it would load a model.

    Returns its arguments, and what it asked Ray for.
    """
    import openrlhf.models
    import openrlhf.trainer.ppo_trainer as sync
    import openrlhf.trainer.ppo_trainer_async as asynchronous
    import openrlhf.trainer.ray.launcher as launcher
    import openrlhf.utils.config
    import ray

    cluster, seen = Cluster(), []
    parse, nest = argparse.ArgumentParser.parse_args, openrlhf.utils.config.hierarchize

    def parse_with_our_flags(parser, *args):
        # Parsers of our own are called with words to read.
        return parse(parser, *args) if args else DOORS[module].parse_args(parser)

    def remember(args):
        seen.append(nest(args))
        return seen[-1]

    def strategy(args):
        if module.endswith("train_ppo_ray"):
            return SimpleNamespace(print=lambda text: None)
        raise Accepted

    def stop(*args, **kwargs):
        raise Accepted

    # The door is not prepared: no data are read, and Ray is not started.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(hooks.DEVICE, flags.early(argv)[flags.DEVICE])
        patch.setattr(sys, "argv", [module, *argv])
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_with_our_flags)
        patch.setattr(openrlhf.utils.config, "hierarchize", remember)
        patch.setattr(openrlhf.utils, "get_strategy", strategy)
        patch.setattr(openrlhf.models, "get_llm_for_sequence_regression", stop)
        patch.setattr(ray, "is_initialized", lambda: True)
        patch.setattr(ray, "get", lambda refs: refs)
        patch.setattr(sys.modules["ray.util.placement_group"], "placement_group", cluster.placement_group)
        patch.setattr(openrlhf.trainer.ray, "create_vllm_engines", cluster.create_vllm_engines)
        patch.setattr(launcher, "RayActorGroup", cluster.actor_group)
        patch.setattr(sync, "PPOTrainer", SimpleNamespace(remote=stop))
        patch.setattr(asynchronous, "PPOTrainerAsync", SimpleNamespace(remote=stop))
        with pytest.raises(Accepted):
            runpy.run_module(module.replace("openrlhf_pgrpo", "openrlhf"), run_name="__main__")
    return seen[-1], cluster


def fits(args, ranks, samples):
    """Whether every rank gets equally many samples, in whole micro batches; else DeepSpeed refuses, or waits."""
    whole = args.train.batch_size % (ranks * args.train.micro_batch_size) == 0
    return whole and samples % args.train.batch_size == 0


@pytest.mark.parametrize("use", ONLINE_USES)
def test_an_online_run_is_accepted_and_takes_all_gpus(use, trainer):
    from openrlhf.models import PolicyLoss

    module, argv, _ = trainer(use)
    assert module == "openrlhf_pgrpo.cli.train_ppo_ray"
    args, cluster = accepted(module, argv)
    samples = args.rollout.batch_size * args.rollout.n_samples_per_prompt
    assert cluster.gpus == USES[use][2]
    local = ["RewardModelActor"] if use == "factorized use" else []
    assert cluster.models == ["PolicyModelActor", "ReferenceModelActor", *local]
    assert fits(args, cluster.ranks, samples) and samples == args.train.batch_size
    assert samples % (cluster.ranks * args.rollout.micro_batch_size) == 0
    assert args.rollout.max_new_tokens < args.data.max_len
    correction = {name: value for name, value in vars(args.algo.advantage).items() if name.startswith("is_correction")}
    PolicyLoss(**correction)
    assert correction["is_correction_level"] == "token"
    assert args.train.async_enable == args.train.partial_rollout_enable == (use == "async")
    assert (args.vllm.tensor_parallel_size > 1) == (use == "zero3")
    assert args.ds.packing_samples == (use != "factorized use")


@pytest.mark.parametrize("use", PAIR_USES)
def test_a_run_on_pairs_is_accepted_and_takes_all_gpus(use, trainer):
    module, argv, launcher = trainer(use)
    assert module == f"openrlhf_pgrpo.cli.{'train_rm' if use == 'factorized train' else 'train_dpo'}"
    args, _ = accepted(module, argv)
    assert launcher.num_gpus == USES[use][2] and launcher.num_nodes == -1
    assert fits(args, launcher.num_gpus, args.train.batch_size)
    if use == "factorized train":
        assert args.reward.factors == 6 and args.data.user_key == "user"
        return
    assert args.robust.save_best == (use == "group_robust") and args.ds.packing_samples
    assert (args.ds.lora.rank > 0) == (use == "lora") and not args.ds.load_in_4bit
    if use == "lora":
        assert args.ds.lora.target_modules == "all-linear"  # PEFT takes it for a name if it is in a list
        module, argv, _ = trainer(use, LOAD_IN_4BIT="yes")
        assert accepted(module, argv)[0].ds.load_in_4bit


def test_the_server_is_accepted(trainer):
    module, argv, _ = trainer("factorized serve", PORT=5001)
    args, _ = accepted(module, argv)
    assert module == "openrlhf_pgrpo.cli.serve_rm" and args.port == 5001 and args.reward.model_name_or_path == "rm"


def test_the_server_can_be_asked_instead_of_a_model(trainer):
    module, argv, _ = trainer("factorized use", REWARD_URL="http://a:5000/get_reward")
    args, cluster = accepted(module, argv)
    assert args.reward.remote_url == ["http://a:5000/get_reward"]
    assert args.data.label_key == args.data.user_key == "user"
    assert "RewardModelActor" not in cluster.models


@pytest.mark.parametrize("use", ["ray_job", "async", *PAIR_USES, "factorized serve"])
def test_the_device_may_be_a_cpu(use, trainer):
    module, argv, _ = trainer(use, DEVICE="cpu", GPUS_PER_NODE=2)
    accepted(module, argv)


OTHER_SIZES = {
    "single_node": (dict(GPUS=4, GPUS_PER_ENGINE=2), 4),
    "ray_job": (dict(NODES=1, GPUS_PER_NODE=4, GPUS_PER_ENGINE=2), 4),
    "async": (dict(NODES=3, GPUS_PER_NODE=4, PROMPTS_PER_STEP=240), 12),
    "zero3": (dict(NODES=3, TRAIN_NODES=2, GPUS_PER_ENGINE=8), 24),
    "factorized use": (dict(NODES=2, GPUS_PER_NODE=4), 8),
}


@pytest.mark.parametrize("use", OTHER_SIZES)
def test_other_numbers_of_nodes_and_gpus(use, trainer):
    variables, gpus = OTHER_SIZES[use]
    module, argv, _ = trainer(use, **variables)
    assert accepted(module, argv)[1].gpus == gpus


WRONG_SIZES = [
    ("single_node", dict(GPUS=6, GPUS_PER_ENGINE=4), {4, 6}),
    ("single_node", dict(GPUS=8, GPUS_HERE=4), {4, 8}),
    ("ray_job", dict(NODES=3, GPUS_PER_NODE=4, GPUS_PER_ENGINE=3), {3, 4}),
    ("async", dict(GPUS_PER_NODE=4, TRAIN_GPUS_PER_NODE=4), {1, 4}),
    ("async", dict(GPUS_PER_NODE=1), {1, 0}),
    ("zero3", dict(TRAIN_NODES=4), {1, 4}),
    ("zero3", dict(NODES=1), {1, 0}),
    ("zero3", dict(GPUS_PER_ENGINE=16), {8, 16}),
]


@pytest.mark.parametrize("use, variables, numbers", WRONG_SIZES)
def test_numbers_that_do_not_fit_are_refused_by_name(use, variables, numbers, launch):
    ended = launch(use, **variables)
    assert ended.returncode == 2 and ended.called is None
    script, said = ended.stderr.split(": ", 1)
    assert script == USES[use][0].split()[0] and re.search(" needs? ", said)
    assert {int(number) for number in re.findall(r"\b\d+\b", said)} == numbers


# Name: variables, processes that train, and what the look of the door then says of the size of an update.
WRONG_UPDATES = {
    "single_node": (dict(PROMPTS_PER_STEP=5), 8, "a multiple of 32 .*, got 40"),
    "ray_job": (dict(NODES=3), 24, "a multiple of 96 .*, got 2048"),
    "async": (dict(NODES=3, PROMPTS_PER_STEP=10), 12, "a multiple of 12 .*, got 80"),
    "zero3": (dict(PROMPTS_PER_STEP=3), 16, "a multiple of 16 .*, got 24"),
    "lora": (dict(BATCH=100), 8, "a multiple of 32 .*, got 100"),
    "group_robust": (dict(GPUS_PER_NODE=3), 3, "a multiple of 12 .*, got 128"),
    "factorized train": (dict(MICRO_BATCH=5), 8, "a multiple of 40 .*, got 128"),
    "factorized use": (dict(NODES=3), 24, "a multiple of 96 .*, got 1024"),
}


@pytest.mark.parametrize("use", WRONG_UPDATES)
def test_updates_that_do_not_fit_are_left_to_the_look_of_the_door(use, trainer, monkeypatch):
    monkeypatch.setitem(os.environ, hooks.DEVICE, "gpu")
    variables, ranks, said = WRONG_UPDATES[use]
    module, argv, _ = trainer(use, **variables)
    args = flags.nest(DOORS[module].parse_args(host_parser(DOORS[module].script), argv))
    with pytest.raises(ValueError, match=f"--train.batch_size needs {said}"):
        plan.ppo(args, None) if use in ONLINE_USES else plan.pairs(args, None, ranks)


@pytest.mark.parametrize("use", PAIR_USES)
def test_several_nodes_need_a_hostfile_that_has_them(use, launch, trainer, here):
    hosts = here / "hosts"
    hosts.write_text("# our nodes\n\none slots=8\ntwo slots=4\nthree slots=8\n")
    ended = launch(use, NODES=2)
    assert ended.returncode != 0 and ended.called is None and "HOSTFILE" in ended.stderr
    for nodes, gpus, found in ((2, 8, 1), (3, 5, 2), (4, 2, 3)):
        ended = launch(use, NODES=nodes, GPUS_PER_NODE=gpus, HOSTFILE=hosts, BATCH=960)
        assert ended.returncode == 2 and ended.called is None
        assert f"needs {nodes} nodes of {gpus} GPUs at its top, got {found}" in ended.stderr
    module, argv, launcher = trainer(use, NODES=3, GPUS_PER_NODE=4, HOSTFILE=hosts, BATCH=960)
    assert (launcher.hostfile, launcher.num_nodes, launcher.num_gpus) == (str(hosts), 3, 4)
    assert launcher.master_port == 29500 and trainer(use, MASTER_PORT=29501)[2].master_port == 29501
    assert fits(accepted(module, argv)[0], 12, 960)


@pytest.mark.parametrize("use", [use for use in USES if use != "factorized serve"])
def test_the_same_command_resumes(use, trainer, here):
    module, fresh, _ = trainer(use)
    folder = here / USES[use][3]
    folder.mkdir(parents=True)
    (folder / "latest").touch()
    assert trainer(use)[1] == fresh  # a checkpoint that was never finished
    (folder / "latest").write_text("global_step20")
    _, resumed, _ = trainer(use)
    assert resumed == [*fresh, "--ckpt.load_enable"]
    args, _ = accepted(module, resumed)
    assert args.ckpt.load_enable and args.ckpt.save_steps > 0
    place = Path(args.ckpt.path) / ("_actor" if use in ONLINE_USES else "")
    assert (here / place).resolve() == folder.resolve()


@pytest.mark.parametrize("use, variable", [(use, name) for use in USES for name in USES[use][1]])
def test_what_is_missing_is_named(use, variable, launch):
    ended = launch(use, without=variable)
    assert ended.returncode != 0 and ended.called is None
    assert f"{variable}: a" in ended.stderr or f"{variable}: the " in ended.stderr  # and what it is


@pytest.mark.parametrize("words", [(), ("traim",)])
def test_a_use_that_does_not_exist_is_refused(words, here):
    command = [FOLDER / "factorized_reward.sh", *words]
    ended = subprocess.run(command, env={**os.environ, "RM": "rm"}, cwd=here, capture_output=True, text=True)
    assert ended.returncode == 2 and f"needs train, serve or use, got '{''.join(words)}'" in ended.stderr


@pytest.mark.parametrize("use", USES)
def test_further_words_reach_the_trainer_and_win(use, trainer):
    words = ("--data.max_len", "99") if use == "factorized serve" else ("--logger.wandb.run_name", "two words")
    module, argv, _ = trainer(use, *words)
    args, _ = accepted(module, argv)
    assert (args.data.max_len if use == "factorized serve" else args.logger.wandb.run_name) in (99, "two words")


@pytest.mark.parametrize("use", JOBS)
def test_files_of_a_job_are_named_in_full(use, trainer, here):
    _, argv, _ = trainer(use)
    relative = {"prompts.jsonl", "reward.py", "rm", "run"}
    assert not relative & set(argv)
    assert {str(here / "prompts.jsonl"), str(here / "run"), str(here / "run/checkpoints")} <= set(argv)
    assert argv[argv.index("--actor.model_name_or_path") + 1] == "policy"  # no file: a name on the hub


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_on_a_line_of_its_own(script):
    lines = (FOLDER / script).read_text().splitlines()
    code = [line.split(" # ")[0] for line in lines if not line.lstrip().startswith("#")]
    flags = [re.findall(r"(?<!\S)\(?(--\w[\w.]*)", line) for line in code]
    assert max(map(len, flags)) == 1
    assert sum(map(len, flags)) > 5


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_head_of_a_script_tells_how_to_start_it(script):
    lines = (FOLDER / script).read_text().splitlines()
    head = lines[: lines.index("set -euo pipefail")]
    text = "\n".join(head)
    assert lines[0] == "#!/usr/bin/env bash" and all(line.startswith("#") for line in head)
    needs = {name for own, needs, _, _ in USES.values() if own.split()[0] == script for name in needs}
    assert f"examples/launch/{script}" in text and all(f"{name}=" in text for name in needs)
    assert os.access(FOLDER / script, os.X_OK)


def test_every_script_is_in_the_table_with_the_gpus_it_takes():
    table = (FOLDER / "README.md").read_text()
    rows = re.findall(r"^\| \[`([\w.]+)`\]\(([\w.]+)\) \|.*\| ([\d x,]+) \|$", table, re.MULTILINE)
    assert [name for name, link, _ in rows] == [link for name, link, _ in rows]
    files = {path.name for path in FOLDER.iterdir()} - {"README.md"}
    assert {name for name, _, _ in rows} == files and set(SCRIPTS) == {own.split()[0] for own, *_ in USES.values()}
    for name, _, gpus in rows:
        asked = {number for own, _, number, _ in USES.values() if own.split()[0] == name}
        shown = {math.prod(map(int, size.split(" x "))) for size in gpus.split(", ")}
        assert shown == asked or name.endswith(".sbatch")


@pytest.mark.parametrize("script", [*SCRIPTS, *sorted(path.name for path in FOLDER.glob("*.sbatch"))])
def test_shellcheck_finds_nothing(script):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    ended = subprocess.run([shellcheck, FOLDER / script], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout
