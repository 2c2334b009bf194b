"""What a resumed run needs: a checkpoint that is whole, and our part of it, under one key of the host's client states.

The state of a method means something only under the settings it was made with, so these are saved beside it.
"""

import re
import zipfile
from pathlib import Path

# What the host's trainers call a checkpoint. Other folders beside them belong to somebody else.
CHECKPOINT = re.compile(r"(best_)?global_step\d+")
KEY = "openrlhf_pgrpo"
SCHEMA = 2
ANEW = "start anew without --ckpt.load_enable"  # what to do otherwise, where there is no other way


def check_schema(state: dict | None, content: str, otherwise: str) -> None:
    """Raises ValueError unless `state`, what a checkpoint holds under KEY, is one that this version can read.

    Args:
        content: what the checkpoint must hold, in words. otherwise: what to do if it does not.
    """
    if state is None or state.get("schema") != SCHEMA:
        found = "one without" if state is None else f"schema {state.get('schema')!r}"
        raise ValueError(
            f"resuming needs a checkpoint that holds {content} in schema {SCHEMA}, got {found}: resume it with the "
            f"flags and the version that wrote it, or {otherwise}"
        )


def check_settings(saved: dict, current: dict, otherwise: str, *others: str) -> None:
    """Refuses a checkpoint that was made under other settings.

    Args:
        others: what else differs, in words. otherwise: what to do instead of using the settings of the checkpoint.

    Raises:
        ValueError: names every setting that differs, with both values.
    """
    told = []
    for name in sorted(saved.keys() | current.keys()):
        if saved.get(name) != (here := current.get(name)):
            there = repr(saved[name]) if name in saved else "not recorded"
            told.append(f"--{name} {there} in the checkpoint, {here!r} now")
    told.extend(others)
    if told:
        raise ValueError(
            f"resuming needs the settings of the checkpoint, got {'; '.join(told)}: use those, or {otherwise}"
        )


def refuse_unused(state: dict | None, content: str, flag: str) -> None:
    """Raises ValueError for a checkpoint of a run with `flag`, whose state a run without it would drop; `state` and
    `content` as `check_schema`, but None is no such run."""
    if state is not None:
        check_schema(state, content, ANEW)
        check_settings(state["settings"], {**state["settings"], flag: None}, ANEW)


def latest(folder: Path) -> str | None:
    """The name of the checkpoint in `folder` that a resume loads; None if there is no whole one.

    Raises:
        ValueError: the file `latest` names one that is absent or half, and others are whole.
    """
    named = folder / "latest"
    if not named.is_file():
        return None
    tag = named.read_text(encoding="utf-8", errors="replace").strip()
    if tag and _is_whole(folder / tag):
        return tag
    if not (others := whole(folder)):
        return None
    raise ValueError(
        f"resuming needs the checkpoint that {named} names, got {tag!r}, which is not whole; whole ones are "
        f"{', '.join(others)}: write the name of one of them into that file"
    )


def whole(folder: Path) -> list[str]:
    """The names of the checkpoints in a folder that are whole."""
    return sorted(path.name for path in _checkpoints(folder) if _is_whole(path))


def nothing_to_load(folder: Path) -> str:
    """What to say of a folder without a whole checkpoint."""
    if not folder.is_dir():
        above = next(path for path in folder.absolute().parents if path.is_dir())
        return f"--ckpt.load_enable: there is no folder {folder} ({above} holds {_content(above)}): starting anew"
    return f"--ckpt.load_enable: there is no complete checkpoint in {folder} ({_content(folder)}): starting anew"


def _content(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "nothing"


def _checkpoints(folder: Path) -> list[Path]:
    paths = folder.iterdir() if folder.is_dir() else ()
    return [path for path in paths if CHECKPOINT.fullmatch(path.name) and path.is_dir()]


def _is_whole(checkpoint: Path) -> bool:
    """Whether DeepSpeed has written a model there, and every file to its end: PyTorch's files end with an index."""
    files = list(checkpoint.glob("*.pt"))
    return any(path.name.endswith("model_states.pt") for path in files) and all(map(zipfile.is_zipfile, files))
