"""The device that a run trains on. The driver chooses it once, and every process gets it through the environment."""

import os
import socket

from openrlhf_pgrpo.host.cpu import launch
from openrlhf_pgrpo.host.hooks import DEVICE
from openrlhf_pgrpo.host.versions import SeamError


def choose(asked: str, on_ray: bool = True) -> str:
    """The device, `gpu` or `cpu`, for a value of `--pgrpo.device`.

    Args:
        on_ray: whether the run may be elsewhere, on a Ray cluster: a driver without a GPU can control one with GPUs.

    Raises:
        SeamError: a GPU was asked for, and none can be reached.
    """
    import torch

    reachable = torch.cuda.is_available() or (on_ray and cluster() is not None)
    if asked == "gpu" and not reachable:
        need, got = (", or a cluster named by RAY_ADDRESS", "neither") if on_ray else ("", "none")
        raise SeamError(
            f"--pgrpo.device gpu needs a CUDA device here{need}, got {got}: leave the flag out to run on the CPU"
        )
    return ("gpu" if reachable else "cpu") if asked == "auto" else asked


def cluster() -> str | None:
    """The Ray cluster that RAY_ADDRESS names; None if Ray is to start on this machine."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return None if address in ("", "local") else address


def is_elsewhere() -> bool:
    """Whether the run is on a Ray cluster whose head is not this machine, so that its files need not be here."""
    address = cluster()
    if address in (None, "auto"):
        return False
    host = address.removeprefix("ray://").rpartition(":")[0].strip("[]")
    try:  # only an address of this machine can be bound
        (family, *_, place), *_ = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
        with socket.socket(family) as here:
            here.bind(place)
    except (OSError, UnicodeError):  # or no machine can have that name
        return True
    return False


def is_cpu() -> bool:
    """Whether the device chosen in this process is the CPU."""
    return os.environ[DEVICE] == "cpu"


def environment() -> dict[str, str]:
    """The environment variables that every process of a run needs, for the device chosen in this process."""
    return {DEVICE: os.environ[DEVICE], **(launch.environment() if is_cpu() else {})}
