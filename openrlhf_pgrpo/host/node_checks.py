"""What `doctor --cluster` runs on the nodes, which may have another version of us, or none.

So Ray sends this file by value, nothing of ours is imported at the top, and every answer is made of plain values.
"""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import time
from pathlib import Path


def look(packages: tuple[str, ...]) -> dict:
    """What is installed here: `versions`, the `files` of our package with their hashes, what the `patches` are on, and
    how many `cuda` devices torch sees; None where it cannot be told."""
    versions = {"python": platform.python_version(), **{package: version(package) for package in packages}}
    files = own_files()
    return {"versions": versions, "files": files, "patches": patches() if files else None, "cuda": cuda_devices()}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def own_files() -> dict[str, str]:
    """Name -> hash, of everything that our package consists of; empty where it is not installed."""
    files = {}
    for package in ("openrlhf_pgrpo", "openrlhf_pgrpo.patches"):  # the latter stands elsewhere in a source checkout
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
    """File of the host -> what it is; or, in a sentence, why that cannot be told."""
    try:
        patching = importlib.import_module("openrlhf_pgrpo.host.patching")
        found = {}
        for target in patching.targets():
            own = hashlib.sha1(target.path.read_bytes()).hexdigest() if target.state == patching.EDITED else ""
            found[target.name] = f"{target.state} {own[:8]}".strip()
        return found
    except Exception as error:  # whatever another version of us, or half of one, does
        return f"{type(error).__name__}: {error}"


def cuda_devices() -> int | None:
    try:
        return importlib.import_module("torch").cuda.device_count()
    except (ImportError, OSError):  # absent, or a library of CUDA is
        return None


def hooked() -> bool:
    return importlib.import_module("openrlhf_pgrpo.host.seams").setup_worker.done


def write(folder: str, name: str) -> str | None:
    """Writes a file that holds its own name; what kept it from that, if anything did."""
    try:
        with open(Path(folder, name), "w") as file:
            file.write(name)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror


def seen(folder: str, names: list[str], patience: float) -> list[str]:
    """Those of the files that are here, or come within so many seconds: a network file system may take a moment."""
    deadline = time.monotonic() + patience
    while True:
        found = [name for name in names if holds_its_name(Path(folder, name))]
        if len(found) == len(names) or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def holds_its_name(path: Path) -> bool:
    try:
        return path.read_text() == path.name
    except OSError:
        return False


def remove(folder: str, name: str) -> str | None:
    try:
        Path(folder, name).unlink(missing_ok=True)
    except OSError as error:
        return error.strerror
