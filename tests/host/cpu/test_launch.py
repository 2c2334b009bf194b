"""The stand-ins for a GPU: what is refused, what is adapted, what is replaced."""

import importlib.util
import os
import sys

import pytest

from openrlhf_pgrpo.host.cpu import launch

pytestmark = pytest.mark.host

REFUSED = {
    "--ds.packing_samples": "needs flash-attn, got True",
    "--train.dynamic_batch_enable": "needs packed samples, and they need flash-attn",
    "--ds.ring_attn_size 2": "needs packed samples, and they need flash-attn, got 2",
    "--ds.attn_implementation flash_attention_3": "needs flash-attn, got flash_attention_3",
    "--vllm.enable_sleep": "needs GPU memory to give back",
    "--ds.enable_sleep": "needs GPU memory to give back",
    "--vllm.sync_with_ray": "needs a CUDA buffer",
    "--vllm.tensor_parallel_size 2": "needs a GPU for every shard",
    "--ds.tensor_parallel_size 2": "needs a GPU for every shard",
    "--ds.load_in_4bit": "needs bitsandbytes with CUDA",
    "--ds.param_dtype fp16": "needs a GPU (bf16 works without)",
    "--ds.adam_offload": "needs GPU memory to offload",
    "--ds.deepcompile": "needs a compiler",
    "--ds.use_liger_kernel": "needs Triton kernels",
    "--ds.lora.rank 8": "needs a weight sync that merges adapters",
}


def adapted(host_args, *flags):
    args = host_args(*flags)
    launch.replace_gpu_defaults(args)
    return args


@pytest.mark.parametrize("flags", REFUSED)
def test_what_needs_a_gpu_is_refused_with_a_sentence(host_args, flags):
    with pytest.raises(ValueError) as refusal:
        launch.refuse_unsupported(adapted(host_args, *flags.split()))
    assert f"{flags.split()[0]} {REFUSED[flags]}" in str(refusal.value)
    assert str(refusal.value).endswith("on a machine without a GPU; leave it out, or use a GPU.")


def test_every_refusal_is_tested():
    assert {flags.split()[0].removeprefix("--") for flags in REFUSED} == set(launch.REFUSED)


def test_the_hosts_defaults_are_adapted_in_one_line_and_pass(host_args, capsys):
    args = adapted(host_args)
    launch.refuse_unsupported(args)
    assert args.ds.attn_implementation == "sdpa" and args.vllm.enforce_eager is True
    assert args.actor.num_gpus_per_node == args.reward.num_gpus_per_node == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("[pgrpo] no GPU: instead of the host's defaults, --ds.attn_implementation sdpa")


def test_what_the_user_chose_stays(host_args, monkeypatch):
    args = adapted(host_args, "--ds.attn_implementation", "eager", "--actor.num_gpus_per_node", "2")
    assert args.ds.attn_implementation == "eager" and args.actor.num_gpus_per_node == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert launch.environment()["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    "flags, chosen, threads",
    [
        ("--vllm.num_engines 1", None, 4),  # ranks sleep
        ("--vllm.num_engines 2", None, 2),
        ("--vllm.num_engines 3", None, 2),  # no fewer than a rank
        ("--vllm.num_engines 1 --train.async_enable", None, 2),  # ranks work
        ("--vllm.num_engines 1", "3", 3),
        ("--vllm.num_engines 2", "3", 3),
    ],
)
def test_engines_share_all_cores_while_ranks_sleep(host_args, monkeypatch, flags, chosen, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(4))
    for name in ("OMP_NUM_THREADS", launch.ENGINE_THREADS):
        monkeypatch.delenv(name, raising=False)
    if chosen is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    for name, value in launch.environment().items():
        monkeypatch.setenv(name, value)
    assert launch.environment()["OMP_NUM_THREADS"] == (chosen or "2")
    assert launch.engine_threads(host_args(*flags.split())) == threads


@pytest.mark.parametrize(
    "flags, gpus",
    [
        ("--reward.remote_url r.py --algo.kl.init_coef 0", 1 + 1),  # one actor, one engine
        ("--reward.remote_url r.py", 1 + 1 + 1),  # and the reference model
        ("--actor.num_gpus_per_node 2 --algo.kl.init_coef 0", 2 + 1 + 1),  # two ranks, reward model, engine
        ("--algo.advantage.estimator gae --reward.remote_url r.py", 1 + 1 + 1 + 1),  # actor, reference, critic, engine
    ],
)
def test_ray_has_a_logical_gpu_for_every_model_and_engine(host_args, flags, gpus):
    estimator = () if "estimator" in flags else ("--advantage_estimator", "reinforce")
    args = adapted(host_args, *estimator, *flags.split(), "--vllm.num_engines", "1")
    assert launch.logical_gpus(args) == gpus < launch.logical_cpus(args)


def test_flash_attn_can_be_imported_by_the_host_and_is_still_not_installed():
    import openrlhf.models.ring_attn_utils as host

    assert importlib.util.find_spec("flash_attn") is None and "flash_attn" not in sys.modules
    with pytest.raises(RuntimeError, match="Packed samples need flash-attn"):
        host.unpad_input(None, None)


def test_adam_is_pytorchs_own_and_keeps_its_settings():
    from openrlhf.utils.deepspeed.deepspeed_utils import get_train_ds_config

    adam = {"type": "AdamW", "params": {"lr": 0.5, "betas": (0.9, 0.95)}}
    config = get_train_ds_config(offload=False, optim_config=adam)
    assert config["optimizer"]["params"] == {"lr": 0.5, "betas": (0.9, 0.95), "torch_adam": True, "fused": True}
    muon = {"type": "Muon", "params": {"lr": 0.5}}
    assert get_train_ds_config(offload=False, optim_config=muon)["optimizer"]["params"] == {"lr": 0.5}
