"""The parser of a script of the host, without the script: it stands below `__main__`, behind imports of a minute.

So only the lines that build the parser are run, and of the script's imports only those that these lines use.
"""

import argparse
import ast
import importlib.util
from pathlib import Path

from openrlhf_pgrpo.host.versions import SeamError


def host_parser(script: str) -> argparse.ArgumentParser:
    """A fresh parser, as the host's module `script` builds it.

    Raises:
        SeamError: the script is missing or builds its parser in another way than we know.
    """
    path = path_of(script)
    tree = ast.parse(path.read_bytes())
    for block in tree.body:
        lines = block.body if isinstance(block, ast.If) else []
        for number, line in enumerate(lines):
            if _parses(line):
                return _build(tree, lines[:number], path)
    raise SeamError(f"openrlhf_pgrpo needs a script that calls parse_args under __main__, found none in {path}")


def is_patched(script: str) -> bool:
    """Whether the host's module `script` opens its door itself, see `patches/`."""
    return "openrlhf_pgrpo" in path_of(script).read_text(encoding="utf-8")


def path_of(module: str) -> Path:
    """The file of a module of the host, without importing the packages around it.

    Raises:
        SeamError: there is none.
    """
    package, *parts = module.split(".")
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent.joinpath(*parts).with_suffix(".py") if spec and spec.origin else None
    if path is None or not path.is_file():
        raise SeamError(f"openrlhf_pgrpo needs the host's module {module}, found none: install the host again")
    return path


def _parses(line: ast.stmt) -> bool:
    calls = (node.func for node in ast.walk(line) if isinstance(node, ast.Call))
    return any(isinstance(called, ast.Attribute) and called.attr == "parse_args" for called in calls)


def _build(tree: ast.Module, lines: list[ast.stmt], path: Path) -> argparse.ArgumentParser:
    used = {node.id for line in lines for node in ast.walk(line) if isinstance(node, ast.Name)}
    imports = [
        line
        for line in tree.body
        if isinstance(line, ast.Import | ast.ImportFrom)
        and any((alias.asname or alias.name.split(".")[0]) in used for alias in line.names)
    ]
    names: dict = {}
    exec(compile(ast.Module([*imports, *lines], []), path, "exec"), names)
    return names["parser"]
