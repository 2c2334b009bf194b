"""Puts the patches of `patches/` on the installed host, all or none, and reverts them to the byte.

The hash of each file as it was released is in the wheel's RECORD, which pip keeps, and a patch finds its place by the
lines around it. So one patch serves every version of the host, and the state of a file is known exactly: as released,
patched (without the patch it is as released), or something else. A file in another state is left alone. Where nothing
was recorded, as for a source checkout, the lines alone decide.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
from base64 import urlsafe_b64encode
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from unidiff import PatchSet

from openrlhf_pgrpo.files import to_disk
from openrlhf_pgrpo.host.versions import check_version, installed

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
    record = {str(file): file.hash.value for file in importlib.metadata.files("openrlhf") or [] if file.hash}
    return [_target(root / file.path, file, record.get(file.path)) for patch in _patches() for file in PatchSet(patch)]


def _patches() -> list[str]:
    folder = resources.files("openrlhf_pgrpo.patches")
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".patch"))
    return [(folder / name).read_text(encoding="utf-8") for name in names]


def _target(path: Path, file, released: str | None) -> Target:
    if not path.is_file():
        return Target(path, file.path, MISSING, {})
    content = path.read_bytes()
    patched, original = _replace(content, file), _replace(content, file, reverse=True)
    if patched and released in (None, _hash(content)):
        return Target(path, file.path, RELEASED, {RELEASED: content, PATCHED: patched})
    if original and released in (None, _hash(original)):
        return Target(path, file.path, PATCHED, {RELEASED: original, PATCHED: content})
    ours = {line.value.encode() for hunk in file for line in hunk if line.is_added and line.value.strip()}
    half = ours & set(content.splitlines(keepends=True))
    return Target(path, file.path, HALF_PATCHED if half else EDITED, {})


def _replace(content: bytes, file, reverse: bool = False) -> bytes | None:
    """None if the lines of a hunk are not there, or in several places."""
    for hunk in file:
        old, new = (
            "".join(line.value for line in lines).encode() for lines in (hunk.source_lines(), hunk.target_lines())
        )
        if reverse:
            old, new = new, old
        if content.count(old) != 1:
            return None
        content = content.replace(old, new)
    return content


def _hash(content: bytes) -> str:
    """As RECORD has it."""
    return urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def set_state(state: str) -> list[Target]:
    """Makes every file PATCHED, or RELEASED again to the byte; returns the files that changed, as they were before.

    Raises:
        PatchError: a file is neither as released nor patched, or cannot be written. No file is changed.
    """
    found = targets()
    for target in found:
        if not target.contents:
            raise PatchError(
                f"patching needs {target.name} as openrlhf {installed('openrlhf')} has it, got a file that is "
                f"{target.state}: {remedy(target)}"
            )
    changing = [target for target in found if target.state != state]
    temporary = {target.path: target.path.with_name(target.path.name + ".openrlhf_pgrpo") for target in changing}
    try:
        for target in changing:
            temporary[target.path].write_bytes(target.contents[state])
            to_disk(temporary[target.path])
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
    reinstall = f"restore it by pip install --force-reinstall --no-deps openrlhf=={installed('openrlhf')}"
    if target.state != EDITED:
        return reinstall
    return f"{reinstall}, or keep it and use python -m openrlhf_pgrpo.cli.{target.path.stem}, which needs no patch"
