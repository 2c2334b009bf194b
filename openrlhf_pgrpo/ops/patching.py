"""Puts the patches of `patches/` on the installed host, all or none, and reverts them to the byte.

A patch made by `git diff --full-index` names the git blob of each file before and after it. So the state of a file is
known exactly: as released, patched, or something else. A file in another state is left alone.
"""

import hashlib
import importlib.util
import os
import re
import shutil
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from unidiff import PatchSet

from openrlhf_pgrpo.host.versions import HOST_VERSIONS, check_version

RELEASED, PATCHED, HALF_PATCHED, EDITED, MISSING = "as released", "patched", "half patched", "edited", "missing"


class PatchError(RuntimeError):
    """The installed host is not the one that a patch was made for; no file was changed."""


class Target(NamedTuple):
    """One file of the host that a patch changes: its state now, and its content in both known states."""

    path: Path
    name: str
    state: str
    contents: dict[str, bytes]


def targets() -> list[Target]:
    """Every file of the installed host that our patches change. The host is not imported.

    Raises:
        SeamError: the host is missing or of another version.
    """
    check_version()
    root = Path(importlib.util.find_spec("openrlhf").origin).parents[1]
    folder = resources.files("openrlhf_pgrpo.patches")
    return [_target(root / file.path, file) for patch in _patches(folder) for file in PatchSet(patch)]


def _patches(folder) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".patch"))
    return [(folder / name).read_text(encoding="utf-8") for name in names]


def _target(path: Path, file) -> Target:
    if not path.is_file():
        return Target(path, file.path, MISSING, {})
    released, patched = re.search(r"^index (\w{40})\.\.(\w{40})", str(file.patch_info), re.MULTILINE).groups()
    content = path.read_bytes()
    if _blob(content) == released:
        other = _known(_replace(content, file), patched)
        return Target(path, file.path, RELEASED, {RELEASED: content, PATCHED: other})
    if _blob(content) == patched:
        other = _known(_replace(content, file, reverse=True), released)
        return Target(path, file.path, PATCHED, {RELEASED: other, PATCHED: content})
    ours = {line.value.encode() for hunk in file for line in hunk if line.is_added and line.value.strip()}
    half = ours & set(content.splitlines(keepends=True))
    return Target(path, file.path, HALF_PATCHED if half else EDITED, {})


def _replace(content: bytes, file, reverse: bool = False) -> bytes:
    lines = content.splitlines(keepends=True)
    for hunk in reversed(file):  # from the end, so that line numbers stay valid
        start, old, new = hunk.source_start, hunk.source_lines(), hunk.target_lines()
        if reverse:
            start, old, new = hunk.target_start, new, old
        lines[start - 1 : start - 1 + len(list(old))] = [line.value.encode() for line in new]
    return b"".join(lines)


def _known(content: bytes, blob: str) -> bytes:
    if _blob(content) != blob:
        raise PatchError(f"a patch needs to make the file {blob}, got {_blob(content)}: reinstall openrlhf-pgrpo")
    return content


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def set_state(state: str) -> list[Target]:
    """Makes every file PATCHED, or RELEASED again to the byte; returns the files that changed, as they were before.

    Raises:
        PatchError: a file is neither as released nor patched, or cannot be written. No file is changed.
    """
    found = targets()
    for target in found:
        if not target.contents:
            raise PatchError(
                f"patching needs {target.name} as openrlhf {HOST_VERSIONS[0]} has it, got a file that is "
                f"{target.state}: {remedy(target)}"
            )
    changing = [target for target in found if target.state != state]
    temporary = {target.path: target.path.with_name(target.path.name + ".openrlhf_pgrpo") for target in changing}
    try:
        for target in changing:
            with open(temporary[target.path], "wb") as file:
                file.write(target.contents[state])
                file.flush()
                os.fsync(file.fileno())
            shutil.copymode(target.path, temporary[target.path])
        for path, new in temporary.items():
            os.replace(new, path)
    except OSError as error:
        raise PatchError(
            f"patching needs to write beside {changing[0].path}, got {error.strerror}: run it as the owner of the "
            "installation"
        ) from error
    finally:
        for new in temporary.values():
            new.unlink(missing_ok=True)
    return changing


def remedy(target: Target) -> str:
    """What to do about a file that is in neither of the two known states."""
    reinstall = f"restore it by pip install --force-reinstall --no-deps openrlhf=={HOST_VERSIONS[0]}"
    if target.state != EDITED:
        return reinstall
    return f"{reinstall}, or keep it and use python -m openrlhf_pgrpo.cli.{target.path.stem}, which needs no patch"
