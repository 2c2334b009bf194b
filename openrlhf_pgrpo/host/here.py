"""What is on this machine? Models, files with rows, and Python files that flags name, before anything reads them.

A driver without the files of its cluster (`remote`) cannot tell. Then a sentence says so.
"""

import ast
from collections.abc import Callable
from pathlib import Path

from openrlhf_pgrpo.models.tables import FORMATS, ON_THE_HUB


def model(flag: str, name: str | None, remote: bool) -> list[str]:
    """Looks whether a model is there: a folder, or else a name that the hub may know.

    Returns:
        A sentence if only the cluster can tell.

    Raises:
        ValueError: there is none.
    """
    if not name:
        raise ValueError(f"--{flag} needs a folder or the name of a model on the hub, got none: name one")
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"--{flag} needs a folder of a model, got {name!r}, which has no config.json: correct it")
        return []
    if folder.exists():
        raise ValueError(f"--{flag} needs a folder, got the file {name!r}: name the folder of the model")
    if ON_THE_HUB.fullmatch(name):
        return []
    if remote:
        return [only_there(flag, name)]
    raise ValueError(f"--{flag} needs a folder of a model, got {name!r}, which does not exist: correct it")


def python_file(flag: str, name: str, check: Callable[[ast.Module], str | None], remote: bool) -> list[str]:
    """Reads a Python file without running it."""
    path = Path(name)
    if not path.is_file():
        if remote and not path.exists():
            return [only_there(flag, name)]
        found = "which is a folder" if path.exists() else "which does not exist"
        raise ValueError(f"--{flag} needs a .py file, got {name!r}, {found}: correct it")
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        where = f" in line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise ValueError(f"--{flag} needs Python, got {error.args[0]}{where} of {name}: correct it") from error
    if (wrong := check(tree)) is not None:
        raise ValueError(f"--{flag} needs {wrong}, of {name}: correct it")
    return []


def file(flag: str, name: str, remote: bool) -> str | None:
    """Looks whether one file or folder of data is there. Returns a sentence if this machine cannot tell."""
    path = Path(name.split("@")[0].strip())
    if not path.name:
        raise ValueError(f"--{flag} needs names with commas between them, got an empty one: correct it")
    if path.suffix == ".py" or (path / f"{path.name}.py").is_file():
        raise ValueError(f"--{flag} needs files with rows, got the Python script {name!r}: save its rows to a file")
    if path.is_dir():
        if not any(path.iterdir()):
            raise ValueError(f"--{flag} needs rows, got the empty folder {name!r}: correct it")
        return None
    if path.is_file():
        if path.suffix not in FORMATS:
            raise ValueError(f"--{flag} needs a file of {', '.join(FORMATS)}, got {name!r}: rename or convert it")
        if not path.stat().st_size:
            raise ValueError(f"--{flag} needs rows, got the empty file {name!r}: correct it")
        return None
    if path.suffix not in FORMATS and ON_THE_HUB.fullmatch(str(path)):
        return f"--{flag} {name} is not on this machine: if it is on the hub, its rows are checked when it is loaded"
    if remote:
        return only_there(flag, name)
    raise ValueError(f"--{flag} needs a file or folder that exists, got {name!r}: correct it")


def only_there(flag: str, name: str) -> str:
    return f"--{flag} {name} is not on this machine, so only the cluster can tell whether it is right"
