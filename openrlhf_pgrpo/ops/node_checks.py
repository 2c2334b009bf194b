"""What `doctor --cluster` runs on the nodes, which may have another version of this package, or none.

So Ray sends this file by value, it imports nothing of ours at the top, and every answer consists of plain values.
"""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import time
from pathlib import Path


def describe_node(packages: tuple[str, ...]) -> dict:
    """What this node has.

    Returns:
        `versions` of Python and `packages`, our `files` with their hashes, the state of the host's files that our
        `patches` change, and the number of `cuda` devices that torch sees; None where it is unknown.
    """
    versions = {"python": platform.python_version(), **{package: version(package) for package in packages}}
    files = own_files()
    return {"versions": versions, "files": files, "patches": patches() if files else None, "cuda": cuda_devices()}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def own_files() -> dict[str, str]:
    """The name and hash of every file of our package; empty if it is not installed."""
    files = {}
    for package in ("openrlhf_pgrpo", "openrlhf_pgrpo.patches"):  # the latter is in another folder in a checkout
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            break
        for folder in found.submodule_search_locations if found else ():
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file() and "__pycache__" not in path.parts:
                    name = f"{package.replace('.', '/')}/{path.relative_to(folder)}"
                    files[name] = hashlib.sha1(path.read_bytes()).hexdigest()
    return files


def patches() -> dict[str, str] | str:
    """File of the host -> its state; or a sentence why the states are unknown."""
    try:
        patching = importlib.import_module("openrlhf_pgrpo.ops.patching")
        found = {}
        for target in patching.targets():
            own = hashlib.sha1(target.path.read_bytes()).hexdigest() if target.state == patching.EDITED else ""
            found[target.name] = f"{target.state} {own[:8]}".strip()
        return found
    except Exception as error:  # another version of this package, or half of one, may raise anything
        return f"{type(error).__name__}: {error}"


def cuda_devices() -> int | None:
    """The CUDA devices that torch sees; None if torch, or a CUDA library that it needs, is missing."""
    try:
        return importlib.import_module("torch").cuda.device_count()
    except (ImportError, OSError):
        return None


def ran_setup_hook() -> bool:
    return bool(importlib.import_module("openrlhf_pgrpo.host.hooks").register.done)


def write_file(folder: str, name: str) -> str | None:
    """Writes a file that contains its own name; returns what went wrong, or None."""
    try:
        with open(Path(folder, name), "w") as file:
            file.write(name)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror
    return None


def find_files(folder: str, names: list[str], patience: float) -> list[str]:
    """Those of the files that are here, or appear within `patience` seconds: a network file system may be slow."""
    deadline = time.monotonic() + patience
    while True:
        found = [name for name in names if contains_its_name(Path(folder, name))]
        if len(found) == len(names) or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def contains_its_name(path: Path) -> bool:
    try:
        return path.read_text() == path.name
    except OSError:
        return False


def remove_file(folder: str, name: str) -> str | None:
    """Removes a file if it is there; returns what went wrong, or None."""
    try:
        Path(folder, name).unlink(missing_ok=True)
    except OSError as error:
        return error.strerror
    return None
