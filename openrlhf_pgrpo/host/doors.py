"""The two calls that turn a host train script into ours; every door makes them, in this order.

    activate()                       before the host is imported; activate(DPO), activate(RM) for these trainers
    args = parse_args(parser)        in the place of parser.parse_args()
"""

import argparse
import importlib
import importlib.util
import os
import runpy
import sys
from functools import reduce
from pathlib import Path
from typing import Callable, NamedTuple

import wrapt

from openrlhf_pgrpo.core.registry import load_plugin
from openrlhf_pgrpo.host import cpu, last_words, options, preference_options, reward_options, seams


class Door(NamedTuple):
    """One train script of the host: a flag that only its parser has, what we replace there, and what we add.

    `extend` puts our flags on the parser, `check` refuses values in its flat namespace, and `prepare` makes ready what
    starts the processes.
    """

    flag: str
    seams: dict[str, seams.Seam]
    extend: Callable
    check: Callable
    prepare: Callable


def activate(door: Door | None = None) -> None:
    """Prepares this process, the driver, and every Ray worker that it will start; for the door PPO unless told so.

    Raises:
        SeamError: the host is missing, of another version, or already imported; or the device asked for is not there.
        ValueError: `--pgrpo.plugin` cannot be found.
    """
    seams.check_version()
    early = vars(options.early(sys.argv[1:]))
    if early["pgrpo.plugin"] is not None:
        load_plugin(early["pgrpo.plugin"])
    os.environ[seams.DEVICE] = choose_device(early["pgrpo.device"])
    os.environ.update(worker_environment()["env_vars"])
    seams.setup_worker((door or PPO).seams)


def parse_args(parser: argparse.ArgumentParser, argv=None, parse=argparse.ArgumentParser.parse_args):
    """`parser.parse_args(argv)` for a host parser, with our flags, and what starts processes made ready for them.

    Exits with a usage message, as argparse does, where a value is refused.
    """
    door = next(door for door in DOORS if _has(parser, door.flag))
    try:
        door.extend(parser)
        args = parse(parser, argv)
        door.check(args)
        nested = _nested(args)
        if _on_cpu():
            cpu.adapt(nested)
            cpu.refuse_unsupported(nested)
            for name in vars(args):
                setattr(args, name, reduce(getattr, name.split("."), nested))
    except ValueError as refusal:
        parser.error(str(refusal))
    for module in door.seams:
        importlib.import_module(module)  # a seam that does not fit is refused now, not after Ray and vLLM have started
    try:
        door.prepare(nested)
    except ValueError as refusal:
        parser.error(str(refusal))
    return args


def run(module: str, door: Door | None = None) -> None:
    """Runs a train script of the host, untouched, as `python -m` would; that of the door PPO unless told so."""
    door = door or PPO
    activate(door)

    def with_our_flags(parse, parser, args, kwargs):
        # The host's libraries have parsers of their own.
        if not _has(parser, door.flag):
            return parse(*args, **kwargs)
        return parse_args(parser, *args, **kwargs, parse=lambda _parser, argv: parse(argv))

    wrapt.wrap_function_wrapper(argparse, "ArgumentParser.parse_args", with_our_flags)
    runpy.run_module(module, run_name="__main__")


def choose_device(asked: str) -> str:
    """`gpu` or `cpu` for what `--pgrpo.device` says.

    Raises:
        SeamError: a GPU was asked for and there is neither one here nor a cluster to ask.
    """
    import torch

    # A driver without a GPU may well steer a cluster with GPUs.
    reachable = torch.cuda.is_available() or "RAY_ADDRESS" in os.environ
    if asked == "gpu" and not reachable:
        raise seams.SeamError(
            "--pgrpo.device gpu needs a CUDA device here, or a cluster named by RAY_ADDRESS, got neither: leave the "
            "flag out to run on the CPU"
        )
    return ("gpu" if reachable else "cpu") if asked == "auto" else asked


def worker_environment() -> dict:
    """The `runtime_env` that makes a Ray worker ready for us, on the device chosen in this process."""
    return {
        "worker_process_setup_hook": f"{seams.setup_worker.__module__}.{seams.setup_worker.__qualname__}",
        "env_vars": {seams.DEVICE: os.environ[seams.DEVICE], **(cpu.environment() if _on_cpu() else {})},
    }


def own_ray() -> dict:
    """How `ray.init` starts an instance of our own, which a CPU needs for its logical GPUs; empty where it must not.

    Without the address, Ray would join whatever cluster it finds running on this machine.
    """
    return {"address": "local", "include_dashboard": False} if _on_cpu() and "RAY_ADDRESS" not in os.environ else {}


def _has(parser: argparse.ArgumentParser, flag: str) -> bool:
    return f"--{flag}" in parser._option_string_actions


def _nested(args):
    from openrlhf.utils.config import hierarchize

    return hierarchize(args)


def _on_cpu() -> bool:
    return os.environ[seams.DEVICE] == "cpu"


def _prepare_ray(args) -> None:
    """Adds our hook to the host's own `ray.init`, on a CPU the GPUs that Ray has to believe in, and last words."""
    import ray

    if ray.is_initialized():
        raise seams.SeamError("openrlhf_pgrpo needs to start Ray, got a running one: call parse_args before ray.init")
    ours = worker_environment()
    hook = ours["worker_process_setup_hook"]

    def init(wrapped, _instance, positional, kwargs):
        runtime_env = dict(kwargs.pop("runtime_env", None) or {})
        if runtime_env.setdefault("worker_process_setup_hook", hook) != hook:
            raise seams.SeamError(
                f"openrlhf_pgrpo needs Ray's worker_process_setup_hook, got one in use, "
                f"{runtime_env['worker_process_setup_hook']!r}: call {hook} from it instead"
            )
        runtime_env["env_vars"] = {**runtime_env.get("env_vars", {}), **ours["env_vars"]}
        if own := own_ray():
            resources = {"num_gpus": cpu.logical_gpus(args), "num_cpus": cpu.logical_cpus(args)}
            kwargs = {**own, **resources, **kwargs}
        context = wrapped(*positional, runtime_env=runtime_env, **kwargs)
        last_words.install(Path(args.ckpt.path))
        return context

    wrapt.wrap_function_wrapper(ray, "init", init)


def _prepare_single_process(args) -> None:
    """Lets `python -m`, without a launcher, train in this one process.

    Without a launcher DeepSpeed asks mpi4py who it is; where that is missing the host can only fail, so nothing that
    works depends on it.
    """
    if "RANK" not in os.environ and importlib.util.find_spec("mpi4py") is None:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        os.environ.update(alone)


def _prepare_reward_model(args) -> None:
    _prepare_single_process(args)
    reward_options.prepare(args)


PPO = Door(options.ESTIMATOR, seams.SEAMS, options.extend, options.check, _prepare_ray)
DPO = Door(
    preference_options.FLAG,
    seams.PREFERENCE_SEAMS,
    preference_options.extend,
    preference_options.check,
    _prepare_single_process,
)
RM = Door(
    reward_options.FLAG, seams.REWARD_SEAMS, reward_options.extend, reward_options.check, _prepare_reward_model
)
SERVER = Door(
    reward_options.SERVER_FLAG,
    {"openrlhf.models.model": seams.REWARD_MODEL},
    reward_options.extend_server,
    lambda args: None,
    reward_options.prepare_server,
)
DOORS = (PPO, DPO, RM, SERVER)  # the flag of the last is also one of the first
