"""What the longer examples keep in a folder: each result is made once, and all are of one set of flags."""

import json
import shutil
import subprocess
from pathlib import Path

from openrlhf_pgrpo.files import whole_file

SETTINGS = "settings.json"


def one_set_of_flags(folder: Path, **settings) -> None:
    """Makes the folder, if it is new, and keeps in it what its results follow from. Later calls need the same.

    Raises:
        SystemExit: the settings are others than those kept, or there are files, and no settings.
    """
    kept, text = folder / SETTINGS, json.dumps(settings, default=str)
    had = kept.read_text() if kept.is_file() else None
    if had not in (text, None):
        raise SystemExit(f"needs a folder with results of {text}, got {folder} with those of {had}: name another")
    if had is None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise SystemExit(f"needs a new or empty folder, or one with results, got {folder}: name another")
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(kept) as file:
            file.write(text.encode())


def once(folder: Path, name: str, words: list) -> None:
    """Runs a command in the folder, its output into NAME.log, unless it ran to its end before."""
    if _is_done(folder, name, words):
        return
    words = [str(word) for word in words]
    print(f"{folder.name}: {name} ...", flush=True)
    with open(folder / f"{name}.log", "w") as log:
        if subprocess.run(words, cwd=folder, stdout=log, stderr=subprocess.STDOUT).returncode != 0:
            raise SystemExit(f"{name} failed; the reason is at the end of {log.name}")
    (folder / f"{name}.done").write_text("\n".join(words))


def clear_unless_done(folder: Path, name: str, words: list) -> None:
    """Empties the folder of a command that did not run to its end, or was another: nothing may go on with what it
    left."""
    if not _is_done(folder, name, words):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)


def _is_done(folder: Path, name: str, words: list) -> bool:
    done = folder / f"{name}.done"
    return done.is_file() and done.read_text() == "\n".join(map(str, words))
