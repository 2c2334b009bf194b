"""Starts Ray for us: its workers run our hook, and without a GPU it counts logical ones. This runs in the driver."""

import os
from pathlib import Path

import wrapt

from openrlhf_pgrpo.host import device
from openrlhf_pgrpo.host.cpu import launch
from openrlhf_pgrpo.host.ppo import last_words, worker
from openrlhf_pgrpo.host.versions import SeamError
from openrlhf_pgrpo.models import remote_code


def worker_environment() -> dict:
    """The `runtime_env` that makes a Ray worker ready for us, on the device chosen in this process."""
    return {
        "worker_process_setup_hook": f"{worker.__name__}.{worker.setup.__name__}",
        "env_vars": {**device.environment(), remote_code.VARIABLE: str(int(remote_code.trusted()))},
    }


def own_ray() -> dict:
    """Arguments that make `ray.init` start a Ray of our own, for logical GPUs on a CPU; empty if it must not.

    Without the address, Ray would join whatever cluster it finds running on this machine.
    """
    if device.is_cpu() and device.cluster() is None:
        return {"address": "local", "include_dashboard": False}
    return {}


def without_ray(error: Exception) -> str:
    """One line: what to do if `ray.init` raised this."""
    cluster = device.cluster()
    need = "a Ray that starts on this machine" if cluster is None else f"the Ray cluster at {cluster} (RAY_ADDRESS)"
    got = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    doctor = "openrlhf-pgrpo doctor" + " --cluster" * (cluster is not None)
    return f"training needs {need}, got {got}: see what {doctor} says, then give the same command again"


def prepare(args) -> None:
    """Adds our hook and, on a CPU, logical GPUs to the host's own `ray.init`; then installs the last words.

    Raises:
        SeamError: Ray runs already; or, from `ray.init`, its worker hook is in use.
    """
    import ray

    if ray.is_initialized():
        raise SeamError("openrlhf_pgrpo needs to start Ray, got a running one: call prepare before ray.init")
    if device.is_cpu():
        os.environ[launch.ENGINE_THREADS] = str(launch.engine_threads(args))
    ours = worker_environment()
    hook = ours["worker_process_setup_hook"]

    def init(wrapped, _instance, positional, kwargs):
        runtime_env = dict(kwargs.pop("runtime_env", None) or {})
        if runtime_env.setdefault("worker_process_setup_hook", hook) != hook:
            raise SeamError(
                f"openrlhf_pgrpo needs Ray's worker_process_setup_hook, got one in use, "
                f"{runtime_env['worker_process_setup_hook']!r}: call {hook} from it instead"
            )
        runtime_env["env_vars"] = {**runtime_env.get("env_vars", {}), **ours["env_vars"]}
        if own := own_ray():
            resources = {"num_gpus": launch.logical_gpus(args), "num_cpus": launch.logical_cpus(args)}
            kwargs = {**own, **resources, **kwargs}
        try:
            context = wrapped(*positional, runtime_env=runtime_env, **kwargs)
        except Exception as error:  # whatever Ray raises: it has no type of its own for this
            error.add_note(f"[pgrpo] the run has failed: {without_ray(error)}")
            raise
        last_words.install(Path(args.ckpt.path))
        return context

    wrapt.wrap_function_wrapper(ray, "init", init)
