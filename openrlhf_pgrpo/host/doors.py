"""The two calls that turn a host train script into ours; every door makes them, in this order.

    activate()                       before the host is imported
    args = parse_args(parser)        in the place of parser.parse_args()
"""

import argparse
import importlib
import os
import runpy
import sys
from functools import reduce

import wrapt

from openrlhf_pgrpo.core.registry import load_plugin
from openrlhf_pgrpo.host import cpu, options, seams


def activate() -> None:
    """Prepares this process, the driver, and every Ray worker that it will start.

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
    seams.setup_worker()


def parse_args(parser: argparse.ArgumentParser, argv=None, parse=argparse.ArgumentParser.parse_args):
    """`parser.parse_args(argv)` for a host parser, with our flags and estimator names, and Ray made ready for them.

    Exits with a usage message, as argparse does, where a value is refused.
    """
    try:
        options.extend(parser)
        args = parse(parser, argv)
        options.check(args)
        nested = _nested(args)
        if _on_cpu():
            cpu.adapt(nested)
            cpu.refuse_unsupported(nested)
            for name in vars(args):
                setattr(args, name, reduce(getattr, name.split("."), nested))
    except ValueError as refusal:
        parser.error(str(refusal))
    for module in seams.SEAMS:
        importlib.import_module(module)  # a seam that does not fit is refused now, not after Ray and vLLM have started
    _prepare_ray(nested)
    return args


def run(module: str) -> None:
    """Runs a train script of the host, untouched, as if it were called with `python -m`."""
    activate()

    def with_our_flags(parse, parser, args, kwargs):
        # The host's libraries have parsers of their own.
        if f"--{options.ESTIMATOR}" not in parser._option_string_actions:
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


def _nested(args):
    from openrlhf.utils.config import hierarchize

    return hierarchize(args)


def _on_cpu() -> bool:
    return os.environ[seams.DEVICE] == "cpu"


def _prepare_ray(args) -> None:
    """Adds our hook to the host's own `ray.init`, and on a CPU the GPUs that Ray has to believe in."""
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
        return wrapped(*positional, runtime_env=runtime_env, **kwargs)

    wrapt.wrap_function_wrapper(ray, "init", init)
