"""One run at a time writes into a folder: a second one would mix its checkpoints and metrics with those of the first.

The lock is on the folder itself, so nothing has to be removed, and the system gives it back when its process ends,
however that happens.
"""

import fcntl
import os
from pathlib import Path

from openrlhf_pgrpo.host import device

_held: dict[tuple[int, int], int] = {}  # device and inode of a folder -> the descriptor that locks it, until this ends


def hold_folders(args) -> None:
    """Makes this process the only one that trains into `--ckpt.path` and `--ckpt.output_dir`; nested host arguments.

    Of a launcher's processes the first one holds them for all. A driver of PPO leaves those that are not here, or
    cannot be, to its cluster.

    Raises:
        ValueError: another process does. OSError: a folder cannot be made.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    on_cluster = hasattr(args, "rollout") and device.cluster() is not None
    for name in ("path", "output_dir"):
        folder = Path(getattr(args.ckpt, name))
        if not folder.exists():
            if on_cluster and device.is_elsewhere():
                continue
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError:
                if not on_cluster:
                    raise
                continue  # the nodes that train may have what this one lacks
        _hold(f"--ckpt.{name}", folder)


def _hold(flag: str, folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    found = os.fstat(descriptor)
    if (found.st_dev, found.st_ino) in _held:
        os.close(descriptor)
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(
            f"{flag} needs a folder that no other run writes to, got {folder}, which {_holder(found)} trains into: "
            "wait until it has ended, end it, or name another folder"
        ) from None
    except OSError as error:  # some network file systems cannot lock a folder
        os.close(descriptor)
        print(f"[pgrpo] {folder} cannot be locked ({error.strerror}): nothing stops a second run there", flush=True)
        return
    _held[found.st_dev, found.st_ino] = descriptor


def _holder(folder: os.stat_result) -> str:
    """The process that holds a folder, if it is on this machine and can be seen."""
    place = f"{os.major(folder.st_dev):02x}:{os.minor(folder.st_dev):02x}:{folder.st_ino}"
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if place in words and "FLOCK" in words and "->" not in words:
            return f"process {words[words.index(place) - 1]}"
    return "another process"
