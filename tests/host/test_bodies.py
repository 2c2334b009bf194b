"""A body may change while its signature stays: which functions of the host are not those that we know."""

import ast
import hashlib
from pprint import pformat

import pytest

from openrlhf_pgrpo.host import bodies, doors, script, versions

pytestmark = pytest.mark.host

INSTALLED = versions.installed("openrlhf")


def found() -> bodies.Hashes:
    """Those of the installed host."""
    return {module: {path: body(module, path) for path in paths} for module, paths in bodies.of(INSTALLED).items()}


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


def changed(now: bodies.Hashes, known: bodies.Hashes) -> list[str]:
    return [
        f"{module}.{path}" for module in known for path in known[module] if now[module][path] != known[module][path]
    ]


def test_the_hosts_functions_are_those_that_we_know():
    now = found()
    names = changed(now, bodies.of(INSTALLED))
    then = f"compare these with what ours make of them; then host/bodies.py needs those of\n{pformat(now)}"
    assert names == [] and INSTALLED in bodies.BODIES, (
        f"openrlhf {INSTALLED} has other bodies than we know, of {names}: {then}"
    )


def test_every_version_and_every_function_of_a_contract_has_hashes():
    assert tuple(bodies.BODIES) == versions.HOST_VERSIONS
    seams = [seam for door in (doors.PPO, doors.DPO, doors.RM, doors.SERVE) for seam in door.seams.values()]
    known = {path for paths in bodies.of(versions.HOST_VERSIONS[0]).values() for path in paths}
    assert {path for seam in seams for path in seam.contract} <= known


def test_a_version_has_what_differs_and_the_rest_of_the_newer_ones(monkeypatch):
    newest, older = {"m": {"f": "1", "g": "1"}, "n": {"h": "1"}}, {"m": {"f": "2"}}
    monkeypatch.setattr(bodies, "BODIES", {"3": newest, "2": older, "1": {"n": {"h": "3"}}})
    assert bodies.of("3") == bodies.of("4") == newest
    assert bodies.of("2") == {"m": {"f": "2", "g": "1"}, "n": {"h": "1"}}
    assert bodies.of("1") == {"m": {"f": "2", "g": "1"}, "n": {"h": "3"}}


def test_a_line_that_changes_names_its_function_alone(tmp_path, monkeypatch):
    known, module = found(), "openrlhf.trainer.dpo_trainer"
    source = script.path_of(module).read_text(encoding="utf-8")
    copy, place = tmp_path / "dpo_trainer.py", "def fit("
    copy.write_text("# a new first line\n" + source.replace(place, f"@staticmethod\n    {place}"), encoding="utf-8")
    real = script.path_of
    monkeypatch.setattr(script, "path_of", lambda name: copy if name == module else real(name))
    assert changed(found(), known) == [f"{module}.DPOTrainer.fit"]
