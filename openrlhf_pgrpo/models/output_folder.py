"""May a model be written to this folder? What is not ours is never replaced. It is asked before the long work."""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from openrlhf_pgrpo.core.names import listed
from openrlhf_pgrpo.files import locked, to_disk

WEIGHTS, USERS, CONFIG = "model.safetensors", "users.json", "config.json"
FITTED = "base_reward_fitted"  # in the config of a model that `openrlhf-pgrpo factorize` made
NEW = ".new-"  # what the temporary folder of a writer begins with
UNFINISHED = f"{NEW}unfinished"  # a file that is there while a model is put in place, and all by our names is ours
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf")
# What tells a folder that holds a model, whoever wrote it.
MODEL_FILES = (CONFIG, USERS, "adapter_config.json", *WEIGHT_FILES, "*.index.json", "tokenizer*")
# What the writer of a tokenizer may leave in a folder, by name.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
)
# What a folder of ours may hold: the files above, and those of any tokenizer.
OUR_FILES = (
    *(WEIGHTS, USERS, CONFIG, f"{NEW}*", *TOKENIZER_FILES, "tokenizer*", "vocab*", "*.model", "*.tiktoken"),
    *("chat_template*", "additional_chat_templates"),
)


def check_output(folder: str | Path, flag: str, inputs: Iterable[str | Path | None] = (), again: bool = False) -> None:
    """Raises ValueError if a model that is written to `folder` would destroy something; for use before the long work.

    It may lie beside files of other kinds, such as checkpoints and logs, which stay.

    Args:
        flag: names the folder in messages. inputs: folders or hub names of the models that are read; None is none.
        again: a model that is there is one that this command may replace, such as that of the run that is resumed.
    """
    folder = Path(folder)
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"{flag} needs a folder, got {folder}, which is something else: name another")
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{flag} needs a folder that can be written, got {folder} in {above}: name another")
    for given in inputs:
        if given is not None and folder.exists() and Path(given).exists() and folder.samefile(given):
            raise ValueError(f"{flag} needs a folder of its own, got {folder}, the model that is read: name another")
    held = sorted(path.name for pattern in MODEL_FILES for path in folder.glob(pattern))
    if held and not again:
        raise ValueError(
            f"{flag} needs a folder without a model, got {folder} with {listed(held, 3)}, which would be replaced: "
            "name another, or move that model away"
        )


def check_new(folder: str | Path, flag: str, inputs: Iterable[str | Path | None] = (), refit: bool = False) -> None:
    """Raises ValueError unless `folder` is new or empty, or holds what a writer of ours left that was killed.

    Args:
        flag, inputs: as `check_output`.
        refit: It may also hold a model that `write` made, and nothing else. That one came of a file and flags in
            minutes, and profiles of the old model are refused with a sentence. A trained one is never replaced.
    """
    folder = Path(folder)
    check_output(folder, flag, inputs, again=True)
    held = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    foreign = [name for name in held if not any(Path(name).match(pattern) for pattern in OUR_FILES)]
    if is_unfinished(folder) and not foreign or all(name.startswith(NEW) for name in held):
        return
    if not (refit and not foreign and is_fitted(folder)):
        kept = " that factorize has written, alone" if refit else ""
        raise ValueError(
            f"{flag} needs a new or empty folder{', or one with a model' if refit else ''}{kept}, got {folder} with "
            f"{listed(foreign or held, 3)}: name another"
        )


@contextmanager
def new_files(folder: Path) -> Iterator[Path]:
    """A temporary folder in `folder`, which is gone after the block. Those of writers that were killed go before."""
    for left in folder.glob(f"{NEW}*"):
        if left.is_dir() and not left.is_symlink():
            with _held(left) as ours:
                if ours:
                    shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=folder, prefix=NEW) as made, _held(Path(made)):
        yield Path(made)


def put_in_place(new: Path, folder: Path, files: Iterable[Path]) -> None:
    """Moves files, whose content is on the disk, from one folder to the other, by their paths in both.

    Whoever stops in between, or dies, leaves no model: config.json goes first and comes last. A mixture of two models
    would be read as one. Another writer waits. Of a model that `write` made, or that is unfinished, no file of a
    tokenizer stays: its chat template would count as that of the new one.
    """
    # Not the folder itself, which a training of this process holds. The work is done: no lock is no reason to lose it.
    with locked(folder / f"{NEW[1:]}model", needed=False):
        kinds = (*TOKENIZER_FILES, "additional_chat_templates/*.jinja")
        old = {path.relative_to(folder) for kind in kinds for path in folder.glob(kind)}
        if ours := not old or is_fitted(folder) or is_unfinished(folder):
            (folder / UNFINISHED).touch()
        (folder / CONFIG).unlink(missing_ok=True)
        to_disk(folder)
        for file in sorted(set(files) - {Path(CONFIG)}):
            (folder / file).parent.mkdir(exist_ok=True)
            os.replace(new / file, folder / file)
        for file in old.difference(files) if ours else ():
            (folder / file).unlink()
        to_disk(folder)
        os.replace(new / CONFIG, folder / CONFIG)
        to_disk(folder)
        (folder / UNFINISHED).unlink(missing_ok=True)


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Holds the lock of a folder; whether it could. The lock ends with its process."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except OSError:  # another writer has it, or the file system has no locks: then nothing is taken away
            held = False
        yield held
    finally:
        os.close(descriptor)


def is_unfinished(folder: Path) -> bool:
    """Whether the folder holds what a writer left that was stopped while it put a model into its place."""
    return (folder / UNFINISHED).is_file() and not (folder / CONFIG).exists()


def is_fitted(folder: Path) -> bool:
    """Whether the folder holds a model that `write` made."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and config.get(FITTED) is True
