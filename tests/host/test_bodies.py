"""A body may change while its signature stays: which functions of the host are not those that we know."""

import ast
import hashlib
from pprint import pformat

import pytest

from openrlhf_pgrpo.host import doors, script, versions
from openrlhf_pgrpo.host.bodies import BODIES

pytestmark = pytest.mark.host

KNOWN = [*BODIES.values()][-1]


def bodies() -> dict[str, dict[str, str]]:
    """What is installed, in the form of BODIES."""
    return {module: {path: body(module, path) for path in paths} for module, paths in KNOWN.items()}


def body(module: str, path: str) -> str:
    """The hash of a function, with its decorators and comments: the text is the same in every Python. "" if it is
    gone."""
    source = script.path_of(module).read_text(encoding="utf-8")
    node = ast.parse(source)
    for name in path.split("."):
        node = next((inner for inner in node.body if getattr(inner, "name", None) == name), None)
        if node is None:
            return ""
    first = min(line.lineno for line in (node, *node.decorator_list))
    text = "\n".join(source.splitlines()[first - 1 : node.end_lineno])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def changed(found: dict, known: dict) -> list[str]:
    return [
        f"{module}.{path}" for module in known for path in known[module] if found[module][path] != known[module][path]
    ]


def test_the_hosts_functions_are_those_that_we_know():
    version, found = versions.installed("openrlhf"), bodies()
    names = changed(found, BODIES.get(version, KNOWN))
    then = f"compare these with what ours make of them; then host/bodies.py needs\n{pformat({version: found})}"
    assert names == [] and version in BODIES, f"openrlhf {version} has other bodies than we know, of {names}: {then}"


def test_every_version_and_every_function_of_a_contract_has_hashes():
    assert BODIES.keys() == set(versions.HOST_VERSIONS)
    seams = [seam for door in (doors.PPO, doors.DPO, doors.RM, doors.SERVE) for seam in door.seams.values()]
    for modules in BODIES.values():
        assert {path for seam in seams for path in seam.contract} <= {
            path for paths in modules.values() for path in paths
        }


def test_a_line_that_changes_names_its_function_alone(tmp_path, monkeypatch):
    known, module = bodies(), "openrlhf.trainer.dpo_trainer"
    source = script.path_of(module).read_text(encoding="utf-8")
    copy, place = tmp_path / "dpo_trainer.py", "def fit("
    copy.write_text("# a new first line\n" + source.replace(place, f"@staticmethod\n    {place}"), encoding="utf-8")
    real = script.path_of
    monkeypatch.setattr(script, "path_of", lambda name: copy if name == module else real(name))
    assert changed(bodies(), known) == [f"{module}.DPOTrainer.fit"]
